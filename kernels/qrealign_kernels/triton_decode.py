"""Triton kernels of packed products for one token: what counts is how fast the weight streams in.

A program takes whole rows, every thread reads 16 bytes of codes at a time straight into registers, and the program's
loads are all in flight at once. Integers meet in `dp4a`, and so do 4-bit codes and a token of 16-bit floating point, as
fixed-point numbers of 16 bits. Where groups are too short for that, or the token is float32, 4-bit codes are planted
into the mantissa of a float, which costs one instruction a code and no conversion. A token that comes unrounded is
rounded by every program anew, from the L2 cache: a kernel of its own would take longer.

The layout of 4-bit codes is described in `layouts.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qrealign_kernels.layouts import BLOCK, PLANE
from qrealign_kernels.triton_math import INTERPRETED, ROUNDER, clip, divide, largest_magnitude, round_half_even, to_int8
from qrealign_kernels.triton_overlap import prefetch_rows, wait_for_inputs

_BLOCK = tl.constexpr(BLOCK)
_PLANE = tl.constexpr(PLANE)
_WORDS = tl.constexpr(BLOCK // 8)
_LIFT = tl.constexpr(2.0**64)


@triton.jit
def dot4(a, b):
    """Return the sum of the products of the four int8 codes in each pair of words."""
    if INTERPRETED:
        products = ((a << 24) >> 24) * ((b << 24) >> 24)
        for shift in tl.static_range(0, 24, 8):
            products += ((a << shift) >> 24) * ((b << shift) >> 24)
    else:
        products = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return products


@triton.jit
def _x_scale(
    x_ptr, x_scale_ptr, K, QUANTIZE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    ZERO_SCALE: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Return the token's scale: found here as `quantize_per_token_ref` defines it, or read."""
    if QUANTIZE:
        b_largest = tl.zeros([WIDTH], tl.float32)
        for step in tl.static_range(STEPS):
            o_k = step * WIDTH + tl.arange(0, WIDTH)
            b_x = tl.load(x_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)
            b_largest = _larger(b_largest, tl.abs(b_x))
        scale = tl.div_rn(largest_magnitude(b_largest, 0), (QMAX - QMIN) * 0.5)
        scale = tl.where(scale == 0.0, ZERO_SCALE, scale)
    else:
        scale = tl.load(x_scale_ptr)
    return scale


@triton.jit
def _load_codes(x_ptr, o_k, K, scale, QUANTIZE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Return the token's codes at columns `o_k` as int32 in [0, 255], two's complement: rounded here, or read."""
    if QUANTIZE:
        b_x = tl.load(x_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        if INTERPRETED:  # its fma rounds twice
            quotient = tl.div_rn(b_x, scale)
        else:
            # The reciprocal of a tiny scale is no float32: both are lifted by a power of two, which is exact.
            lift = tl.where(scale < 1 / _LIFT, _LIFT, 1.0)
            scale *= lift
            quotient = divide(b_x * lift, scale, tl.div_rn(1.0, scale), True)
        codes = to_int8(clip(round_half_even(quotient), QMIN * 1.0, QMAX * 1.0)).to(tl.int32)
    else:
        codes = tl.load(x_ptr + o_k, mask=o_k < K, other=0).to(tl.int32)
    return codes & 0xFF


@triton.jit
def _store_row(out_ptr, bias_ptr, n, N, values, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        values += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, values.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _load_words(w_ptr, n, o_t, N, WORDS: tl.constexpr):
    """Return four words a thread, `[THREADS, BLOCK_N, 4]`, of rows of WORDS words; runs `o_t` of four may be behind."""
    o_w = (o_t * 4)[:, None] + tl.arange(0, 4)[None, :]
    mask = (o_t * 4 < WORDS)[:, None, None] & (n < N)[None, :, None]
    return tl.load(w_ptr + n[None, :, None] * WORDS + o_w[:, None, :], mask=mask, other=0)


@triton.constexpr_function
def _power_of_2(number):
    """Return the next power of two, at least 1."""
    return 1 << max(0, number - 1).bit_length()


@triton.jit
def _int8_gemv_fwd_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, N, K: tl.constexpr, KP: tl.constexpr,
    QUANTIZE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One token by `[N, KP]` int8 codes, read as words of four: x `[K]` floating point (QUANTIZE) or int8."""
    STEPS: tl.constexpr = (KP + 16 * THREADS - 1) // (16 * THREADS)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    thread = tl.arange(0, THREADS)
    byte = tl.arange(0, 4)
    words = _load_words(w_ptr, n, thread, N, KP // 4)
    wait_for_inputs(OVERLAP)
    x_scale = _x_scale(x_ptr, x_scale_ptr, K, QUANTIZE, QMIN, QMAX, ZERO_SCALE, 16 * THREADS, STEPS)
    acc = tl.zeros([THREADS, BLOCK_N], tl.int32)
    for step in tl.static_range(STEPS):
        o_t = step * THREADS + thread  # runs of 16 columns
        if step > 0:
            words = _load_words(w_ptr, n, o_t, N, KP // 4)
        o_k = (o_t * 16)[:, None, None] + (byte * 4)[None, :, None] + byte[None, None, :]
        codes = _load_codes(x_ptr, o_k, K, x_scale, QUANTIZE, QMIN, QMAX)
        x_words = tl.sum(codes << (byte * 8)[None, None, :], axis=2)  # [THREADS, 4]
        acc += tl.sum(dot4(words, x_words[:, None, :]), axis=2)
    values = tl.sum(acc, axis=0).to(tl.float32)
    values = values * tl.load(w_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32) * x_scale
    _store_row(out_ptr, bias_ptr, n, N, values, HAS_BIAS)


@triton.jit
def _group_offsets(n, o_t, half_start, G, GROUP: tl.constexpr):
    """Return where the scales `[N, G]` of rows n stand for the threads' blocks, `[THREADS or 1, BLOCK_N]`."""
    if GROUP == 0:
        offsets = n[None, :]
    else:
        column = (o_t // (_WORDS // 4)) * _BLOCK + half_start
        offsets = n[None, :] * G + tl.minimum(column // GROUP, G - 1)[:, None]
    return offsets


@triton.jit
def _first_run(
    w_ptr, w_scale_ptr, N, G, KP: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr
):  # fmt: skip
    """Return the program's rows `n` and their first words of 4-bit codes, asked for before what is waited for."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = _load_words(w_ptr, n, tl.arange(0, THREADS), N, KP // 8)
    if OVERLAP:
        prefetch_rows(w_scale_ptr, tl.minimum(n, N - 1), G, _power_of_2(G // 32))
    wait_for_inputs(OVERLAP)
    return n, words


@triton.jit
def _run(step: tl.constexpr, words, w_ptr, n, N, KP: tl.constexpr, THREADS: tl.constexpr):
    """Return a step's words `[THREADS, BLOCK_N, 4]`, of which the first step has its own already, and where they are.

    That is the mask of scales `[THREADS, BLOCK_N]`, the threads' runs of four words, 32 codes, and the columns of
    plane 0, `[THREADS, 4]`.
    """
    o_t = step * THREADS + tl.arange(0, THREADS)
    if step > 0:
        words = _load_words(w_ptr, n, o_t, N, KP // 8)
    mask = (o_t * 32 < KP)[:, None] & (n < N)[None, :]
    o_w = (o_t * 4)[:, None] + tl.arange(0, 4)[None, :]
    return words, mask, o_t, (o_w // _WORDS) * _BLOCK + o_w % _WORDS


@triton.jit
def _int4_gemv_fwd_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, zero_ptr, bias_ptr, out_ptr, N, K: tl.constexpr, KP: tl.constexpr,
    G: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    QUANTIZE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One token's codes by 4-bit codes: the even, or odd, nibbles of a word are four int8. GROUP 0: whole rows."""
    STEPS: tl.constexpr = (KP + 32 * THREADS - 1) // (32 * THREADS)
    n, words = _first_run(w_ptr, w_scale_ptr, N, G, KP, OVERLAP, BLOCK_N, THREADS)
    x_scale = _x_scale(x_ptr, x_scale_ptr, K, QUANTIZE, QMIN, QMAX, ZERO_SCALE, 32 * THREADS, STEPS)
    acc = tl.zeros([THREADS, BLOCK_N], tl.float32)
    for step in tl.static_range(STEPS):
        words, mask, o_t, o_k = _run(step, words, w_ptr, n, N, KP, THREADS)
        for half in tl.static_range(2):
            x_words = tl.zeros([THREADS, 4], tl.int32)
            for byte in tl.static_range(4):
                columns = o_k + (4 * half + byte) * _PLANE
                x_words |= _load_codes(x_ptr, columns, K, x_scale, QUANTIZE, QMIN, QMAX) << (8 * byte)
            products = tl.sum(dot4((words >> (4 * half)) & 0x0F0F0F0F, x_words[:, None, :]), axis=2)
            total = tl.sum(dot4(x_words, tl.full([THREADS, 4], 0x01010101, tl.int32)), axis=1)[:, None]
            o_g = _group_offsets(n, o_t, half * (_BLOCK // 2), G, GROUP)
            zero = 8
            if HAS_ZERO:
                zero = 8 + tl.load(zero_ptr + o_g, mask=mask, other=0).to(tl.int32)
            products = (products - zero * total).to(tl.float32)
            acc += products * tl.load(w_scale_ptr + o_g, mask=mask, other=0.0).to(tl.float32)
    _store_row(out_ptr, bias_ptr, n, N, tl.sum(acc, axis=0) * x_scale, HAS_BIAS)


@triton.jit
def _planted(words, plane: tl.constexpr):
    """Return the codes of a plane as float32, without a conversion.

    A nibble at bits `low` to `low + 3` of a mantissa under the exponent of 2**(23 - low) is worth just itself.
    """
    shift: tl.constexpr = 8 * (plane % 4) + 4 * (plane // 4)
    low: tl.constexpr = shift - 12 if shift > 16 else shift  # a mantissa has 23 bits
    if shift > 16:
        words = words >> 12
    if INTERPRETED:
        bits = (words & (0xF << low)) | ((150 - low) << 23)
    else:  # one instruction, where the compiler makes two of an `and` and an `or` with constants
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words, 0xF << low, (150 - low) << 23],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - low)) + 8.0)


@triton.jit
def _int4_float_gemv_fwd_kernel(
    x_ptr, w_ptr, w_scale_ptr, zero_ptr, bias_ptr, out_ptr, N, K: tl.constexpr, KP: tl.constexpr,
    G: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One floating point token by 4-bit codes. GROUP 0: one scale for a whole row."""
    STEPS: tl.constexpr = (KP + 32 * THREADS - 1) // (32 * THREADS)
    RUN: tl.constexpr = 4 if GROUP == 0 or GROUP >= 4 * _PLANE else GROUP // _PLANE  # planes that share a scale
    n, words = _first_run(w_ptr, w_scale_ptr, N, G, KP, OVERLAP, BLOCK_N, THREADS)
    acc = tl.zeros([THREADS, BLOCK_N], tl.float32)
    for step in tl.static_range(STEPS):
        words, mask, o_t, o_k = _run(step, words, w_ptr, n, N, KP, THREADS)
        for first in tl.static_range(0, 8, RUN):
            products = tl.zeros([THREADS, BLOCK_N, 4], tl.float32)
            total = tl.zeros([THREADS, 4], tl.float32)
            for plane in tl.static_range(first, first + RUN):
                columns = o_k + plane * _PLANE
                b_x = tl.load(x_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
                products += _planted(words, plane) * b_x[:, None, :]
                total += b_x
            b_y = tl.sum(products, axis=2)  # [THREADS, BLOCK_N]
            o_g = _group_offsets(n, o_t, first * _PLANE, G, GROUP)
            if HAS_ZERO:
                b_y -= tl.load(zero_ptr + o_g, mask=mask, other=0).to(tl.float32) * tl.sum(total, axis=1)[:, None]
            acc += b_y * tl.load(w_scale_ptr + o_g, mask=mask, other=0.0).to(tl.float32)
    _store_row(out_ptr, bias_ptr, n, N, tl.sum(acc, axis=0), HAS_BIAS)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fixed_point(x0, x1, x2, x3):
    """Round `[THREADS, 4]` values, four times, to 16 bits with a step for each thread's sixteen.

    Returns the steps `[THREADS]`, and the numbers' high bytes (signed) and low bytes (unsigned), those of x0 to x3 in
    the four bytes of a word, `[THREADS, 4]`. What is not finite makes the step so.
    """
    largest = _larger(_larger(tl.abs(x0), tl.abs(x1)), _larger(tl.abs(x2), tl.abs(x3)))
    largest = tl.reduce(largest, 1, _larger)
    inverse = tl.where(largest < 1e-30, 0.0, 32767.0 / largest)[:, None]
    n0 = (x0 * inverse + ROUNDER).to(tl.int32, bitcast=True)
    n1 = (x1 * inverse + ROUNDER).to(tl.int32, bitcast=True)
    n2 = (x2 * inverse + ROUNDER).to(tl.int32, bitcast=True)
    n3 = (x3 * inverse + ROUNDER).to(tl.int32, bitcast=True)
    if INTERPRETED:
        low = (n0 & 0xFF) | (n1 & 0xFF) << 8 | (n2 & 0xFF) << 16 | (n3 & 0xFF) << 24
        high = (n0 >> 8 & 0xFF) | (n1 >> 8 & 0xFF) << 8 | (n2 >> 8 & 0xFF) << 16 | (n3 >> 8 & 0xFF) << 24
    else:  # bytes 0 and 1 of two numbers side by side, then bytes 0, and bytes 1, of all four
        high, low = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; prmt.b32 a, $2, $3, 0x5140; prmt.b32 b, $4, $5, 0x5140;"
            " prmt.b32 $0, a, b, 0x7632; prmt.b32 $1, a, b, 0x5410; }",
            "=&r,=&r,r,r,r,r", [n0, n1, n2, n3], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return largest * (1.0 / 32767.0), high, low


@triton.jit
def _dot4_onto(total, nibbles, x_bytes, SIGNED: tl.constexpr):
    """Return `total` and the products of four unsigned bytes with four that are signed or not."""
    if INTERPRETED:
        for shift in tl.static_range(0, 32, 8):
            byte = (x_bytes << (24 - shift)) >> 24 if SIGNED else x_bytes >> shift & 0xFF
            total += (nibbles >> shift & 0xFF) * byte
    elif SIGNED:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [nibbles, x_bytes, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [nibbles, x_bytes, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return total


@triton.jit
def _split4(x):
    """Return the four `[A, B]` tensors that `[A, B, 4]` holds."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _int4_fixed_gemv_fwd_kernel(
    x_ptr, w_ptr, w_scale_ptr, zero_ptr, bias_ptr, out_ptr, N, K: tl.constexpr, KP: tl.constexpr,
    G: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One token of 16-bit floating point by 4-bit codes, in integers: half the instructions of a product in floats.

    Sixteen columns of the token at a time become fixed-point numbers of 16 bits, two bytes that meet four codes each
    in `dp4a`. What is within 2**-8 of the largest of the sixteen loses nothing if it was bfloat16. GROUP is 0 for whole
    rows, or a multiple of half a block.
    """
    STEPS: tl.constexpr = (KP + 32 * THREADS - 1) // (32 * THREADS)
    n, words = _first_run(w_ptr, w_scale_ptr, N, G, KP, OVERLAP, BLOCK_N, THREADS)
    acc = tl.zeros([THREADS, BLOCK_N], tl.float32)
    for step in tl.static_range(STEPS):
        words, mask, o_t, o_k = _run(step, words, w_ptr, n, N, KP, THREADS)
        w0, w1, w2, w3 = _split4(words)
        for half in tl.static_range(2):
            first = o_k + 4 * half * _PLANE
            x0 = tl.load(x_ptr + first, mask=first < K, other=0.0).to(tl.float32)
            x1 = tl.load(x_ptr + first + _PLANE, mask=first + _PLANE < K, other=0.0).to(tl.float32)
            x2 = tl.load(x_ptr + first + 2 * _PLANE, mask=first + 2 * _PLANE < K, other=0.0).to(tl.float32)
            x3 = tl.load(x_ptr + first + 3 * _PLANE, mask=first + 3 * _PLANE < K, other=0.0).to(tl.float32)
            x_step, x_high, x_low = _fixed_point(x0, x1, x2, x3)
            ones = tl.full([THREADS, 4], 0x01010101, tl.int32)
            nothing = tl.zeros([THREADS, 4], tl.int32)
            totals = _dot4_onto(nothing, ones, x_high, True) * 256 + _dot4_onto(nothing, ones, x_low, False)
            # Spread over the rows first: whatever way a layout takes to the words', it takes once.
            h0, h1, h2, h3 = _split4(tl.broadcast_to(x_high[:, None, :], [THREADS, BLOCK_N, 4]))
            l0, l1, l2, l3 = _split4(tl.broadcast_to(x_low[:, None, :], [THREADS, BLOCK_N, 4]))
            v0 = (w0 >> (4 * half)) & 0x0F0F0F0F
            v1 = (w1 >> (4 * half)) & 0x0F0F0F0F
            v2 = (w2 >> (4 * half)) & 0x0F0F0F0F
            v3 = (w3 >> (4 * half)) & 0x0F0F0F0F
            high = tl.zeros([THREADS, BLOCK_N], tl.int32)
            high = _dot4_onto(high, v0, h0, True)
            high = _dot4_onto(high, v1, h1, True)
            high = _dot4_onto(high, v2, h2, True)
            high = _dot4_onto(high, v3, h3, True) * 256
            high = _dot4_onto(high, v0, l0, False)
            high = _dot4_onto(high, v1, l1, False)
            high = _dot4_onto(high, v2, l2, False)
            high = _dot4_onto(high, v3, l3, False)
            o_g = _group_offsets(n, o_t, half * (_BLOCK // 2), G, GROUP)
            zero = 8
            if HAS_ZERO:
                zero = 8 + tl.load(zero_ptr + o_g, mask=mask, other=0).to(tl.int32)
            b_y = (high - zero * tl.sum(totals, axis=1)[:, None]).to(tl.float32) * x_step[:, None]
            acc += b_y * tl.load(w_scale_ptr + o_g, mask=mask, other=0.0).to(tl.float32)
    _store_row(out_ptr, bias_ptr, n, N, tl.sum(acc, axis=0), HAS_BIAS)
