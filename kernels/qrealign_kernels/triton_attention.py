"""Triton kernels of attention for one new token a sequence: many programs read the cache at once, a chunk each.

With one token a sequence there are as many programs as key-value heads, too few to fill a GPU. So each takes one chunk
of the cache and leaves an unfinished softmax: the sum of its shares, their largest exponent, and the weighted values; a
second kernel joins them. Chunks where nothing is visible are not read. Launch choices have the key "default": CHUNK
positions a program, BLOCK_S of them at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches
from qrealign_kernels.triton_common import on_device_of

_LOG2_E = 1.4426950408889634
_ROWS = tl.constexpr(16)  # query heads of a tile: the least that a matrix unit takes


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Compute `reference_attention.decode_attention_ref`."""
    batch, heads, size = query.shape
    _, kv_heads, length, _ = key.shape
    choice = launches.choice("decode_attention", launches.DEFAULT, query.device)
    query = query if query.stride(-1) == 1 else query.contiguous()
    key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (key, value))
    chunks = triton.cdiv(length, choice["CHUNK"])
    tiles = triton.cdiv(heads // kv_heads, _ROWS.value)
    parts = torch.empty(batch, heads, chunks, size, dtype=torch.float32, device=query.device)
    ends = torch.empty(2, batch, heads, chunks, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, size, dtype=query.dtype, device=query.device)
    width = max(16, triton.next_power_of_2(size))
    with on_device_of(query):
        _decode_attention_chunk_fwd_kernel[(batch * kv_heads * tiles, chunks)](
            query, key, value, mask if mask is None else mask.view(torch.uint8), parts, ends,
            kv_heads, heads // kv_heads, tiles, length, size, chunks, scaling * _LOG2_E,
            query.stride(0), query.stride(1),
            key.stride(0), key.stride(1), key.stride(2),
            value.stride(0), value.stride(1), value.stride(2),
            0 if mask is None else mask.stride(0), 0 if mask is None else mask.stride(1),
            HAS_MASK=mask is not None, WIDTH=width, **choice,
        )  # fmt: skip
        _decode_attention_join_fwd_kernel[(batch * heads,)](
            parts, ends, out, batch * heads, size, chunks, WIDTH=width, CHUNKS=triton.next_power_of_2(chunks),
            **launches.choice("decode_attention_join", launches.DEFAULT, query.device),
        )  # fmt: skip
    return out


@triton.jit
def _decode_attention_chunk_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, part_ptr, end_ptr,
    kv_heads, group, tiles, S, D, chunks, scaling,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_mb, stride_ms,
    HAS_MASK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One chunk of one key-value head: shares `2**(score - largest)`, their sum, and the values weighed by them."""
    place = tl.program_id(0)
    tile, place = place % tiles, place // tiles
    head, b = place % kv_heads, (place // kv_heads).to(tl.int64)
    chunk = tl.program_id(1)
    o_h = tile * _ROWS + tl.arange(0, _ROWS)  # query heads within the group
    o_d = tl.arange(0, WIDTH)
    m_h, m_d = o_h < group, o_d < D
    o_q = b * stride_qb + (head * group + o_h)[:, None].to(tl.int64) * stride_qh + o_d[None, :]
    b_q = tl.load(q_ptr + o_q, mask=m_h[:, None] & m_d[None, :], other=0.0)  # [_ROWS, WIDTH]
    largest = tl.full([_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([_ROWS], tl.float32)
    acc = tl.zeros([_ROWS, WIDTH], tl.float32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, S), BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        visible = o_s < S
        if HAS_MASK:
            visible &= tl.load(mask_ptr + b * stride_mb + o_s * stride_ms, mask=visible, other=0) != 0
        if tl.max(visible.to(tl.int32), axis=0) > 0:
            m_s = visible[:, None] & m_d[None, :]
            o_k = b * stride_kb + head.to(tl.int64) * stride_kh + o_s[:, None].to(tl.int64) * stride_ks + o_d[None, :]
            b_k = tl.load(k_ptr + o_k, mask=m_s, other=0.0)  # [BLOCK_S, WIDTH]
            o_v = b * stride_vb + head.to(tl.int64) * stride_vh + o_s[:, None].to(tl.int64) * stride_vs + o_d[None, :]
            b_v = tl.load(v_ptr + o_v, mask=m_s, other=0.0)
            scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scaling  # [_ROWS, BLOCK_S]
            scores = tl.where(visible[None, :], scores, -float("inf"))
            before, largest = largest, tl.maximum(largest, tl.max(scores, axis=1))
            shares = tl.exp2(scores - largest[:, None])
            shrink = tl.exp2(before - largest)
            total = total * shrink + tl.sum(shares, axis=1)
            acc = acc * shrink[:, None] + tl.dot(shares.to(b_v.dtype), b_v, input_precision="ieee")
    row = (b * kv_heads * group + head * group + o_h) * chunks + chunk  # [_ROWS]
    tl.store(part_ptr + row[:, None] * D + o_d[None, :], acc, mask=m_h[:, None] & m_d[None, :])
    rows = tl.num_programs(0).to(tl.int64) // tiles * group * chunks
    tl.store(end_ptr + row, largest, mask=m_h)
    tl.store(end_ptr + rows + row, total, mask=m_h)


@triton.jit
def _decode_attention_join_fwd_kernel(
    part_ptr, end_ptr, out_ptr, rows, D, chunks, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):
    """One query head: its chunks' softmaxes joined."""
    row = tl.program_id(0).to(tl.int64)
    o_c, o_d = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    m_c, m_d = o_c < chunks, o_d < D
    largest = tl.load(end_ptr + row * chunks + o_c, mask=m_c, other=-float("inf"))
    totals = tl.load(end_ptr + (rows + row) * chunks + o_c, mask=m_c, other=0.0)
    top = tl.max(largest, axis=0)
    weight = tl.where(largest == -float("inf"), 0.0, tl.exp2(largest - top))  # [CHUNKS]
    parts = tl.load(
        part_ptr + (row * chunks + o_c)[:, None] * D + o_d[None, :], mask=m_c[:, None] & m_d[None, :], other=0.0
    )
    total = tl.sum(totals * weight, axis=0)
    values = tl.sum(parts * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + o_d, values.to(out_ptr.dtype.element_ty), mask=m_d)
