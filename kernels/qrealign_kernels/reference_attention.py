"""Pure-PyTorch definitions of attention over a cache of fixed size, in 16 bits or as int8 codes.

Every step is rounded to the tensors' dtype where Hugging Face's blocks round it; sums are in float32. New keys and
values are stored first and read back from the cache, so that what a token sees does not depend on how a prompt was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.reference import quantize_per_token_ref


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
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    length: int,
    scaling: float,
    advance: bool,
) -> Tensor:
    """Rotate, store and attend, for one token a row; see `attention_ops.decode_attention`."""
    batch = len(query)
    query, key = rotate_ref(query, cos, sin), rotate_ref(key, cos, sin)
    rows, places = torch.arange(batch, device=query.device), cells.expand(batch)
    seen = torch.arange(length, device=query.device) < places[:, None]  # [B, length]; the new token stands apart
    if mask is not None:
        seen = seen & mask
    states = []
    for buffer, scale, new in ((keys, key_scale, key), (values, value_scale, value)):
        _store(buffer, scale, rows, places, new)
        own = _read(buffer[rows, :, places], None if scale is None else scale[rows, :, places])  # [B, Hk, D]
        states.append(torch.cat((_read(buffer[:batch, :, :length], _cut(scale, batch, length)), own[:, :, None]), 2))
    shown = torch.cat((seen, seen.new_ones(batch, 1)), dim=1)
    out = _attend(query[:, None], states[0], states[1], shown[:, None], scaling)[:, 0]
    if advance:
        cells.add_(1)
    return out


def prompt_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
    mask: Tensor | None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    length: int,
    scaling: float,
    advance: bool,
) -> Tensor:
    """Rotate, store and attend, for several tokens a row; see `attention_ops.prompt_attention`."""
    batch, tokens = query.shape[:2]
    query, key = rotate_ref(query, cos, sin), rotate_ref(key, cos, sin)
    places = (cells + torch.arange(tokens, device=query.device)).expand(batch, -1) if cells.dim() == 1 else cells
    rows = torch.arange(batch, device=query.device) if rows is None else rows
    states = []
    for buffer, scale, new in ((keys, key_scale, key), (values, value_scale, value)):
        _store(buffer, scale, rows[:, None], places, new)
        states.append(_read(buffer[rows, :, :length], None if scale is None else scale[rows, :, :length]))
    seen = torch.arange(length, device=query.device) <= places[..., None]  # [B, T, length]
    if mask is not None:
        seen = seen & mask
    out = _attend(query, states[0], states[1], seen, scaling)
    if advance:
        cells.add_(tokens)
    return out


def _store(buffer: Tensor, scale: Tensor | None, rows: Tensor, places: Tensor, states: Tensor) -> None:
    """Write `[B, ..., H, D]` into cells of rows, as codes with their scales where there are any."""
    if scale is None:
        buffer[rows, :, places] = states
    else:
        buffer[rows, :, places], found = quantize_per_token_ref(states)
        scale[rows, :, places] = found[..., 0]


def _read(buffer: Tensor, scale: Tensor | None) -> Tensor:
    """Return what a buffer stands for, in float32."""
    return buffer.float() if scale is None else buffer.float() * scale[..., None]


def _cut(scale: Tensor | None, rows: int, length: int) -> Tensor | None:
    return None if scale is None else scale[:rows, :, :length]


def _attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """Attend from `[B, T, Hq, D]` to `[B, Hk, S, D]` where `seen` `[B, T, S]` says so; zeros where nothing is seen."""
    batch, tokens, heads, size = query.shape
    wide = query.float().unflatten(2, (keys.shape[1], -1))  # [B, T, Hk, group, D]
    scores = torch.einsum("bthgd,bhsd->bthgs", wide, keys) * scaling
    shares = scores.masked_fill(~seen[:, :, None, None], -torch.inf).softmax(dim=-1)
    shares = torch.where(seen.any(-1)[:, :, None, None, None], shares, 0)
    values = torch.where(seen.any(1)[:, None, :, None], values, 0)  # unseen cells hold anything, and 0 times NaN is NaN
    return torch.einsum("bthgs,bhsd->bthgd", shares, values).reshape(batch, tokens, heads, size).to(query.dtype)
