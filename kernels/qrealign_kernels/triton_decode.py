"""Triton kernels of packed products for few tokens: what counts is how fast the weight streams in.

One token: a program takes whole rows, every thread reads 16 bytes of codes at a time straight into registers, and the
program's loads are all in flight at once. Integers meet in `dp4a`; 4-bit codes that meet floating point tokens are
planted into the mantissa of a float, which costs one instruction a code and no conversion.

2 to 64 tokens: tensor cores, with the weight as the left operand. `SPLIT` slices of the columns are multiplied side by
side by the warps of one program, as a batched `tl.dot`, and added at its end: a split along K with one launch and the
same bits every time.

The layout of 4-bit codes is `layouts.py`'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qrealign_kernels.layouts import BLOCK, PLANE
from qrealign_kernels.triton_fake_quant import _clip, round_half_even

_BLOCK = tl.constexpr(BLOCK)
_PLANE = tl.constexpr(PLANE)
_WORDS = tl.constexpr(BLOCK // 8)


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Let the next kernel of the stream start, and wait for what the one before writes (programmatic launch)."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def dot4(a, b, ASSEMBLE: tl.constexpr):
    """Return the sum of the products of the four int8 codes in each pair of words."""
    if ASSEMBLE:
        products = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        products = ((a << 24) >> 24) * ((b << 24) >> 24)
        for shift in tl.static_range(0, 24, 8):
            products += ((a << shift) >> 24) * ((b << shift) >> 24)
    return products


@triton.jit
def _token_scale(x_ptr, K, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr, WIDTH: tl.constexpr,
                 STEPS: tl.constexpr):  # fmt: skip
    """Return the scale of the token at `x_ptr`, as `quantize_per_token_ref` defines it."""
    b_largest = tl.zeros([WIDTH], tl.float32)
    for step in tl.static_range(STEPS):
        o_k = step * WIDTH + tl.arange(0, WIDTH)
        b_x = tl.load(x_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_largest = tl.maximum(b_largest, tl.abs(b_x))
    scale = tl.div_rn(tl.max(b_largest, axis=0), (QMAX - QMIN) * 0.5)
    return tl.where(scale == 0.0, ZERO_SCALE, scale)


@triton.jit
def _load_codes(x_ptr, o_k, K, scale, QUANTIZE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Return the token's codes at columns `o_k` as int32, rounded here or read."""
    if QUANTIZE:
        b_x = tl.load(x_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        codes = _clip(round_half_even(tl.div_rn(b_x, scale)), QMIN * 1.0, QMAX * 1.0).to(tl.int32)
    else:
        codes = tl.load(x_ptr + o_k, mask=o_k < K, other=0).to(tl.int32)
    return codes


@triton.jit
def _store_row(out_ptr, bias_ptr, n, N, values, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        values += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, values.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _int8_gemv_fwd_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, N, K: tl.constexpr, KP: tl.constexpr,
    QUANTIZE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ASSEMBLE: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One token by `[N, KP]` int8 codes, read as words of four: x `[K]` floating point (QUANTIZE) or int8."""
    wait_for_inputs(OVERLAP)
    STEPS: tl.constexpr = (KP + 16 * THREADS - 1) // (16 * THREADS)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    thread = tl.arange(0, THREADS)
    if QUANTIZE:
        x_scale = _token_scale(x_ptr, K, QMIN, QMAX, ZERO_SCALE, 16 * THREADS, STEPS)
    else:
        x_scale = tl.load(x_scale_ptr)
    acc = tl.zeros([THREADS, BLOCK_N], tl.int32)
    for step in tl.static_range(STEPS):
        o_t = step * THREADS + thread  # runs of 16 columns
        o_w = (o_t * 4)[:, None] + tl.arange(0, 4)[None, :]  # [THREADS, 4] words
        mask = (o_t * 16 < KP)[:, None, None] & (n < N)[None, :, None]
        words = tl.load(w_ptr + n[None, :, None] * (KP // 4) + o_w[:, None, :], mask=mask, other=0)
        byte = tl.arange(0, 4)
        codes = _load_codes(x_ptr, (o_w * 4)[:, :, None] + byte[None, None, :], K, x_scale, QUANTIZE, QMIN, QMAX)
        x_words = tl.sum((codes & 0xFF) << (byte * 8)[None, None, :], axis=2)  # [THREADS, 4]
        acc += tl.sum(dot4(words, x_words[:, None, :], ASSEMBLE), axis=2)
    values = tl.sum(acc, axis=0).to(tl.float32)
    values = values * tl.load(w_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32) * x_scale
    _store_row(out_ptr, bias_ptr, n, N, values, HAS_BIAS)


@triton.jit
def _int4_gemv_fwd_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, zero_ptr, bias_ptr, out_ptr, N, K: tl.constexpr, KP: tl.constexpr,
    G: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    QUANTIZE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ASSEMBLE: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One token's codes by 4-bit codes: a half word of eight planes is four int8 at once. GROUP 0: whole rows."""
    wait_for_inputs(OVERLAP)
    STEPS: tl.constexpr = (KP + 32 * THREADS - 1) // (32 * THREADS)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = n < N
    thread = tl.arange(0, THREADS)
    if QUANTIZE:
        x_scale = _token_scale(x_ptr, K, QMIN, QMAX, ZERO_SCALE, 32 * THREADS, STEPS)
    else:
        x_scale = tl.load(x_scale_ptr)
    acc = tl.zeros([THREADS, BLOCK_N], tl.float32)
    for step in tl.static_range(STEPS):
        o_t = step * THREADS + thread  # runs of four words, 32 codes
        o_w = (o_t * 4)[:, None] + tl.arange(0, 4)[None, :]  # [THREADS, 4]
        mask = (o_t * 32 < KP)[:, None] & m_n[None, :]  # [THREADS, BLOCK_N]
        words = tl.load(w_ptr + n[None, :, None] * (KP // 8) + o_w[:, None, :], mask=mask[:, :, None], other=0)
        o_k = (o_w // _WORDS) * _BLOCK + o_w % _WORDS  # column of plane 0
        for half in tl.static_range(2):
            x_words = tl.zeros([THREADS, 4], tl.int32)
            for byte in tl.static_range(4):
                codes = _load_codes(x_ptr, o_k + (4 * half + byte) * _PLANE, K, x_scale, QUANTIZE, QMIN, QMAX)
                x_words |= (codes & 0xFF) << (8 * byte)
            nibbles = (words >> (4 * half)) & 0x0F0F0F0F
            products = tl.sum(dot4(nibbles, x_words[:, None, :], ASSEMBLE), axis=2)  # [THREADS, BLOCK_N]
            total = tl.sum(dot4(x_words, tl.full([THREADS, 4], 0x01010101, tl.int32), ASSEMBLE), axis=1)[:, None]
            if GROUP == 0:
                o_g = n[None, :]
            else:
                column = (o_t // (_WORDS // 4)) * _BLOCK + half * (_BLOCK // 2)
                o_g = tl.minimum(column // GROUP, G - 1)[:, None] + n[None, :] * G
            zero = 8
            if HAS_ZERO:
                zero = 8 + tl.load(zero_ptr + o_g, mask=mask, other=0).to(tl.int32)
            products = (products - zero * total).to(tl.float32)
            acc += products * tl.load(w_scale_ptr + o_g, mask=mask, other=0.0).to(tl.float32)
    _store_row(out_ptr, bias_ptr, n, N, tl.sum(acc, axis=0) * x_scale, HAS_BIAS)


@triton.jit
def _mantissa(words, plane: tl.constexpr, ASSEMBLE: tl.constexpr):
    """Return the nibbles of a plane plus 2**k as float32 without a conversion, and k is the plane's: see `_offset`."""
    shift: tl.constexpr = 8 * (plane % 4) + 4 * (plane // 4)
    if shift > 16:
        words = words >> 12
    low: tl.constexpr = shift - 12 if shift > 16 else shift
    if ASSEMBLE:
        # One instruction; the compiler makes two of an `and` and an `or` with constants.
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words, 0xF << low, (150 - low) << 23], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        bits = (words & (0xF << low)) | ((150 - low) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _offset(plane: tl.constexpr):
    """Return what `_mantissa` adds to the codes of a plane: 2**k, and the 8 of unsigned nibbles."""
    shift: tl.constexpr = 8 * (plane % 4) + 4 * (plane // 4)
    low: tl.constexpr = shift - 12 if shift > 16 else shift
    return (1 << (23 - low)) + 8.0


@triton.jit
def _int4_float_gemv_fwd_kernel(
    x_ptr, w_ptr, w_scale_ptr, zero_ptr, bias_ptr, out_ptr, N, K: tl.constexpr, KP: tl.constexpr,
    G: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    ASSEMBLE: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One floating point token by 4-bit codes. GROUP 0: one scale for a whole row."""
    wait_for_inputs(OVERLAP)
    STEPS: tl.constexpr = (KP + 32 * THREADS - 1) // (32 * THREADS)
    RUN: tl.constexpr = 4 if GROUP == 0 or GROUP >= 4 * _PLANE else GROUP // _PLANE  # planes that share a scale
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = n < N
    thread = tl.arange(0, THREADS)
    acc = tl.zeros([THREADS, BLOCK_N], tl.float32)
    for step in tl.static_range(STEPS):
        o_t = step * THREADS + thread  # runs of four words, 32 codes
        o_w = (o_t * 4)[:, None] + tl.arange(0, 4)[None, :]  # [THREADS, 4]
        mask = (o_t * 32 < KP)[:, None] & m_n[None, :]  # [THREADS, BLOCK_N]
        words = tl.load(w_ptr + n[None, :, None] * (KP // 8) + o_w[:, None, :], mask=mask[:, :, None], other=0)
        o_k = (o_w // _WORDS) * _BLOCK + o_w % _WORDS  # column of plane 0
        for first in tl.static_range(0, 8, RUN):
            products = tl.zeros([THREADS, BLOCK_N, 4], tl.float32)
            total = tl.zeros([THREADS, 4], tl.float32)
            for plane in tl.static_range(first, first + RUN):
                columns = o_k + plane * _PLANE
                b_x = tl.load(x_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
                products += (_mantissa(words, plane, ASSEMBLE) - _offset(plane)) * b_x[:, None, :]
                total += b_x
            b_y = tl.sum(products, axis=2)
            if GROUP == 0:
                o_g = n[None, :]
            else:
                column = (o_t // (_WORDS // 4)) * _BLOCK + first * _PLANE
                o_g = tl.minimum(column // GROUP, G - 1)[:, None] + n[None, :] * G
            if HAS_ZERO:
                b_y -= tl.load(zero_ptr + o_g, mask=mask, other=0).to(tl.float32) * tl.sum(total, axis=1)[:, None]
            acc += b_y * tl.load(w_scale_ptr + o_g, mask=mask, other=0.0).to(tl.float32)
    _store_row(out_ptr, bias_ptr, n, N, tl.sum(acc, axis=0), HAS_BIAS)
