"""Pure-PyTorch definition of attention for one new token a sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention_ref(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the definition of `attention_ops.decode_attention`, computed in float32 and rounded once."""
    batch, heads, size = query.shape
    grouped = query.float().reshape(batch, key.shape[1], -1, size)  # the query heads of each key-value head
    scores = grouped @ key.float().transpose(-1, -2) * scaling  # [B, heads of keys, queries of each, S]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    shares = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # nothing but -inf: nothing is seen
    return (shares @ value.float()).reshape(batch, heads, value.shape[-1]).to(query.dtype)
