"""Triton kernels that reduce the gradient of a rounded weight to all that the rounding depends on.

A program owns whole scale groups of its rows; every sum has a fixed order, so two runs give the same bits. Sums along
columns are kept in registers and leave as one row a program, which torch adds up. `triton_weight_gradients.py` launches
them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qrealign_kernels.triton_math import (
    clip,
    divide,
    load_columns,
    load_tile,
    round_half_even,
    row_extremes,
    row_sums_6,
    row_sums_7,
    store_tile,
)
from qrealign_kernels.triton_weight import (
    kept_shares,
    load_factors,
    load_logits,
    step_bounds,
    transformed_tile,
    weight_grid,
)


@triton.jit
def tile_moments(b_g, b_w, b_quotient, low, high, lowest, highest, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr):
    """Return of a tile what rounding leaves over, in steps, and the gradient without and with what lies above.

    `b_quotient` is the weight over the scale. Differences of the sums of the last two and of the whole gradient are the
    sums of what is clipped.
    """
    b_steps = round_half_even(b_quotient)
    if not (SYMMETRIC and SCALE_KIND == 2):  # there no weight between the bounds rounds to more than an end code
        b_steps = clip(b_steps, lowest[:, None], highest[:, None])
    b_not_high = tl.where(b_w > high[:, None], 0.0, b_g)
    b_inside = tl.where(b_w < low[:, None], 0.0, b_not_high)
    return b_steps - b_quotient, b_inside, b_not_high


@triton.jit
def store_bound_gradients(
    grad_low_ptr, grad_high_ptr, group, m_n, grad_scale, grad_low, grad_high, minimum, maximum, low_share, high_share,
    low, high, raw_scale, low_steps, high_steps, lowest, highest,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr,
    MIN_SCALE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the logits; return those of the extremes, to be shared by ties.

    `grad_scale` holds what unclipped weights give, `grad_low` and `grad_high` the sums of what is clipped.
    """
    # A clipped weight's error is that of its bound.
    grad_scale += grad_low * (lowest - low_steps) + grad_high * (highest - high_steps)
    grad_scale = tl.where(raw_scale >= MIN_SCALE, grad_scale, 0.0)
    if SYMMETRIC:  # the side that sets the scale gets its gradient; equal sides share it
        from_low = divide(low, QMIN * 1.0, 1.0 / QMIN, True)
        from_high = divide(high, QMAX * 1.0, 1.0 / QMAX, True)
        by_low = tl.where(from_low > from_high, 1.0, tl.where(from_low == from_high, 0.5, 0.0))
        grad_low += grad_scale * by_low * (1.0 / QMIN)
        grad_high += grad_scale * (1.0 - by_low) * (1.0 / QMAX)
    else:
        grad_low -= grad_scale * (1.0 / (QMAX - QMIN))
        grad_high += grad_scale * (1.0 / (QMAX - QMIN))
    # The extremes receive the gradient of the bounds they define; ties share it equally.
    at_minimum = tl.zeros_like(minimum)
    at_maximum = tl.zeros_like(maximum)
    if HAS_LOW:
        at_minimum = grad_low * low_share
        tl.store(grad_low_ptr + group, at_minimum * minimum * (1.0 - low_share), mask=m_n)
    if HAS_HIGH:
        at_maximum = grad_high * high_share
        tl.store(grad_high_ptr + group, at_maximum * maximum * (1.0 - high_share), mask=m_n)
    return at_minimum, at_maximum


@triton.jit
def _load_row_values(
    low_ptr, high_ptr, extremes_ptr, row_divisor_ptr, n, g, m_n, N, G,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_ROW: tl.constexpr, HAS_EXTREMES: tl.constexpr,
):  # fmt: skip
    """Load of each row logits, extremes and divisor, where there are such."""
    group = n * G + g
    low, high = load_logits(low_ptr, high_ptr, group, m_n, HAS_LOW, HAS_HIGH)
    minimum = tl.zeros(n.shape, tl.float32)
    maximum = tl.zeros(n.shape, tl.float32)
    divisor = tl.full(n.shape, 1.0, tl.float32)
    if HAS_EXTREMES and (HAS_LOW or HAS_HIGH):
        minimum = tl.load(extremes_ptr + group, mask=m_n, other=0.0)
        maximum = tl.load(extremes_ptr + N * G + group, mask=m_n, other=0.0)
    if HAS_ROW:
        divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
    return low, high, minimum, maximum, divisor


@triton.jit
def _reduce_tile(
    b_g, b_raw, column_scale, row_values, n, g, m_n, m_c, grad_low_ptr, grad_high_ptr, grad_divisor_ptr, grad_ptrs,
    N, G, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_EXTREMES: tl.constexpr, TO_COLUMN: tl.constexpr, TO_ROW: tl.constexpr, TO_WEIGHT: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Reduce the gradient of a tile of whole groups; store all but what goes to the column scale.

    Returns the tile's gradient over the row divisor: times the weight, it is what goes to the column scale.
    """
    low, high, minimum, maximum, divisor = row_values
    mask = m_n[:, None] & m_c[None, :]
    b_w = transformed_tile(b_raw, column_scale, divisor, HAS_COLUMN, HAS_ROW)
    to_divisor = tl.zeros(n.shape, tl.float32)
    if HAS_LOW or HAS_HIGH:
        low_share, high_share = kept_shares(low, high, HAS_LOW, HAS_HIGH)
        if not HAS_EXTREMES:
            minimum, maximum = row_extremes(b_w, b_w)
            minimum = tl.minimum(minimum, 0.0)
            maximum = tl.maximum(maximum, 0.0)
        low, high, raw_scale, scale, reciprocal, zero_point, low_steps, high_steps = weight_grid(
            minimum, maximum, low_share, high_share, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
        )
        lowest, highest = step_bounds(low_steps, high_steps, zero_point, QMIN, QMAX)
        b_quotient = divide(b_w, scale[:, None], reciprocal[:, None], SCALE_KIND == 0)
        b_error, b_inside, b_not_high = tile_moments(
            b_g, b_w, b_quotient, low, high, lowest, highest, SYMMETRIC, SCALE_KIND
        )
        is_lowest = b_w == minimum[:, None]
        is_highest = b_w == maximum[:, None]
        if not FULL:
            is_lowest = is_lowest & mask
            is_highest = is_highest & mask
        b_lows = tl.where(is_lowest, 1.0, 0.0)
        b_highs = tl.where(is_highest, 1.0, 0.0)
        b_error = b_inside * b_error
        if TO_ROW:
            grad_scale, total, not_high, inside, lows, highs, to_divisor = row_sums_7(
                b_error, b_g, b_not_high, b_inside, b_lows, b_highs, b_inside * b_w
            )
        else:
            grad_scale, total, not_high, inside, lows, highs = row_sums_6(
                b_error, b_g, b_not_high, b_inside, b_lows, b_highs
            )
        b_g = b_inside
        at_minimum, at_maximum = store_bound_gradients(
            grad_low_ptr, grad_high_ptr, n * G + g, m_n, grad_scale, not_high - inside, total - not_high, minimum,
            maximum, low_share, high_share, low, high, raw_scale, low_steps, high_steps, lowest, highest, HAS_LOW,
            HAS_HIGH, QMIN, QMAX, SYMMETRIC, MIN_SCALE,
        )  # fmt: skip
        # The extremes receive the gradient of the bounds they define; ties share it equally.
        to_divisor += at_minimum * minimum + at_maximum * maximum
        if TO_COLUMN or TO_WEIGHT:
            # No weight is beyond the extremes. Asked as above, the answers would be kept: bits, which cost more.
            is_lowest = b_w <= minimum[:, None]
            is_highest = b_w >= maximum[:, None]
            if not FULL:
                is_lowest = is_lowest & mask
                is_highest = is_highest & mask
            b_g += tl.where(is_lowest, (at_minimum / tl.maximum(lows, 1.0))[:, None], 0.0)
            b_g += tl.where(is_highest, (at_maximum / tl.maximum(highs, 1.0))[:, None], 0.0)
    elif TO_ROW:
        to_divisor = tl.sum(b_g * b_w, axis=1)
    if TO_WEIGHT:
        store_tile(grad_ptrs, b_g, mask, FULL)
    if TO_ROW:
        tl.store(grad_divisor_ptr + g * N + n, -to_divisor / divisor, mask=m_n)
    if TO_COLUMN and HAS_ROW:
        b_g = b_g * (1.0 / divisor)[:, None]
    return b_g


@triton.jit
def weight_gradients_bwd_kernel(
    grad_ptr, weight_ptr, low_ptr, high_ptr, column_scale_ptr, row_divisor_ptr, extremes_ptr,
    grad_low_ptr, grad_high_ptr, grad_column_ptr, grad_divisor_ptr, grad_edited_ptr, N, K, C, G, steps,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_EXTREMES: tl.constexpr, TO_COLUMN: tl.constexpr, TO_ROW: tl.constexpr, TO_WEIGHT: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
    FULL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    m_c = cols < C
    o_k = g * C + cols
    offsets = rows[:, None] * K + o_k[None, :]  # [BLOCK_N, BLOCK_C], from a step's first row
    b_column = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    column_scale = 1.0
    if HAS_COLUMN:
        column_scale = load_columns(column_scale_ptr, b_column, o_k, m_c, FULL)
    start = tl.program_id(1).to(tl.int64) * steps * BLOCK_N
    here = tl.minimum(steps, tl.cdiv(N - tl.program_id(1) * steps * BLOCK_N, BLOCK_N))
    # Values of rows come a step ahead: a chain of divisions waits for them.
    ahead = _load_row_values(
        low_ptr, high_ptr, extremes_ptr, row_divisor_ptr, start + rows, g, start + rows < N, N, G, HAS_LOW, HAS_HIGH,
        HAS_ROW, HAS_EXTREMES,
    )  # fmt: skip
    for step in tl.range(0, here, num_stages=AHEAD):
        first = start + step * BLOCK_N
        n = first + rows  # [BLOCK_N]
        m_n = n < N
        mask = m_n[:, None] & m_c[None, :]
        b_raw = load_tile(weight_ptr + first * K + offsets, mask, FULL)
        b_g = load_tile(grad_ptr + first * K + offsets, mask, FULL)
        row_values = ahead
        ahead = _load_row_values(
            low_ptr, high_ptr, extremes_ptr, row_divisor_ptr, n + BLOCK_N, g, n + BLOCK_N < N, N, G, HAS_LOW, HAS_HIGH,
            HAS_ROW, HAS_EXTREMES,
        )  # fmt: skip
        b_g = _reduce_tile(
            b_g, b_raw, column_scale, row_values, n, g, m_n, m_c, grad_low_ptr, grad_high_ptr, grad_divisor_ptr,
            grad_edited_ptr + first * K + offsets, N, G, HAS_LOW, HAS_HIGH, HAS_COLUMN, HAS_ROW, HAS_EXTREMES,
            TO_COLUMN, TO_ROW, TO_WEIGHT, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE, FULL,
        )  # fmt: skip
        if TO_COLUMN:
            b_column = tl.fma(b_g, b_raw, b_column)
    if TO_COLUMN:
        store_tile(grad_column_ptr + tl.program_id(1).to(tl.int64) * K + o_k, tl.sum(b_column, axis=0), m_c, FULL)


@triton.jit
def bound_gradients_bwd_kernel(
    grad_ptr, weight_ptr, low_ptr, high_ptr, column_scale_ptr, row_divisor_ptr, extremes_ptr,
    grad_low_ptr, grad_high_ptr, grad_divisor_ptr, N, K, C, G,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    TO_ROW: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
    FULL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    n = first + rows  # [BLOCK_N]
    m_n = n < N
    group = n * G + g
    minimum = tl.load(extremes_ptr + group, mask=m_n, other=0.0)
    maximum = tl.load(extremes_ptr + N * G + group, mask=m_n, other=0.0)
    low, high = load_logits(low_ptr, high_ptr, group, m_n, HAS_LOW, HAS_HIGH)
    low_share, high_share = kept_shares(low, high, HAS_LOW, HAS_HIGH)
    low, high, raw_scale, scale, reciprocal, zero_point, low_steps, high_steps = weight_grid(
        minimum, maximum, low_share, high_share, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
    )
    lowest, highest = step_bounds(low_steps, high_steps, zero_point, QMIN, QMAX)
    b_total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    b_lower = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    b_middle = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    b_errors = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    b_moment = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    offsets = rows[:, None] * K + (g * C + cols)[None, :]
    for start in tl.range(0, C, BLOCK_C, num_stages=AHEAD):
        m_k = start + cols < C
        mask = m_n[:, None] & m_k[None, :]
        b_w = load_tile(weight_ptr + first * K + offsets + start, mask, FULL)
        b_g = load_tile(grad_ptr + first * K + offsets + start, mask, FULL)
        o_k = g * C + start + cols
        column_scale, divisor = load_factors(
            b_w, n, o_k, m_n, m_k, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW, FULL
        )
        b_w = transformed_tile(b_w, column_scale, divisor, HAS_COLUMN, HAS_ROW)
        b_quotient = divide(b_w, scale[:, None], reciprocal[:, None], SCALE_KIND == 0)
        b_error, b_inside, b_not_high = tile_moments(
            b_g, b_w, b_quotient, low, high, lowest, highest, SYMMETRIC, SCALE_KIND
        )
        b_total += b_g
        b_lower += b_not_high
        b_middle += b_inside
        b_errors = tl.fma(b_inside, b_error, b_errors)
        if TO_ROW:
            b_moment = tl.fma(b_inside, b_w, b_moment)
    not_high = tl.sum(b_lower, axis=1)
    inside = tl.sum(b_middle, axis=1)
    at_minimum, at_maximum = store_bound_gradients(
        grad_low_ptr, grad_high_ptr, group, m_n, tl.sum(b_errors, axis=1), not_high - inside,
        tl.sum(b_total, axis=1) - not_high, minimum, maximum, low_share, high_share, low, high, raw_scale, low_steps,
        high_steps, lowest, highest, HAS_LOW, HAS_HIGH, QMIN, QMAX, SYMMETRIC, MIN_SCALE,
    )  # fmt: skip
    if TO_ROW:
        to_divisor = tl.sum(b_moment, axis=1) + at_minimum * minimum + at_maximum * maximum
        divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
        tl.store(grad_divisor_ptr + g * N + n, -to_divisor / divisor, mask=m_n)


@triton.jit
def product_gradients_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, low_ptr, high_ptr, column_scale_ptr, row_divisor_ptr,
    grad_low_ptr, grad_high_ptr, grad_column_ptr, grad_divisor_ptr, M, N, K, C, G,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    TO_COLUMN: tl.constexpr, TO_ROW: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    m_c = cols < C
    o_k = g * C + cols
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = first + rows  # [BLOCK_N]
    m_n = n < N
    b_g = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in tl.range(0, M, BLOCK_M, num_stages=AHEAD):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        m_m = (m < M)[:, None]
        b_dy = tl.load(grad_ptr + m[:, None] * N + n[None, :], mask=m_m & m_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        b_x = tl.load(x_ptr + m[:, None] * K + o_k[None, :], mask=m_m & m_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
        b_g = tl.dot(tl.trans(b_dy), b_x, acc=b_g, input_precision="ieee")
    offsets = rows[:, None] * K + o_k[None, :]
    b_raw = load_tile(weight_ptr + first * K + offsets, m_n[:, None] & m_c[None, :], False)
    column_scale = 1.0
    if HAS_COLUMN:
        column_scale = load_columns(column_scale_ptr, b_raw, o_k, m_c, False)
    row_values = _load_row_values(
        low_ptr, high_ptr, weight_ptr, row_divisor_ptr, n, g, m_n, N, G, HAS_LOW, HAS_HIGH, HAS_ROW, False
    )
    b_g = _reduce_tile(
        b_g, b_raw, column_scale, row_values, n, g, m_n, m_c, grad_low_ptr, grad_high_ptr, grad_divisor_ptr, weight_ptr,
        N, G, HAS_LOW, HAS_HIGH, HAS_COLUMN, HAS_ROW, False, TO_COLUMN, TO_ROW, False, QMIN, QMAX, SYMMETRIC,
        SCALE_KIND, MIN_SCALE, False,
    )  # fmt: skip
    if TO_COLUMN:
        tl.store(grad_column_ptr + tl.program_id(0).to(tl.int64) * K + o_k, tl.sum(b_g * b_raw, axis=0), mask=m_c)
