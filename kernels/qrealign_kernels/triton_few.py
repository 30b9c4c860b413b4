"""Triton kernels of packed products for 2 to 64 tokens: tensor cores, with a split of K inside a program.

The weight is the left operand, so that tokens fill the narrow side of the tensor core's tile. `SPLIT` slices of columns
are multiplied side by side by the warps of a program, as a batched `tl.dot`, and added at its end: memory sees many
loads in flight, and the result needs no second launch and has the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qrealign_kernels.layouts import BLOCK, PLANE
from qrealign_kernels.triton_decode import wait_for_inputs

_BLOCK = tl.constexpr(BLOCK)
_PLANE = tl.constexpr(PLANE)


@triton.jit
def plane_of(words, plane: tl.constexpr):
    """Return the unsigned nibbles of one plane, as int32."""
    return (words >> (8 * (plane % 4) + 4 * (plane // 4))) & 0xF


@triton.jit
def to_half(nibbles, zero, HALF: tl.constexpr):
    """Return `nibbles - 8 - zero` in bfloat16 or float16: planted into a mantissa, because conversions are slow."""
    if tl.bfloat16 == HALF:
        planted = (nibbles | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)  # 128 + nibble
        base: tl.constexpr = 136.0
    elif tl.float16 == HALF:
        planted = (nibbles | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)  # 1024 + nibble
        base: tl.constexpr = 1032.0
    else:
        planted = nibbles.to(tl.float32)
        base: tl.constexpr = 8.0
    return planted - (zero + base).to(HALF)


@triton.jit
def store_transposed(out_ptr, bias_ptr, n, m, N, M, values, HAS_BIAS: tl.constexpr):
    """Store `values` `[len(n), len(m)]` as rows m of the output."""
    if HAS_BIAS:
        values += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out_ptr + m.to(tl.int64)[None, :] * N + n[:, None], values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _int8_few_fwd_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, K, KP,
    INTEGER: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x `[M, K]`, int8 codes (INTEGER) or floating point, by w `[N, KP]` int8. EVEN: SPLIT * BLOCK_K divides K."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, SPLIT)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    m_n = (n < N)[None, :, None]
    m_m = (m < M)[None, :, None]
    w_ptrs = w_ptr + n[None, :, None] * KP + o_k  # [SPLIT, BLOCK_N, BLOCK_K]
    x_ptrs = x_ptr + m[None, :, None] * K + o_k  # [SPLIT, BLOCK_M, BLOCK_K]
    wait_for_inputs(OVERLAP)
    acc = tl.zeros([SPLIT, BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, SPLIT * BLOCK_K):
        if EVEN:
            b_w = tl.load(w_ptrs + start, mask=m_n, other=0)
            b_x = tl.load(x_ptrs + start, mask=m_m, other=0)
        else:
            b_w = tl.load(w_ptrs + start, mask=m_n & (start + o_k < KP), other=0)
            b_x = tl.load(x_ptrs + start, mask=m_m & (start + o_k < K), other=0)
        b_x = tl.permute(b_x, (0, 2, 1))
        if INTEGER:
            acc = tl.dot(b_w, b_x, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(b_w.to(x_ptr.dtype.element_ty), b_x, acc, input_precision="ieee")
    values = tl.sum(acc, axis=0).to(tl.float32)  # [BLOCK_N, BLOCK_M]
    values *= tl.load(w_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if INTEGER:
        values *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    store_transposed(out_ptr, bias_ptr, n, m, N, M, values, HAS_BIAS)


@triton.jit
def _int4_few_fwd_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, KP, G,
    INTEGER: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, OVERLAP: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x `[M, K]`, int8 codes (INTEGER) or floating point, by 4-bit codes; a slice is one block of 256 columns.

    GROUP 0: one scale for a whole row. EVEN: SPLIT blocks divide K.
    """
    RUN: tl.constexpr = 4 if GROUP == 0 or GROUP >= 4 * _PLANE else GROUP // _PLANE  # planes that share a scale
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    split = tl.arange(0, SPLIT)
    lane = tl.arange(0, _PLANE)
    m_n = (n < N)[None, :, None]
    m_m = (m < M)[None, :, None]
    w_ptrs = w_ptr + n[None, :, None] * (KP // 8) + (split[:, None, None] * _PLANE + lane[None, None, :])
    wait_for_inputs(OVERLAP)
    acc = tl.zeros([SPLIT, BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, KP, SPLIT * _BLOCK):
        block = start + split * _BLOCK  # first column of each slice, [SPLIT]
        m_w = m_n if EVEN else m_n & (block < KP)[:, None, None]
        words = tl.load(w_ptrs + start // 8, mask=m_w, other=0)  # [SPLIT, BLOCK_N, 32]
        for first in tl.static_range(0, 8, RUN):
            o_g = n[None, :, None] * G
            if GROUP > 0:
                o_g += tl.minimum((block + first * _PLANE) // GROUP, G - 1)[:, None, None]
            zero = tl.zeros([SPLIT, BLOCK_N, 1], tl.int32)
            if HAS_ZERO:
                zero = tl.load(zero_ptr + o_g, mask=m_w, other=0).to(tl.int32)
            run = tl.zeros([SPLIT, BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
            for plane in tl.static_range(first, first + RUN):
                o_k = (block[:, None, None] + plane * _PLANE) + lane[None, None, :]
                m_x = m_m if EVEN else m_m & (o_k < K)
                b_x = tl.load(x_ptr + m[None, :, None] * K + o_k, mask=m_x, other=0)  # [SPLIT, BLOCK_M, 32]
                b_x = tl.permute(b_x, (0, 2, 1))
                if INTEGER:
                    b_w = (plane_of(words, plane) - 8 - zero).to(tl.int8)
                    run = tl.dot(b_w, b_x, run, out_dtype=tl.int32)
                else:
                    b_w = to_half(plane_of(words, plane), zero, x_ptr.dtype.element_ty)
                    run = tl.dot(b_w, b_x, run, input_precision="ieee")
            scale = tl.load(w_scale_ptr + o_g, mask=m_w, other=0.0).to(tl.float32)
            acc += run.to(tl.float32) * scale
    values = tl.sum(acc, axis=0)  # [BLOCK_N, BLOCK_M]
    if INTEGER:
        values *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    store_transposed(out_ptr, bias_ptr, n, m, N, M, values, HAS_BIAS)
