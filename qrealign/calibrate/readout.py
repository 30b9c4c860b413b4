"""From token ids to final hidden states, and from those to logits, through Hugging Face's own model code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast


def final_hidden(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Return the hidden states that the output head reads, `[B, T, H]` (after the final norm).

    `input_ids` is `[B, T]`; rows without padding, or with padding on their right, need no mask. Else it is `[B, T]`, or
    what `causal_mask` made, which spares transformers a look at the values. `positions` `[1, T]` counts from each
    sequence's start where several stand in one row.
    """
    if positions is None and attention_mask is not None and attention_mask.dim() == 4:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    decoder = model.get_decoder()
    return decoder(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state


def causal_mask(model: PreTrainedModel, length: int) -> Tensor | None:
    """Return `[1, 1, T, T]` bool, which token sees which, for `final_hidden`; None where layers differ in that."""
    config = model.config
    alike = not getattr(config, "sliding_window", None) and not getattr(config, "attention_chunk_size", None)
    if not alike or config._attn_implementation != "sdpa":
        return None
    return torch.ones(length, length, dtype=torch.bool, device=model.device).tril()[None, None]


def readout(model: PreTrainedModel, hidden: Tensor, head_weight: Tensor | None = None) -> Tensor:
    """Return the logits `[P, V]` of hidden states `[P, H]` as the model's own head gives them, soft-capping included.

    Args:
        model: any causal language model whose head is on the device of `hidden`.
        hidden: what `final_hidden` returned, at any positions.
        head_weight: another model's output weight `[V, H]` to read with; None for the model's own.
    """
    with _decoder_returns(model, hidden[None]), _head_weight(model, head_weight):
        return model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device), use_cache=False).logits[0]


@contextmanager
def _decoder_returns(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Let the decoder answer with `hidden`, so that only the head and what follows it runs."""
    decoder = model.get_decoder()
    decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        del decoder.forward


@contextmanager
def _head_weight(model: PreTrainedModel, weight: Tensor | None) -> Iterator[None]:
    """Read with another output weight for a while."""
    if weight is None:
        yield
        return
    head = model.get_output_embeddings()
    own = head.weight
    head.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        head.weight = own
