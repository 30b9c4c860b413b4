"""Triton kernels of quantized products for many tokens: tiles of integers, and copies of weights for a library.

The weight is the left operand, as in `triton_few.py`, so that the token side of a tile may be narrow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qrealign_kernels.layouts import BLOCK, PLANE
from qrealign_kernels.triton_few import plane_of, store_transposed
from qrealign_kernels.triton_overlap import wait_for_inputs

_BLOCK = tl.constexpr(BLOCK)
_PLANE = tl.constexpr(PLANE)


@triton.jit
def _tile(pid, rows, columns, WIDTH: tl.constexpr):
    """Return a program's tile: WIDTH columns of tiles are walked row by row, so neighbours share what they read."""
    strip = pid // (WIDTH * rows)
    width = tl.minimum(columns - strip * WIDTH, WIDTH)
    inside = pid % (WIDTH * rows)
    return inside // width, strip * WIDTH + inside % width


@triton.jit
def _int8_tile_fwd_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, stride_wn,
    stride_sn, stride_sg, stride_zn, stride_zg,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """x `[M, K]` int8 by w `[N, K]` int8. GROUP 0: one scale for a whole row; else BLOCK_K divides GROUP.

    EVEN: BLOCK_K divides K.
    """
    EXACT: tl.constexpr = GROUP == 0 and not HAS_ZERO  # nothing is scaled before the last column
    # Neighbouring programs share the tokens: the weight is the larger operand and passes by once a strip.
    tile_n, tile_m = _tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), STRIP)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    # Rows behind the end are read from the beginning and never stored: loads without a mask.
    rows_n = (n % N).to(tl.int64)
    w_ptrs = w_ptr + rows_n[:, None] * stride_wn + o_k[None, :]
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * K + o_k[None, :]
    wait_for_inputs(OVERLAP)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if EXACT else tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            b_w = tl.load(w_ptrs + start)
            b_x = tl.load(x_ptrs + start)
        else:
            b_w = tl.load(w_ptrs + start, mask=(start + o_k < K)[None, :], other=0)
            b_x = tl.load(x_ptrs + start, mask=(start + o_k < K)[None, :], other=0)
        if EXACT:
            acc = tl.dot(b_w, b_x.T, acc, out_dtype=tl.int32)
        else:
            group = start // GROUP if GROUP > 0 else 0
            products = tl.dot(b_w, b_x.T, out_dtype=tl.int32)
            if HAS_ZERO:
                zero = tl.load(zero_ptr + rows_n * stride_zn + group * stride_zg).to(tl.int32)
                products -= zero[:, None] * tl.sum(b_x.to(tl.int32), axis=1)[None, :]
            scale = tl.load(w_scale_ptr + rows_n * stride_sn + group * stride_sg).to(tl.float32)
            acc += products.to(tl.float32) * scale[:, None]
    values = acc.to(tl.float32)
    if EXACT:
        values *= tl.load(w_scale_ptr + rows_n * stride_sn).to(tl.float32)[:, None]
    values *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    store_transposed(out_ptr, bias_ptr, n, m, N, M, values, HAS_BIAS)


@triton.jit
def _unpack4_kernel(
    w_ptr, w_scale_ptr, zero_ptr, out_ptr, N, K, KP, G, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write 4-bit codes as `[N, K]`: int8 less the zero point, or SCALED in the output's dtype."""
    n = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None, None]
    block = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :, None]
    lane = tl.arange(0, _PLANE)[None, None, :]
    inside = (n < N) & (block * _BLOCK < KP)
    words = tl.load(w_ptr + n * (KP // 8) + block * _PLANE + lane, mask=inside, other=0)  # [BLOCK_R, BLOCK_C, 32]
    for plane in tl.static_range(8):
        first = block * _BLOCK + plane * _PLANE  # a plane lies within one group
        o_g = n * G + (tl.minimum(first // GROUP, G - 1) if GROUP > 0 else 0)
        codes = plane_of(words, plane) - 8
        if HAS_ZERO:
            codes -= tl.load(zero_ptr + o_g, mask=n < N, other=0).to(tl.int32)
        out_ptrs = out_ptr + n * K + first + lane
        mask = inside & (first + lane < K)
        if SCALED:
            scale = tl.load(w_scale_ptr + o_g, mask=n < N, other=0.0).to(tl.float32)
            tl.store(out_ptrs, (codes.to(tl.float32) * scale).to(out_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(out_ptrs, codes.to(tl.int8), mask=mask)


@triton.jit
def _scale8_kernel(
    w_ptr, w_scale_ptr, zero_ptr, out_ptr, N, K, stride_wn, stride_sn, stride_sg, stride_zn, stride_zg,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write int8 codes as the weight `[N, K]` in the output's dtype."""
    n = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    k = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (n < N) & (k < K)
    b_w = tl.load(w_ptr + n * stride_wn + k, mask=mask, other=0).to(tl.float32)
    group = tl.zeros([1, 1], tl.int32) if GROUP == 0 else k // GROUP
    m_g = (n < N) & (group * GROUP < K)
    if HAS_ZERO:
        b_w -= tl.load(zero_ptr + n * stride_zn + group * stride_zg, mask=m_g, other=0).to(tl.float32)
    scale = tl.load(w_scale_ptr + n * stride_sn + group * stride_sg, mask=m_g, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * K + k, (b_w * scale).to(out_ptr.dtype.element_ty), mask=mask)
