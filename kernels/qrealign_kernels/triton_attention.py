"""Triton kernels of attention over a cache of fixed size: one new token a row, and the tokens of prompts.

Both read the cells that are seen and no others, whose number is known on the device only. A cache of int8 codes is
widened in registers: codes are exact in bfloat16, a key's scale multiplies its scores and a value's scale its weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches, reference_attention
from qrealign_kernels.reference import ZERO_SCALE_REPLACEMENT, code_range
from qrealign_kernels.reference_attention import CachePlace, TokenStates
from qrealign_kernels.triton_common import on_device_of
from qrealign_kernels.triton_math import (
    FLOAT_KINDS,
    FP_FUSION,
    INTERPRETED,
    clip,
    convert,
    largest_magnitude,
    round_half_even,
    round_to,
    to_int8,
)
from qrealign_kernels.triton_overlap import overlap, wait_for_inputs

MOST_HEADS = 64  # of queries that share a key: their scores with a tile of keys are held at once
_LEAST_ROWS = 16  # of a tile for the tensor cores; the memory sets the pace, so that empty rows cost nothing

_ROW_BYTES = 256  # of the heads that the launch tables are for: tiles of wider ones hold fewer cells
_QMIN, _QMAX = (tl.constexpr(float(bound)) for bound in code_range(8))
_ZERO_SCALE = tl.constexpr(ZERO_SCALE_REPLACEMENT)


@triton.jit
def _rotated(x_ptr, offsets, o_d, b_cos, b_sin, mask, D: tl.constexpr, KIND: tl.constexpr):
    """Return heads `[H, D]` at `offsets` `[H, 1]`, turned by `[1 or H, D]` as `reference_attention.rotate_ref` does."""
    partner = tl.where(o_d < D // 2, o_d + D // 2, o_d - D // 2)
    b_x = tl.load(x_ptr + offsets + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_other = tl.load(x_ptr + offsets + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    b_other = tl.where((o_d < D // 2)[None, :], -b_other, b_other)
    return round_to(round_to(b_x * b_cos, KIND) + round_to(b_other * b_sin, KIND), KIND)


@triton.jit
def _encoded(b_x):
    """Return the codes of heads `[H, D]` as float32, and their scales `[H]`, as `reference.quantize_per_token_ref`."""
    scale = tl.div_rn(largest_magnitude(b_x, 1), (_QMAX - _QMIN) * 0.5)
    scale = tl.where(scale == 0.0, _ZERO_SCALE, scale)
    return clip(round_half_even(tl.div_rn(b_x, scale[:, None])), _QMIN, _QMAX), scale


@triton.jit
def _stored(b_x, buffer_ptr, scale_ptr, cells, scale_cells, o_d, mask, m_h, CODES: tl.constexpr):
    """Store heads `[H, D]` at the offsets `[H, 1]` of cells; return what reading them gives."""
    if CODES:
        b_codes, b_scale = _encoded(b_x)
        tl.store(buffer_ptr + cells + o_d[None, :], to_int8(b_codes), mask=mask)
        tl.store(scale_ptr + scale_cells, b_scale, mask=m_h)
        b_x = b_codes * b_scale[:, None]
    else:
        tl.store(buffer_ptr + cells + o_d[None, :], convert(b_x, buffer_ptr.dtype.element_ty), mask=mask)
    return b_x


@triton.jit
def _seen_more(
    b_query, b_keys, b_values, key_scale_ptr, value_scale_ptr, scale_cells, seen, top, total, acc, scaling, m_s,
    CODES: tl.constexpr,
):  # fmt: skip
    """Add a tile of cells to what the queries have seen: the highest score, the sum of weights, weighted values.

    Weights meet the values in the query's dtype, as in the attention of libraries.
    """
    element: tl.constexpr = b_query.dtype
    if CODES:
        wide: tl.constexpr = tl.float32 if INTERPRETED else element  # it takes integers for the bits of bfloat16
        b_keys, b_values = b_keys.to(wide), b_values.to(wide)
    scores = _product(b_query, tl.trans(b_keys)) * scaling  # [queries, BLOCK_S]
    if CODES:
        scores *= tl.load(key_scale_ptr + scale_cells, mask=m_s, other=0.0)[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing was seen yet: all weights are 0
    shrink = tl.exp(top - anchor)
    weights = tl.exp(scores - anchor[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    if CODES:
        weights *= tl.load(value_scale_ptr + scale_cells, mask=m_s, other=0.0)[None, :]
    acc = acc * shrink[:, None] + _product(convert(weights, element), b_values)
    return higher, total, acc


@triton.jit
def _product(a, b):
    if INTERPRETED:  # it multiplies the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _decode_attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, cells_ptr,
    mask_ptr, part_ptr, top_ptr, sum_ptr, length, scaling, stride_qb, stride_kb, stride_vb, stride_cosb, stride_sinb,
    stride_keysb, stride_keysh, stride_keyss, stride_valuesb, stride_valuesh, stride_valuess, stride_scale, stride_cb,
    stride_mb,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    HAS_MASK: tl.constexpr, CODES: tl.constexpr, KIND: tl.constexpr, OVERLAP: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Attend from the query heads of one key head to one of SPLITS runs of its row's cells.

    The first run holds the new token too, whose key and value it stores: no program reads what another one writes.
    Leaves the weighted values, and the maximum and the sum of the weights, in float32.
    """
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    h = (tl.program_id(0) % HEADS).to(tl.int64)  # times a stride: long buffers of many heads pass 2**31
    split = tl.program_id(1)
    o_d, o_g = tl.arange(0, DP), tl.arange(0, GROUP_P)
    m_d = o_d < D
    m_q = (o_g < GROUP)[:, None] & m_d[None, :]
    wait_for_inputs(OVERLAP)
    cell = tl.load(cells_ptr + b * stride_cb)
    b_cos = tl.load(cos_ptr + b * stride_cosb + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_sin = tl.load(sin_ptr + b * stride_sinb + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    heads = b * stride_qb + (h * GROUP + o_g)[:, None] * D
    b_query = _rotated(query_ptr, heads, o_d, b_cos, b_sin, m_q, D, KIND)  # [GROUP_P, DP]
    keys_ptr += b * stride_keysb + h * stride_keysh
    values_ptr += b * stride_valuesb + h * stride_valuesh
    key_scale_ptr += (b * HEADS + h) * stride_scale
    value_scale_ptr += (b * HEADS + h) * stride_scale
    top = tl.full([GROUP_P], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    acc = tl.zeros([GROUP_P, DP], tl.float32)
    if split == 0:
        one, m_one = tl.zeros([1, 1], tl.int64), tl.full([1], True, tl.int1)
        at = cell + tl.zeros([1], tl.int64)
        b_key = _rotated(key_ptr, b * stride_kb + h * D + one, o_d, b_cos, b_sin, m_d[None, :], D, KIND)  # [1, DP]
        b_value = tl.load(value_ptr + b * stride_vb + h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_key = _stored(b_key, keys_ptr, key_scale_ptr, at[:, None] * stride_keyss, at, o_d, m_d[None, :], m_one, CODES)
        b_value = _stored(
            b_value, values_ptr, value_scale_ptr, at[:, None] * stride_valuess, at, o_d, m_d[None, :], m_one, CODES
        )
        top = tl.sum(b_query * b_key, axis=1) * scaling
        total += 1.0
        acc += b_value
    end = tl.minimum(cell, length).to(tl.int32)
    run = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_S) * BLOCK_S
    last = tl.minimum((split + 1) * run, end)
    b_query = convert(b_query, query_ptr.dtype.element_ty)
    for start in range(split * run, last, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < last
        m_kv = m_s[:, None] & m_d[None, :]
        places = o_s.to(tl.int64)[:, None]
        b_keys = tl.load(keys_ptr + places * stride_keyss + o_d[None, :], mask=m_kv, other=0)
        b_values = tl.load(values_ptr + places * stride_valuess + o_d[None, :], mask=m_kv, other=0)
        seen = m_s
        if HAS_MASK:
            seen = tl.load(mask_ptr + b * stride_mb + o_s, mask=m_s, other=0) != 0
        top, total, acc = _seen_more(
            b_query, b_keys, b_values, key_scale_ptr, value_scale_ptr, o_s, seen[None, :], top, total, acc, scaling,
            m_s, CODES,
        )  # fmt: skip
    part = (tl.program_id(0) * GROUP + o_g) * SPLITS + split  # [GROUP_P], of [B, query heads, SPLITS]
    tl.store(part_ptr + part.to(tl.int64)[:, None] * D + o_d[None, :], acc, mask=m_q)
    tl.store(top_ptr + part, top, mask=o_g < GROUP)
    tl.store(sum_ptr + part, total, mask=o_g < GROUP)


@triton.jit
def _join_attention_fwd_kernel(
    part_ptr, top_ptr, sum_ptr, out_ptr, cells_ptr,
    D: tl.constexpr, DP: tl.constexpr, ADVANCE: tl.constexpr, OVERLAP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Put the runs of one query head together; the first program moves the cell on, which nothing reads any more."""
    wait_for_inputs(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    o_d, o_s = tl.arange(0, DP), tl.arange(0, SPLITS)
    m_d = o_d < D
    tops = tl.load(top_ptr + head * SPLITS + o_s)
    weights = tl.exp(tops - tl.max(tops, axis=0))
    total = tl.sum(weights * tl.load(sum_ptr + head * SPLITS + o_s), axis=0)
    parts = tl.load(part_ptr + (head * SPLITS + o_s)[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)
    b_out = tl.sum(parts * weights[:, None], axis=0) / total
    tl.store(out_ptr + head * D + o_d, convert(b_out, out_ptr.dtype.element_ty), mask=m_d)
    if ADVANCE:
        tl.store(cells_ptr, tl.load(cells_ptr) + 1, mask=head == 0)


@triton.jit
def _cells_of(cells_ptr, b, o_t, m_t, stride_cb, FROM_FIRST: tl.constexpr):
    """Return the cells of tokens of a row: given one by one, or counted from the first token's."""
    if FROM_FIRST:
        return tl.load(cells_ptr) + o_t
    else:
        return tl.load(cells_ptr + b * stride_cb + o_t, mask=m_t, other=-1)


@triton.jit
def _store_states_fwd_kernel(
    key_ptr, value_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, cells_ptr, rows_ptr,
    tokens, stride_kb, stride_kt, stride_vb, stride_vt, stride_cosb, stride_cost, stride_sinb, stride_sint,
    stride_keysb, stride_keysh, stride_keyss, stride_valuesb, stride_valuesh, stride_valuess, stride_scale, stride_cb,
    HEADS: tl.constexpr, HEADS_P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    FROM_FIRST: tl.constexpr, HAS_ROWS: tl.constexpr, CODES: tl.constexpr, KIND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Turn the keys of one token and store them and its values."""
    b, t = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    o_d, o_h = tl.arange(0, DP), tl.arange(0, HEADS_P)
    m_d, m_h = o_d < D, o_h < HEADS
    mask = m_h[:, None] & m_d[None, :]
    wait_for_inputs(OVERLAP)
    cell = _cells_of(cells_ptr, b, t, t < tokens, stride_cb, FROM_FIRST)
    row = tl.load(rows_ptr + b) if HAS_ROWS else b
    b_cos = tl.load(cos_ptr + b * stride_cosb + t * stride_cost + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_sin = tl.load(sin_ptr + b * stride_sinb + t * stride_sint + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    heads, wide_h = o_h[:, None] * D, o_h.to(tl.int64)
    b_key = _rotated(key_ptr, b * stride_kb + t * stride_kt + heads, o_d, b_cos, b_sin, mask, D, KIND)
    values = value_ptr + b * stride_vb + t * stride_vt + heads + o_d[None, :]
    b_value = tl.load(values, mask=mask, other=0.0).to(tl.float32)
    keys = row * stride_keysb + wide_h[:, None] * stride_keysh + cell * stride_keyss
    _stored(b_key, keys_ptr, key_scale_ptr, keys, (row * HEADS + wide_h) * stride_scale + cell, o_d, mask, m_h, CODES)
    keys = row * stride_valuesb + wide_h[:, None] * stride_valuesh + cell * stride_valuess
    _stored(
        b_value, values_ptr, value_scale_ptr, keys, (row * HEADS + wide_h) * stride_scale + cell, o_d, mask, m_h, CODES
    )


@triton.jit
def _prompt_attention_fwd_kernel(
    query_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, cells_ptr, mask_ptr, rows_ptr,
    out_ptr, tokens, length, scaling, stride_qb, stride_qt, stride_cosb, stride_cost, stride_sinb, stride_sint,
    stride_keysb, stride_keysh, stride_keyss, stride_valuesb, stride_valuesh, stride_valuess, stride_scale, stride_cb,
    stride_mb, stride_mt,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    FROM_FIRST: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ROWS: tl.constexpr, CODES: tl.constexpr, KIND: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_T tokens of one query head to the cells up to their last one (arXiv 2307.08691, algorithm 1).

    Late tokens see the most cells, so that their tiles start first.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (tl.program_id(1) // (HEADS * GROUP)).to(tl.int64)
    head = tl.program_id(1) % (HEADS * GROUP)
    h = (head // GROUP).to(tl.int64)
    o_t, o_d = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, DP)
    m_t, m_d = o_t < tokens, o_d < D
    m_q = m_t[:, None] & m_d[None, :]
    wide_t = o_t.to(tl.int64)[:, None]
    wait_for_inputs(OVERLAP)
    cells = tl.where(m_t, _cells_of(cells_ptr, b, o_t, m_t, stride_cb, FROM_FIRST), -1)
    row = tl.load(rows_ptr + b) if HAS_ROWS else b
    b_cos = tl.load(cos_ptr + b * stride_cosb + wide_t * stride_cost + o_d[None, :], mask=m_q, other=0.0)
    b_sin = tl.load(sin_ptr + b * stride_sinb + wide_t * stride_sint + o_d[None, :], mask=m_q, other=0.0)
    heads = b * stride_qb + wide_t * stride_qt + head * D
    b_query = _rotated(query_ptr, heads, o_d, b_cos.to(tl.float32), b_sin.to(tl.float32), m_q, D, KIND)
    b_query = convert(b_query, query_ptr.dtype.element_ty)  # [BLOCK_T, DP]
    keys_ptr += row * stride_keysb + h * stride_keysh
    values_ptr += row * stride_valuesb + h * stride_valuesh
    key_scale_ptr += (row * HEADS + h) * stride_scale
    value_scale_ptr += (row * HEADS + h) * stride_scale
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, DP], tl.float32)
    end = tl.minimum(tl.max(cells, axis=0) + 1, length).to(tl.int32)
    for start in range(0, end, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < end
        m_kv = m_s[:, None] & m_d[None, :]
        places = o_s.to(tl.int64)[:, None]
        b_keys = tl.load(keys_ptr + places * stride_keyss + o_d[None, :], mask=m_kv, other=0)
        b_values = tl.load(values_ptr + places * stride_valuess + o_d[None, :], mask=m_kv, other=0)
        seen = (o_s[None, :] <= cells[:, None]) & m_s[None, :]
        if HAS_MASK:
            shown = mask_ptr + b * stride_mb + wide_t * stride_mt + o_s[None, :]
            seen = seen & (tl.load(shown, mask=seen & m_t[:, None], other=0) != 0)
        top, total, acc = _seen_more(
            b_query, b_keys, b_values, key_scale_ptr, value_scale_ptr, o_s, seen, top, total, acc, scaling, m_s, CODES
        )
    b_out = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a token that sees nothing gets zeros
    out = out_ptr + (b * tokens + wide_t) * (HEADS * GROUP * D) + head * D + o_d[None, :]
    tl.store(out, convert(b_out, out_ptr.dtype.element_ty), mask=m_q)


def decode_attention(states: TokenStates, place: CachePlace, mask: Tensor | None, scaling: float) -> Tensor:
    """Compute `reference_attention.decode_attention_ref`."""
    batch, heads, size = states.query.shape
    groups = states.key.shape[1]
    if heads // groups > MOST_HEADS or batch == 0:
        return reference_attention.decode_attention_ref(states, place, mask, scaling)
    query, key, value, cos, sin = states = _together(states)
    cells, device = place.cells, query.device
    codes = "" if place.key_scale is None else "-codes"
    key_of_launch = f"p{triton.next_power_of_2(batch * groups)}{codes}"
    choice = _fitting(launches.choice("decode_attention", key_of_launch, device), query)
    splits = choice["SPLITS"]
    part = torch.empty(batch * heads * splits, size, dtype=torch.float32, device=device)
    top, total = torch.empty(2, batch * heads * splits, dtype=torch.float32, device=device)
    out = torch.empty(batch, heads, size, dtype=query.dtype, device=device)
    with on_device_of(query):
        _decode_attention_fwd_kernel[(batch * groups, splits)](
            query, key, value, cos, sin, *_buffers(place), cells, cells if mask is None else mask, part, top, total,
            place.length, scaling, query.stride(0), key.stride(0), value.stride(0), cos.stride(0), sin.stride(0),
            *_cache_strides(place), 0 if len(cells) == 1 else cells.stride(0), 0 if mask is None else mask.stride(0),
            GROUP=heads // groups, GROUP_P=max(_LEAST_ROWS, triton.next_power_of_2(heads // groups)),
            HAS_MASK=mask is not None, **_constants(states, place), **choice,
        )  # fmt: skip
        _join_attention_fwd_kernel[(batch * heads,)](
            part, top, total, out, cells, D=size, DP=_padded(size), ADVANCE=place.advance, SPLITS=splits,
            **overlap(device), **launches.choice("join_attention", launches.DEFAULT, device),
        )  # fmt: skip
    return out


def prompt_attention(states: TokenStates, place: CachePlace, mask: Tensor | None, scaling: float) -> Tensor:
    """Compute `reference_attention.prompt_attention_ref`."""
    batch, tokens, heads, size = states.query.shape
    groups = states.key.shape[2]
    out = torch.empty(batch, tokens, heads, size, dtype=states.query.dtype, device=states.query.device)
    if out.numel() == 0:
        return out
    query, key, value, cos, sin = states = _together(states)
    cells, device = place.cells, query.device
    codes = "plain" if place.key_scale is None else "codes"
    choice = _fitting(launches.choice("prompt_attention", codes, device), query)
    rows = cells if place.rows is None else place.rows  # not read where there are none
    turns = (*cos.stride()[:2], *sin.stride()[:2])
    strides = (*_cache_strides(place), 0 if cells.dim() == 1 else cells.stride(0))
    common = {"FROM_FIRST": cells.dim() == 1, "HAS_ROWS": place.rows is not None, **_constants(states, place)}
    with on_device_of(query):
        _store_states_fwd_kernel[(batch * tokens,)](
            key, value, cos, sin, *_buffers(place), cells, rows, tokens, *key.stride()[:2], *value.stride()[:2],
            *turns, *strides, HEADS_P=triton.next_power_of_2(groups), **common,
            **launches.choice("store_states", launches.DEFAULT, device),
        )  # fmt: skip
        _prompt_attention_fwd_kernel[(triton.cdiv(tokens, choice["BLOCK_T"]), batch * heads)](
            query, cos, sin, *_buffers(place), cells, cells if mask is None else mask, rows, out, tokens, place.length,
            scaling, *query.stride()[:2], *turns, *strides, *((0, 0) if mask is None else mask.stride()[:2]),
            GROUP=heads // groups, HAS_MASK=mask is not None, **common, **choice,
        )  # fmt: skip
    if place.advance:
        cells.add_(tokens)
    return out


def _together(states: TokenStates) -> TokenStates:
    """Return states whose heads lie one behind the other in each row, as the channels of a turn do: mostly views."""
    heads = (
        one if one.stride()[-2:] == (one.shape[-1], 1) else one.contiguous()
        for one in (states.query, states.key, states.value)
    )
    turns = (turn if turn.stride(-1) == 1 else turn.contiguous() for turn in (states.cos, states.sin))
    return TokenStates(*heads, *turns)


def _padded(size: int) -> int:
    return max(_LEAST_ROWS, int(triton.next_power_of_2(size)))


def _fitting(choice: launches.Choice, query: Tensor) -> launches.Choice:
    """Return a launch whose tiles of heads of this width take no more memory than those it was made for."""
    wider = max(1, _padded(query.shape[-1]) * query.element_size() // _ROW_BYTES)
    return {
        name: max(_LEAST_ROWS, value // wider) if name.startswith("BLOCK") else value for name, value in choice.items()
    }


def _buffers(place: CachePlace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what kernels get as buffers and scales: other pointers, which they do not read, where there are none."""
    keys, values, key_scale, value_scale = place.keys, place.values, place.key_scale, place.value_scale
    return keys, values, keys if key_scale is None else key_scale, values if value_scale is None else value_scale


def _cache_strides(place: CachePlace) -> tuple[int, ...]:
    """Return the strides of the buffers, and the cells of a head that the scales are apart."""
    return (*place.keys.stride()[:3], *place.values.stride()[:3], place.keys.shape[2])


def _constants(states: TokenStates, place: CachePlace) -> dict[str, Any]:
    """Return what the kernels that read or store states are compiled for, launches aside."""
    query = states.query
    return {
        "HEADS": states.key.shape[-2],
        "D": query.shape[-1],
        "DP": _padded(query.shape[-1]),
        "CODES": place.key_scale is not None,
        "KIND": FLOAT_KINDS[query.dtype],
        "enable_fp_fusion": FP_FUSION,
        **overlap(query.device),
    }
