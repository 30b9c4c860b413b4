"""Models larger than memory: a block's weights exist only while the block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qrealign.models.placement import Contents, assign_tensor, move_buffers, restore_contents, save_contents
from qrealign.models.transfer import BlockStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qrealign.arch import BlockSpec
    from qrealign.models.source import ModelSource

Loader = Callable[["PreTrainedModel", int], object]


class _StreamedBlock:
    """Wraps the forward of one block: load, run, release; also when gradient checkpointing runs it again."""

    def __init__(self, block: nn.Module, load: Callable[[], object]) -> None:
        self.block = block
        self.load = load
        self.forward = block.forward
        self.depth = 0
        self.contents: Contents = {}
        block.forward = self

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Hold the block's weights; nested uses load once."""
        if self.depth == 0:
            self.contents = save_contents(self.block)
            self.load()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                restore_contents(self.contents)
                self.contents = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = vars(self.block).get("_gradient_checkpointing_func")
        if checkpoint is None:
            with self.loaded():
                return self.forward(*args, **kwargs)
        # Newer transformers checkpoint a block's inner forward, so the backward pass runs that again and not this
        # method: the function given to the checkpoint has to load for itself.
        vars(self.block)["_gradient_checkpointing_func"] = lambda run, *rest: checkpoint(self._loading(run), *rest)
        try:
            with self.loaded():
                return self.forward(*args, **kwargs)
        finally:
            vars(self.block)["_gradient_checkpointing_func"] = checkpoint

    def _loading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with the weights held around it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.loaded():
                return function(*args, **kwargs)

        return run

    def remove(self) -> None:
        """Give the block its own forward back."""
        del self.block.forward


class StreamHandle:
    """Streaming of one model; `remove()`, or leaving a `with` block, ends it with the weights on the meta device."""

    def __init__(self, blocks: list[_StreamedBlock], stream: BlockStream | None = None) -> None:
        self._blocks, self._stream = blocks, stream

    def remove(self) -> None:
        """End the streaming; calling it twice is harmless."""
        while self._blocks:
            self._blocks.pop().remove()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> StreamHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def is_streamed(model: PreTrainedModel, spec: BlockSpec) -> bool:
    """Return whether the blocks of `model` load their weights anew for every forward."""
    return any(isinstance(vars(block).get("forward"), _StreamedBlock) for block in spec.blocks_of(model))


def stream_blocks(
    model: PreTrainedModel,
    source: ModelSource,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    *,
    loader: Loader | None = None,
    stream: BlockStream | None = None,
) -> StreamHandle:
    """Make every block of `model` load its weights before it runs and release them after.

    Works with `generate` and its cache, and under gradient checkpointing, Hugging Face's or a direct
    `torch.utils.checkpoint` of a block. Without checkpointing a backward pass keeps the weights of every block alive.

    Args:
        model: a skeleton of `source`, its tensors outside the blocks loaded (`source.load_outer`); linears may be
            swapped.
        source: gives the weights, and says where the blocks are.
        device: where blocks run.
        dtype: of the weights; None keeps the stored one.
        loader: called as `loader(model, index)` to fill a block, instead of `source.load_block`. It may replace the
            block's submodules too: whatever it changes in the block is undone after the block has run.
        stream: brings blocks while earlier ones run, instead of either; the handle closes it.
    """
    blocks = source.spec.blocks_of(model)
    for block in blocks:
        move_buffers(block, device)

    def load(index: int) -> None:
        if stream is not None:
            for name, tensor in stream.acquire(index).items():
                assign_tensor(blocks[index], name, tensor)
        elif loader is not None:
            loader(model, index)
        else:
            source.load_block(model, index, device, dtype)

    return StreamHandle([_StreamedBlock(block, partial(load, index)) for index, block in enumerate(blocks)], stream)
