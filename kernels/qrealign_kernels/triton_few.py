"""Triton kernels of packed products for 2 to 64 tokens: tensor cores, with a split of K inside a program.

The weight is the left operand, so that tokens fill the narrow side of the tensor core's tile. `SPLIT` slices of columns
are multiplied side by side by the warps of a program, as a batched `tl.dot`, and added at its end: memory sees many
loads in flight, and the result needs no second launch and has the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qrealign_kernels.layouts import BLOCK, PLANE
from qrealign_kernels.triton_math import INTERPRETED
from qrealign_kernels.triton_overlap import prefetch_rows, wait_for_inputs

_BLOCK = tl.constexpr(BLOCK)
_PLANE = tl.constexpr(PLANE)


@triton.jit
def plane_of(words, plane: tl.constexpr):
    """Return the unsigned nibbles of one plane, as int32."""
    return (words >> (8 * (plane % 4) + 4 * (plane // 4))) & 0xF


@triton.jit
def halves_of(words, HALF: tl.constexpr):
    """Return the eight planes in bfloat16 or float16, each less 8: planted into mantissas, two words at a time.

    A nibble under the exponent of 128 in bfloat16, or of 1024 in float16, is worth just itself. Which words share an
    instruction does not matter: each element is made of its own word alone.
    """
    BITS: tl.constexpr = 0x4300 if tl.bfloat16 == HALF else 0x6400
    BASE: tl.constexpr = 136.0 if tl.bfloat16 == HALF else 1032.0
    if INTERPRETED:
        p0 = (plane_of(words, 0) | BITS).to(tl.int16)
        p1 = (plane_of(words, 1) | BITS).to(tl.int16)
        p2 = (plane_of(words, 2) | BITS).to(tl.int16)
        p3 = (plane_of(words, 3) | BITS).to(tl.int16)
        p4 = (plane_of(words, 4) | BITS).to(tl.int16)
        p5 = (plane_of(words, 5) | BITS).to(tl.int16)
        p6 = (plane_of(words, 6) | BITS).to(tl.int16)
        p7 = (plane_of(words, 7) | BITS).to(tl.int16)
    else:
        p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, s;
            prmt.b32 low, $8, $9, 0x5410;
            prmt.b32 high, $8, $9, 0x7632;
            lop3.b32 $0, low, 0x000F000F, $10, 0xEA;
            shr.b32 s, low, 4;
            lop3.b32 $4, s, 0x000F000F, $10, 0xEA;
            shr.b32 s, low, 8;
            lop3.b32 $1, s, 0x000F000F, $10, 0xEA;
            shr.b32 s, low, 12;
            lop3.b32 $5, s, 0x000F000F, $10, 0xEA;
            lop3.b32 $2, high, 0x000F000F, $10, 0xEA;
            shr.b32 s, high, 4;
            lop3.b32 $6, s, 0x000F000F, $10, 0xEA;
            shr.b32 s, high, 8;
            lop3.b32 $3, s, 0x000F000F, $10, 0xEA;
            shr.b32 s, high, 12;
            lop3.b32 $7, s, 0x000F000F, $10, 0xEA;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r", [words, BITS * 0x10001], is_pure=True, pack=2,
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        )  # fmt: skip
    return (
        p0.to(HALF, bitcast=True) - BASE, p1.to(HALF, bitcast=True) - BASE, p2.to(HALF, bitcast=True) - BASE,
        p3.to(HALF, bitcast=True) - BASE, p4.to(HALF, bitcast=True) - BASE, p5.to(HALF, bitcast=True) - BASE,
        p6.to(HALF, bitcast=True) - BASE, p7.to(HALF, bitcast=True) - BASE,
    )  # fmt: skip


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
    INTEGER: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x `[M, K]`, int8 codes (INTEGER) or floating point, by w `[N, KP]` int8. EVEN: SPLIT * BLOCK_K divides K.

    AHEAD: cache lines of each row that are pulled into the L2 cache while the tokens are still being rounded.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, SPLIT)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    m_n = (n < N)[None, :, None]
    m_m = (m < M)[None, :, None]
    w_ptrs = w_ptr + n[None, :, None] * KP + o_k  # [SPLIT, BLOCK_N, BLOCK_K]
    x_ptrs = x_ptr + m[None, :, None] * K + o_k  # [SPLIT, BLOCK_M, BLOCK_K]
    if OVERLAP and AHEAD > 0:
        prefetch_rows(w_ptr, tl.minimum(n, N - 1), KP, AHEAD)
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
    EVEN: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
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
    if OVERLAP and AHEAD > 0:
        prefetch_rows(w_ptr, tl.minimum(n, N - 1), KP // 8, AHEAD)
        prefetch_rows(w_scale_ptr, tl.minimum(n, N - 1), G, 2)
    wait_for_inputs(OVERLAP)
    acc = tl.zeros([SPLIT, BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, KP, SPLIT * _BLOCK):
        block = start + split * _BLOCK  # first column of each slice, [SPLIT]
        m_w = m_n if EVEN else m_n & (block < KP)[:, None, None]
        words = tl.load(w_ptrs + start // 8, mask=m_w, other=0)  # [SPLIT, BLOCK_N, 32]
        if not INTEGER:
            halves = halves_of(words, x_ptr.dtype.element_ty)
        for first in tl.static_range(0, 8, RUN):
            o_g = n[None, :] * G
            if GROUP > 0:
                o_g += tl.minimum((block + first * _PLANE) // GROUP, G - 1)[:, None]
            m_g = (block < KP)[:, None] & (n < N)[None, :]
            scale = tl.load(w_scale_ptr + o_g, mask=m_g, other=0.0).to(tl.float32)  # [SPLIT or 1, BLOCK_N]
            if HAS_ZERO:
                zero = tl.load(zero_ptr + o_g, mask=m_g, other=0)[:, :, None]
            run = tl.zeros([SPLIT, BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
            for plane in tl.static_range(first, first + RUN):
                o_k = (block[:, None, None] + plane * _PLANE) + lane[None, None, :]
                m_x = m_m if EVEN else m_m & (o_k < K)
                b_x = tl.load(x_ptr + m[None, :, None] * K + o_k, mask=m_x, other=0)  # [SPLIT, BLOCK_M, 32]
                b_x = tl.permute(b_x, (0, 2, 1))
                b_w = (plane_of(words, plane) - 8).to(tl.int8) if INTEGER else halves[plane]
                if HAS_ZERO:
                    b_w -= zero.to(b_w.dtype)
                run = tl.dot(b_w, b_x, run, out_dtype=tl.int32 if INTEGER else tl.float32)
            acc += run.to(tl.float32) * scale[:, :, None]
    values = tl.sum(acc, axis=0)  # [BLOCK_N, BLOCK_M]
    if INTEGER:
        values *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    store_transposed(out_ptr, bias_ptr, n, m, N, M, values, HAS_BIAS)
