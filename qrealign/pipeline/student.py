"""The model that the end-to-end engine trains: weights resident where they fit, streamed block by block otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qrealign.arch import BlockSpec
from qrealign.calibrate.blockwise import freeze_block
from qrealign.calibrate.handover import HandOver
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.parameters import BlockContext, Trainable
from qrealign.data.capture import capture_block_inputs, run_block
from qrealign.errors import DeviceError
from qrealign.models.placement import release_weights
from qrealign.models.streaming import StreamHandle, stream_blocks
from qrealign.pipeline.context import RunContext
from qrealign.pipeline.models import free_bytes
from qrealign.quant.fake_quant import fake_quant_linears, set_quantize, swap_linears
from qrealign.quant.fused import fused_inputs, fused_rotation
from qrealign.repair.stored import store_block

logger = logging.getLogger(__name__)

KEPT_SHARE = 0.4  # of the weights' bytes: what kept activations may take on a GPU
ACTIVATION_SHARE = 0.25  # of the free memory: the same on a CPU
PROBED_TOKENS = 32
WRITERS = 4  # frozen blocks on their way to the disk at a time


class Student:
    """The model to be quantized with fake-quantized linears and everything trainable attached.

    Args:
        context: the run; its repaired model is the student.
        settings: what is trained.
        quantize: False trains through the full-precision weights instead of their grid.
        maxima: largest input of each channel, full linear name -> `[K]`; channel scales start from them.
        masks: entries that an edit may change, full linear name -> `[N, K]` bool.

    Attributes:
        model: computes with the present parameters; call it like any Hugging Face model.
        trainable: its parameters.
        streamed: whether blocks load their weights only while they run.
    """

    def __init__(
        self,
        context: RunContext,
        settings: CalibrationSettings,
        *,
        quantize: bool = True,
        maxima: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.context, self.settings, self.quantize = context, settings, quantize
        self._fused = ExitStack()  # what norms and gates do while the student learns
        self.maxima, self.masks = maxima or {}, masks or {}
        source, pool = context.repaired, context.pool
        taught = pool.take(source)
        self.model: PreTrainedModel = taught or source.skeleton(dtype=pool.dtype)
        if taught is None:
            source.load_outer(self.model, context.device, pool.dtype)
        self.streamed = taught is None and not pool.fits(source)
        if self.streamed and settings.transform_learning_rate:
            raise DeviceError(
                f"{source.name} does not fit into the free memory of {context.device}, and channel scales are learned "
                "end-to-end with the whole model there: use a larger device, or --setting transform_learning_rate=0"
            )
        self.trainable = Trainable(self._contexts(loaded=taught is not None))
        set_quantize([self.model], quantize)
        if quantize and context.device.type == "cuda":
            self._fused.enter_context(fused_rotation(source.spec.blocks_of(self.model)[0]))
        self._stream: StreamHandle | None = None
        if self.streamed:
            stream = pool.open_stream(source)
            self._stream = stream_blocks(self.model, source, context.device, pool.dtype, stream=stream)
        blocks = list(source.spec.blocks_of(self.model))
        kept, coded = (0, 0) if self.streamed else kept_blocks(context, settings, self.model, blocks)
        again, held = blocks[: len(blocks) - kept], blocks[len(blocks) - coded :]
        if again:  # the first ones: they are computed again when the last ones' memory is free
            checkpoint_blocks(self.model, again)
        # What is computed again keeps its codes too: only until its own backward pass, which comes next.
        for block in [] if self.streamed else [*again, *held]:
            for layer in fake_quant_linears(block).values():
                layer.keeps_codes = True

    @property
    def recordable(self) -> bool:
        """Whether a pass may be recorded: the weights stay in place, and no module reads a value back."""
        return self.context.device.type == "cuda" and not self.streamed and not self.context.repaired.spec.experts

    def _contexts(self, *, loaded: bool) -> Iterator[BlockContext]:
        """Yield each block with its weights in place, which attaching needs; a streamed one gives them back at once."""
        source, pool = self.context.repaired, self.context.pool
        blocks = source.spec.blocks_of(self.model)
        read = blocks if loaded else source.load_blocks(self.model, self.context.device, pool.dtype)
        for index, block in enumerate(read):
            swap_linears(block, self.context.scheme, scale_dtype=source.storage_dtype, skip=source.spec.skip)
            prefix = source.spec.block_name(index) + "."
            yield BlockContext(
                block=block,
                index=index,
                spec=source.spec,
                settings=self.settings,
                activation_amax=_below(self.maxima, prefix),
                masks=_below(self.masks, prefix),
            )
            if self.quantize and self.context.device.type == "cuda":
                self._fused.enter_context(fused_inputs(block, source.spec))
            if self.streamed:
                release_weights(block)

    def store_edits(self, folder: Path) -> None:
        """Write the learned edits of every block, as a repair that any reader of the source's tensors applies."""
        source = self.context.repaired
        for index, block in enumerate(source.spec.blocks_of(self.model)):
            store_block(folder, index, edit_factors(block, source.spec.block_name(index)))

    def freeze(self, on_block: Callable[[int, nn.Module], None]) -> None:
        """Hand every block over in its final form, on the host; from a GPU several at a time, in any order.

        The student is used up by it.
        """
        source = self.context.repaired
        self._fused.close()
        if self._stream is not None:
            self._stream.remove()
        self.trainable.fold(source.storage_dtype)
        blocks = source.spec.blocks_of(self.model)
        if self.streamed:
            loaded: Iterable[nn.Module] = source.load_blocks(self.model, self.context.device, self.context.pool.dtype)
        else:
            loaded = blocks

        def write(index: int, block: nn.Module) -> None:
            on_block(index, block.to("cpu"))
            block.to("meta")

        with HandOver(self.context.device, WRITERS) as hand_over:
            for index, block in enumerate(loaded):
                hand_over.submit(partial(write, index, freeze_block(block, source.storage_dtype)))


def edit_factors(block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the factors of the edits learned in a block, as `repair.stored` keeps them: `X.left` and `X.right`."""
    factors: dict[str, Tensor] = {}
    for name, layer in fake_quant_linears(block).items():
        if layer.edit is not None:
            factors[f"{prefix}.{name}.left"], factors[f"{prefix}.{name}.right"] = layer.edit.left, layer.edit.right
    return factors


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def kept_blocks(
    context: RunContext, settings: CalibrationSettings, model: PreTrainedModel, blocks: Sequence[nn.Module]
) -> tuple[int, int]:
    """Return how many blocks keep their activations for the backward pass; the others are computed again there. And
    how many of them keep their weights' codes too, once all keep their activations.

    On a GPU they may take `KEPT_SHARE` of the weights' bytes, so that what a card must have follows from the model, and
    half of what is free, because a recorded pass holds its own memory. Processes that share batches keep more each.
    """
    free, weights = free_bytes(context.device), context.pool.resident_bytes(context.repaired)
    allowed = min(KEPT_SHARE * weights, free / 2) if context.device.type == "cuda" else ACTIVATION_SHARE * free
    samples = len(context.team.share(range(settings.batch_size)))
    tokens = samples * (settings.sequence_length + max(settings.benign_tokens, settings.refusal_tokens))
    fixed, each = graph_bytes(model, context.repaired.spec)
    kept = int(min(len(blocks), allowed / (fixed + each * tokens)))
    codes = sum(layer.weight.numel() for layer in fake_quant_linears(blocks[-1]).values())
    left = allowed - len(blocks) * (fixed + each * tokens)
    coded = int(min(len(blocks), max(0.0, left) / codes)) if context.device.type == "cuda" else 0
    return kept, coded


def graph_bytes(model: PreTrainedModel, spec: BlockSpec) -> tuple[float, float]:
    """Return the bytes that a backward pass keeps of a block: those of any pass, and those of each token.

    Measured in the middle block with two short sequences; what its parameters and buffers hold does not count.
    """
    blocks = spec.blocks_of(model)
    index = len(blocks) // 2
    few, many = (
        _saved_bytes(model, blocks[index], index, length, spec) for length in (PROBED_TOKENS, 2 * PROBED_TOKENS)
    )
    each = max(1.0, (many - few) / PROBED_TOKENS)
    return max(0.0, few - each * PROBED_TOKENS), each


def _saved_bytes(model: PreTrainedModel, block: nn.Module, index: int, length: int, spec: BlockSpec) -> int:
    """Return the bytes of the tensors that a block saves in a pass over `length` tokens, each storage once."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in chain(block.parameters(), block.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep the graph that it belongs to alive for ever

    ids = torch.zeros(1, length, dtype=torch.int64, device=model.device)
    hidden, kwargs = capture_block_inputs(model, ids, spec=spec)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run_block(block, hidden.requires_grad_(True), kwargs[index])
    del output
    return sum(saved.values())


def checkpoint_blocks(model: PreTrainedModel, blocks: list[nn.Module]) -> None:
    """Recompute each block in the backward pass instead of keeping its activations.

    Hugging Face checkpoints blocks in training mode only. That mode is set on the blocks alone, with their own dropout
    off, so that everything below them computes as in inference.
    """
    if not model.supports_gradient_checkpointing:
        logger.warning("this architecture cannot recompute activations: a batch takes more memory")
        return
    enable_checkpointing(model)
    block: Any  # its dropout is a plain attribute, which nn.Module does not declare
    for block in blocks:
        block.training = True
        if isinstance(getattr(block, "dropout", None), float):
            block.dropout = 0.0


def enable_checkpointing(model: PreTrainedModel, *, use_reentrant: bool = False) -> None:
    """Switch on Hugging Face's checkpointing by its name in this version of transformers; 5.23 warns at the old one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant, "preserve_rng_state": False})  # nothing here draws random numbers
