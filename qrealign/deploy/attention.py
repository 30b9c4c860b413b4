"""Attention of deployed models on a GPU: steps of one token read the visible part of the cache alone, all of the GPU
at once; anything else is transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qrealign_kernels import decode_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "qrealign_decode"


def use_decode_attention(model: PreTrainedModel) -> None:
    """Let a model whose attention is torch's use `decode_attention` where it applies; other models stay as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute what transformers' `sdpa_attention_forward` does, in its form.

    Args:
        module: the attention module that calls.
        query: `[B, H, T, D]`.
        key: `[B, H / n, S, D]`, as the cache gives it.
        value: the same.
        attention_mask: bool `[B or 1, 1, T, S]`, or None.
        dropout: 0 outside of training.
        scaling: of the scores; None takes the root of D.
        options: what other attention functions take.

    Returns:
        `[B, T, H, D]`, and no weights.
    """
    maskable = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    if query.shape[2] != 1 or not maskable or dropout or key.shape != value.shape or options.get("position_bias"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(len(query), -1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return decode_attention(query[:, :, 0], key, value, mask, scaling=scaling)[:, None], None
