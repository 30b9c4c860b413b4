"""Pure-PyTorch definitions of attention over a cache of fixed size, in 16 bits or as int8 codes.

Every step is rounded to the tensors' dtype where Hugging Face's blocks round it; sums are in float32. New keys and
values are stored first and read back from the cache, so that what a token sees does not depend on how a prompt was cut.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qrealign_kernels.reference import quantize_per_token_ref


class TokenStates(NamedTuple):
    """What new tokens bring to attention: float32, float16 or bfloat16, all of one dtype.

    query: `[..., Hq, D]`, D even; in front `[B]` for one token a row, `[B, T]` for several.
    key, value: `[..., Hk, D]`, Hk a divisor of Hq: heads of queries that stand together share one.
    cos, sin: `[..., D]` of a rotary embedding in the split-half layout; rows may be one row expanded.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor


class CachePlace(NamedTuple):
    """Where new tokens go in a layer's cache, and what they may read.

    keys, values: `[rows, Hk, S, D]` in the tokens' dtype or int8, the last dimension contiguous.
    cells: int64, each in `[0, S)`: one for each token, `[B]` or `[B, T]`; or `[1]`, the first token's in every row,
        with the others behind it.
    length: cells that may be read, at most S.
    key_scale, value_scale: `[rows, Hk, S]` float32, contiguous, where the buffers hold int8 codes; else None.
    rows: `[B]` int64, all different; None for the first ones.
    advance: whether `cells`, `[1]`, is moved on behind the tokens.
    """

    keys: Tensor
    values: Tensor
    cells: Tensor
    length: int
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    rows: Tensor | None = None
    advance: bool = False


def rotate_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channels j and j + D / 2 of `[..., H, D]` heads by the angles behind cos and sin, `[..., D]`."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[..., None, :] + torch.cat((-high, low), dim=-1) * sin[..., None, :]


def decode_attention_ref(states: TokenStates, place: CachePlace, mask: Tensor | None, scaling: float) -> Tensor:
    """Rotate, store and attend, for one token a row; see `attention_ops.decode_attention`."""
    batch, device = len(states.query), states.query.device
    rows, cells = torch.arange(batch, device=device), place.cells.expand(batch)
    seen = torch.arange(place.length, device=device) < cells[:, None]  # [B, length]; the new token stands apart
    if mask is not None:
        seen = seen & mask
    query, *new = _rotated(states)
    read = []
    for (buffer, scale), heads in zip(_buffers(place), new, strict=True):
        _store(buffer, scale, rows, cells, heads)
        own = _read(buffer, scale, (rows, slice(None), cells))  # [B, Hk, D]
        others = _read(buffer, scale, (slice(batch), slice(None), slice(place.length)))
        read.append(torch.cat((others, own[:, :, None]), dim=2))
    shown = torch.cat((seen, seen.new_ones(batch, 1)), dim=1)
    out = _attend(query[:, None], read[0], read[1], shown[:, None], scaling)[:, 0]
    if place.advance:
        place.cells.add_(1)
    return out


def prompt_attention_ref(states: TokenStates, place: CachePlace, mask: Tensor | None, scaling: float) -> Tensor:
    """Rotate, store and attend, for several tokens a row; see `attention_ops.prompt_attention`."""
    (batch, tokens), device = states.query.shape[:2], states.query.device
    rows = torch.arange(batch, device=device) if place.rows is None else place.rows
    cells = place.cells
    if cells.dim() == 1:
        cells = (cells + torch.arange(tokens, device=device)).expand(batch, -1)
    seen = torch.arange(place.length, device=device) <= cells[..., None]  # [B, T, length]
    if mask is not None:
        seen = seen & mask
    query, *new = _rotated(states)
    read = []
    for (buffer, scale), heads in zip(_buffers(place), new, strict=True):
        _store(buffer, scale, rows[:, None], cells, heads)
        read.append(_read(buffer, scale, (rows, slice(None), slice(place.length))))
    out = _attend(query, read[0], read[1], seen, scaling)
    if place.advance:
        place.cells.add_(tokens)
    return out


def _rotated(states: TokenStates) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys turned, and the values."""
    query, key = (rotate_ref(heads, states.cos, states.sin) for heads in (states.query, states.key))
    return query, key, states.value


def _buffers(place: CachePlace) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    return (place.keys, place.key_scale), (place.values, place.value_scale)


def _store(buffer: Tensor, scale: Tensor | None, rows: Tensor, cells: Tensor, states: Tensor) -> None:
    """Write `[B, ..., H, D]` into cells of rows, as codes with their scales where there are any."""
    if scale is None:
        buffer[rows, :, cells] = states
    else:
        buffer[rows, :, cells], found = quantize_per_token_ref(states)
        scale[rows, :, cells] = found[..., 0]


def _read(buffer: Tensor, scale: Tensor | None, at: tuple[Tensor | slice, ...]) -> Tensor:
    """Return what cells of a buffer stand for, in float32."""
    return buffer[at].float() if scale is None else buffer[at].float() * scale[at][..., None]


def _attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """Attend from `[B, T, Hq, D]` to `[B, Hk, S, D]` where `seen` `[B, T, S]` says so; zeros where nothing is seen."""
    batch, tokens, heads, size = query.shape
    wide = query.float().unflatten(2, (keys.shape[1], -1))  # [B, T, Hk, group, D]
    scores = torch.einsum("bthgd,bhsd->bthgs", wide, keys) * scaling
    shares = scores.masked_fill(~seen[:, :, None, None], -torch.inf).softmax(dim=-1)
    shares = torch.where(seen.any(-1)[:, :, None, None, None], shares, 0)
    values = torch.where(seen.any(1)[:, None, :, None], values, 0)  # unseen cells hold anything, and 0 times NaN is NaN
    return torch.einsum("bthgs,bhsd->bthgd", shares, values).reshape(batch, tokens, heads, size).to(query.dtype)
