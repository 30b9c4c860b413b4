"""Pure-PyTorch definitions of what a decoder block does beside its products when it adds one token to a sequence.

Every step is rounded to the tensors' dtype where Hugging Face's blocks round it; sums are in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.reference import quantize_per_token_ref
from qrealign_kernels.reference_calibration import rms_norm_ref


def add_rms_norm_ref(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return `x + branch`, or x where there is no branch, and `rms_norm_ref` of it; see `block_ops.add_rms_norm`."""
    total = x if branch is None else x + branch
    return total, rms_norm_ref(total, weight, eps, offset=offset)


def add_rms_norm_quantize_ref(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, num_bits: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of `add_rms_norm_ref` and `quantize_per_token_ref` of what it normalizes."""
    total, normed = add_rms_norm_ref(x, branch, weight, eps, offset=offset)
    return total, *quantize_per_token_ref(normed, num_bits=num_bits)


def normed_dtype(x: Tensor, weight: Tensor, offset: float) -> torch.dtype:
    """Return the dtype of `rms_norm_ref`."""
    return torch.promote_types(x.dtype, weight.dtype) if offset == 0.0 else x.dtype


def rotate_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channels j and j + D / 2 of `[..., H, D]` heads by the angles behind cos and sin, `[..., D]`."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[..., None, :] + torch.cat((-high, low), dim=-1) * sin[..., None, :]


def decode_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
    mask: Tensor | None,
    *,
    length: int,
    scaling: float,
    advance: bool,
) -> Tensor:
    """Rotate, store and attend, for one token a row; see `block_ops.decode_attention`."""
    batch, heads, _ = query.shape
    query, key = rotate_ref(query, cos, sin), rotate_ref(key, cos, sin)
    rows = torch.arange(batch, device=query.device)
    places = cells.expand(batch)
    seen = torch.arange(length, device=query.device) < places[:, None]  # [B, length]; the new token stands apart
    if mask is not None:
        seen = seen & mask[:, :length]
    group = heads // key.shape[1]
    old_keys, old_values = (buffer[:batch, :, :length].float() for buffer in (keys, values))
    keys[rows, :, places], values[rows, :, places] = key, value
    wide = query.float().reshape(batch, -1, group, query.shape[2])  # [B, heads of keys, group, D]
    new_score = (wide * key.float()[:, :, None]).sum(-1, keepdim=True)
    scores = torch.cat(((wide @ old_keys.mT).masked_fill(~seen[:, None, None], -torch.inf), new_score), dim=-1)
    shares = (scores * scaling).softmax(dim=-1)
    out = shares[..., :-1] @ old_values + shares[..., -1:] * value.float()[:, :, None]
    if advance:
        cells.add_(1)
    return out.reshape(query.shape).to(query.dtype)
