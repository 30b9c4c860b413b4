"""What the probes look at: the output of every block at the last real prompt token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qrealign.data.batching import run_in_batches
from qrealign.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def collect_last_states(
    model: PreTrainedModel,
    encoder: Any,
    prompts: Sequence[str],
    spec: Any,
    *,
    batch_size: int = 16,
    progress: str | None = None,
    padding_side: str = "right",
) -> Tensor:
    """Run prompts through a model and return each block's output at the last real prompt token.

    The model's own forward runs, without its head and its cache; only the last tokens are kept. Blocks may be streamed:
    their weights need to be there during their own forward only. Prompts are sorted by length to save padding and
    returned in the order given. A batch that does not fit in memory is halved.

    Args:
        model: a Hugging Face causal language model.
        encoder: a `ChatEncoder`; `encode_many(texts)` and `pad(ids, side=...)` are used.
        prompts: texts, at least one.
        spec: the model's `BlockSpec`; `spec.blocks` is the path of its list of blocks.
        batch_size: prompts per forward.
        progress: label of a progress bar, or None for silence.
        padding_side: "right" or "left"; both give the same states.

    Returns:
        `[L, N, H]` float32 on the host: block output before the final norm.

    Raises:
        DataError: no prompts.
        DeviceError: a single prompt does not fit in memory.
    """
    if not prompts:
        raise DataError("there are no prompts to read states from: give at least one")
    blocks = model.get_submodule(spec.blocks)
    body = model.base_model
    device = next(model.get_input_embeddings().parameters()).device
    ids = encoder.encode_many(list(prompts))
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)  # the longest fail first
    states: list[Tensor | None] = [None] * len(ids)

    def run(rows: Sequence[int]) -> None:
        batch = encoder.pad([ids[row] for row in rows], side=padding_side)
        with _last_tokens_of(blocks, batch.last_index.to(device)) as found:
            body(**_inputs(batch, device, padding_side))
        for row, state in zip(rows, torch.stack(found, dim=1), strict=True):
            states[row] = state

    with tqdm(total=len(ids), desc=progress, unit="prompt", disable=progress is None, leave=False) as bar:
        for rows, _ in run_in_batches(run, order, batch_size):
            bar.update(len(rows))
    return torch.stack([state for state in states if state is not None], dim=1)


def _inputs(batch: Any, device: torch.device, padding_side: str) -> dict[str, Any]:
    """Return the forward's arguments. Left padding needs positions that start at the first real token."""
    mask = batch.attention_mask.to(device)
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": mask, "use_cache": False}
    if padding_side == "left":
        inputs["position_ids"] = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return inputs


@contextmanager
def _last_tokens_of(blocks: nn.Module, last_index: Tensor) -> Iterator[list[Tensor]]:
    """Yield a list that receives each block's output `[B, H]` at `last_index` `[B]`, in float32 on the host."""
    found: list[Tensor] = []
    rows = torch.arange(len(last_index), device=last_index.device)

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found.append(hidden[rows.to(hidden.device), last_index.to(hidden.device)].float().cpu())

    handles = [block.register_forward_hook(keep) for block in blocks.children()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
