"""What goes into the decoder blocks: embeddings, masks and rotary angles, made by the model's own forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qrealign.arch import BlockSpec, block_spec
from qrealign.errors import UnsupportedArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _AllCaptured(Exception):
    """Ends the model's forward once the last block has been reached: final norm and head are not needed."""


class _Recorder:
    """Stands in for a block's forward: keeps the arguments and passes the hidden states through."""

    def __init__(self, block: nn.Module, *, as_tuple: bool, is_last: bool) -> None:
        self.block = block
        self.as_tuple = as_tuple
        self.is_last = is_last
        self.names = list(inspect.signature(type(block).forward).parameters)[1:]  # without self
        self.previous = vars(block).get("forward")
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        block.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.hidden = arguments.pop(self.names[0])
        self.kwargs = arguments
        if self.is_last:
            raise _AllCaptured
        return (self.hidden,) if self.as_tuple else self.hidden

    def restore(self) -> None:
        """Give the block back the forward that it had."""
        del self.block.forward
        if self.previous is not None:
            self.block.forward = self.previous


@torch.no_grad()
def capture_block_inputs(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, spec: BlockSpec | None = None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the first block's input and every block's other arguments, as the model's own forward makes them.

    No block runs, so their weights may be on the meta device; the embeddings must not be. `run_block` then takes the
    result, and chaining it over the blocks gives the model's own hidden states bit for bit.

    Args:
        model: a Hugging Face causal language model.
        input_ids: `[B, T]` int64, on the embeddings' device.
        attention_mask: `[B, T]`, 1 for real tokens, padding on either side; None when there is none.
        spec: says where the blocks are; looked up when None.

    Returns:
        hidden states `[B, T, H]` in the model's dtype, and one dictionary of keyword arguments per block (shared
        tensors are the same object). Caching is off.

    Raises:
        UnsupportedArchitectureError: the forward of this model does not pass hidden states from block to block.
    """
    spec = spec or block_spec(model.config, model)
    blocks = spec.blocks_of(model)
    # Blocks of some architectures return a tuple, which their model unpacks.
    for as_tuple in (False, True):
        recorders = [_Recorder(block, as_tuple=as_tuple, is_last=block is blocks[-1]) for block in blocks]
        try:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _AllCaptured:
            pass
        except (IndexError, AttributeError, TypeError, ValueError, RuntimeError):
            if as_tuple:
                raise
            continue
        finally:
            for recorder in recorders:
                recorder.restore()
        hidden = [recorder.hidden for recorder in recorders if recorder.hidden is not None]
        if len(hidden) == len(blocks) and all(each.ndim == 3 and each.shape == hidden[0].shape for each in hidden):
            return hidden[0], [recorder.kwargs for recorder in recorders]
    raise UnsupportedArchitectureError(
        f"the blocks of model type {spec.model_type!r} do not pass hidden states [batch, tokens, hidden] on to "
        "each other"
    )


def run_block(block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return a block's output hidden states, `[B, T, H]`, whether the block returns them alone or in a tuple."""
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def select_rows(kwargs: Mapping[str, Any], rows: Sequence[int] | slice | Tensor, batch_size: int) -> dict[str, Any]:
    """Return block arguments for some rows of a batch: tensors `[batch_size, ...]` are indexed, others shared."""

    def select(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.ndim > 1 and value.shape[0] == batch_size and batch_size > 1 else value
        return tuple(select(item) for item in value) if isinstance(value, tuple) else value

    return {name: select(value) for name, value in kwargs.items()}
