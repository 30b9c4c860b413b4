"""Arithmetic that several Triton kernels share; each function gives the bits that the reference's torch code gives.

Rounding is ties-to-even without libdevice, which the interpreter lacks. Kernels that use these are compiled with
`enable_fp_fusion=FP_FUSION`: a multiplication fused into the addition after it skips a rounding that the reference
does, and changes codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from qrealign_kernels.triton_common import interpreting

FP_FUSION = False
FLOAT_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of `round_to`
INTERPRETED = tl.constexpr(interpreting())
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float32 that large has no bits for a fraction


@triton.jit
def round_half_even(x):
    """Round to the nearest integer, for |x| < 2**22."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def to_int8(x):
    """Convert integers in [-128, 127] held as float32."""
    return low_byte(x + ROUNDER)


@triton.jit
def low_byte(x):
    """Convert integers in [-128, 127] that ROUNDER was added to: their two's complement stands in the lowest bits.

    Four times the throughput of the hardware's conversion.
    """
    return x.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def clip(x, low, high):
    """Set what is beyond a bound to it; a NaN stays one."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """Return the largest |x| along an axis; a NaN is above everything, as it is among the bits read as integers."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e**-x), on GPUs with the bits that torch gives."""
    return tl.div_rn(1.0, 1.0 + exponential(-x))


@triton.jit
def _combine_extremes(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def row_extremes(low, high):
    """Return the minimum of each row of one tile and the maximum of each row of another."""
    if INTERPRETED:  # walks through a reduction of its own kind element by element
        return tl.min(low, axis=1), tl.max(high, axis=1)
    else:  # one exchange between warps for both
        return tl.reduce((low, high), 1, _combine_extremes)


@triton.jit
def _combine_six(a, b, c, d, e, f, other_a, other_b, other_c, other_d, other_e, other_f):
    return a + other_a, b + other_b, c + other_c, d + other_d, e + other_e, f + other_f


@triton.jit
def row_sums_6(a, b, c, d, e, f):
    """Return the sums of each row of six tiles, as `row_extremes` does."""
    if INTERPRETED:
        a, b, c = tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1)
        return a, b, c, tl.sum(d, axis=1), tl.sum(e, axis=1), tl.sum(f, axis=1)
    else:
        return tl.reduce((a, b, c, d, e, f), 1, _combine_six)


@triton.jit
def _combine_seven(a, b, c, d, e, f, g, other_a, other_b, other_c, other_d, other_e, other_f, other_g):
    return a + other_a, b + other_b, c + other_c, d + other_d, e + other_e, f + other_f, g + other_g


@triton.jit
def row_sums_7(a, b, c, d, e, f, g):
    """Return the sums of each row of seven tiles, as `row_extremes` does."""
    if INTERPRETED:
        a, b, c, d = tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1), tl.sum(d, axis=1)
        return a, b, c, d, tl.sum(e, axis=1), tl.sum(f, axis=1), tl.sum(g, axis=1)
    else:
        return tl.reduce((a, b, c, d, e, f, g), 1, _combine_seven)


@triton.jit
def load_tile(pointers, mask, FULL: tl.constexpr):
    """Load a tile as float32; one known to be FULL pays for no mask."""
    if FULL:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(pointer, like, columns, mask, FULL: tl.constexpr):
    """Load one value a column, float32, as a tile of the shape of `like`.

    Loaded as a row and broadcast, the values would lie in another layout than the weights, and to change it takes
    barriers: four for a row of 4,096. Repeated loads of a tile of several rows meet the first-level cache.
    """
    pointers = tl.broadcast_to((pointer + columns)[None, :], like.shape)
    return load_tile(pointers, tl.broadcast_to(mask[None, :], like.shape), FULL)


@triton.jit
def store_tile(pointers, tile, mask, FULL: tl.constexpr):
    """Store a tile; one known to be FULL pays for no mask."""
    if FULL:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=mask)


@triton.jit
def round_to(x, KIND: tl.constexpr):
    """Round float32 to float16 (KIND 1) or bfloat16 (2) and back."""
    if KIND == 1:
        x = x.to(tl.float16).to(tl.float32)
    if KIND == 2:
        if INTERPRETED:  # truncates where the hardware rounds
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
        else:
            x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def convert(x, dtype: tl.constexpr):
    """Round float32 to the dtype of a result."""
    if dtype == tl.bfloat16:
        x = round_to(x, 2)
    return x.to(dtype)


@triton.jit
def exponential(x):
    """Return e**x: on GPUs by the function that torch's own kernels use, for the same bits."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def divide(x, y, reciprocal, EXACT: tl.constexpr):
    """Divide by a number whose reciprocal, rounded once, is known: half the instructions of an IEEE division.

    Each correction adds the remainder's share. After two the quotient is the rounded one (Markstein, IBM J. Res. Dev.
    34, 1990). After one it can only differ, by its last bit, if y has more than 11 significant bits: so EXACT is needed
    for a float32 y, and one correction does for a scale that was rounded to 16 bits.
    """
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(-quotient, y, x), reciprocal, quotient)
    if EXACT:
        quotient = tl.fma(tl.fma(-quotient, y, x), reciprocal, quotient)
    return quotient
