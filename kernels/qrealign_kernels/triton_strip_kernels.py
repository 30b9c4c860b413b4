"""Triton kernels that reduce the gradient of a rounded weight as a stream, where a column scale learns from it.

Two passes. The first walks down strips of columns, with the columns' sums in registers, and leaves for every row and
strip a few sums and a mark of where the row's extremes are. The second adds up each row, which tells what its extremes
get, and gives that to their columns. A weight and its gradient are read once; every sum has a fixed order, so two runs
give the same bits. `triton_weight_gradients.py` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qrealign_kernels.triton_gradient_kernels import store_bound_gradients, tile_moments
from qrealign_kernels.triton_math import INTERPRETED, load_columns, load_tile, round_to, store_tile
from qrealign_kernels.triton_overlap import wait_for_inputs
from qrealign_kernels.triton_weight import (
    kept_shares,
    load_logits,
    step_bounds,
    transformed_tile,
    weight_grid,
)

LANES = tl.constexpr(32)  # threads that share a row of a piece
HELD = tl.constexpr(8)  # neighbouring columns of one: 16 bytes of bfloat16
PIECE = tl.constexpr(256)  # columns of a piece of a strip, LANES * HELD
VALUES = tl.constexpr(8)  # of a row and strip, side by side: those of `_keep_grids`, and those of `_store_sums`
_GRID_ROWS = tl.constexpr(128)  # rows whose grids are computed at a time, one a thread
_MARK = tl.constexpr(64)  # what one lane adds to a mark besides its number; sums of all lanes stay below 2**16
_HIGH = tl.constexpr(16)  # bit from which on a mark speaks of the maximum
_TILE = tl.constexpr(64)  # columns that the second pass tells apart by their number within, and by that of the tile


@triton.jit
def _load_rows(
    low_ptr, high_ptr, extremes_ptr, n, m_n, N,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
):  # fmt: skip
    """Load the extremes of rows; return them, the kept shares, and the grid as `weight_grid` does."""
    minimum = tl.load(extremes_ptr + n, mask=m_n, other=0.0)
    maximum = tl.load(extremes_ptr + N + n, mask=m_n, other=0.0)
    low, high = load_logits(low_ptr, high_ptr, n, m_n, HAS_LOW, HAS_HIGH)
    low_share, high_share = kept_shares(low, high, HAS_LOW, HAS_HIGH)
    grid = weight_grid(minimum, maximum, low_share, high_share, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE)
    return minimum, maximum, low_share, high_share, grid


@triton.jit
def _keep_grids(
    low_ptr, high_ptr, extremes_ptr, kept_ptr, start, end, N,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
):  # fmt: skip
    """Compute the grids of a program's rows, a row a thread, and leave in memory what `_load_kept` takes.

    Computed where a row is reduced, its grid would cost each of the row's threads a chain of divisions.
    """
    for step in range(tl.cdiv(end - start, _GRID_ROWS)):
        n = start + step * _GRID_ROWS + tl.arange(0, _GRID_ROWS)
        m_n = n < end
        minimum, maximum, _, _, grid = _load_rows(
            low_ptr, high_ptr, extremes_ptr, n, m_n, N, HAS_LOW, HAS_HIGH, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
        )
        low, high, _, scale, reciprocal, zero_point, low_steps, high_steps = grid
        lowest, highest = step_bounds(low_steps, high_steps, zero_point, QMIN, QMAX)
        pointers = kept_ptr + n * VALUES
        tl.store(pointers, low, mask=m_n)
        tl.store(pointers + 1, high, mask=m_n)
        tl.store(pointers + 2, scale, mask=m_n)
        tl.store(pointers + 3, reciprocal, mask=m_n)
        tl.store(pointers + 4, minimum, mask=m_n)
        tl.store(pointers + 5, maximum, mask=m_n)
        tl.store(pointers + 6, lowest, mask=m_n)
        tl.store(pointers + 7, highest, mask=m_n)
    tl.debug_barrier()


@triton.jit
def _load_kept(kept_ptr, row_divisor_ptr, n, m_n, HAS_ROW: tl.constexpr):
    """Load of each row its bounds, scale, reciprocal, extremes and bounds in steps, and its divisor."""
    pointers = kept_ptr + n * VALUES
    low = tl.load(pointers, mask=m_n, other=0.0)
    high = tl.load(pointers + 1, mask=m_n, other=0.0)
    scale = tl.load(pointers + 2, mask=m_n, other=1.0)
    reciprocal = tl.load(pointers + 3, mask=m_n, other=1.0)
    minimum = tl.load(pointers + 4, mask=m_n, other=0.0)
    maximum = tl.load(pointers + 5, mask=m_n, other=0.0)
    lowest = tl.load(pointers + 6, mask=m_n, other=0.0)
    highest = tl.load(pointers + 7, mask=m_n, other=0.0)
    divisor = tl.full(n.shape, 1.0, tl.float32)
    if HAS_ROW:
        divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
    return low, high, scale, reciprocal, minimum, maximum, lowest, highest, divisor


@triton.jit
def _load_wide(pointers, mask, FULL: tl.constexpr):
    """Load a tile as `load_tile` does, two bfloat16 of a register by an instruction each: the compiler takes three."""
    x = tl.load(pointers) if FULL else tl.load(pointers, mask=mask, other=0.0)
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )


@triton.jit
def _divide_rows(x, y, reciprocal, EXACT: tl.constexpr):
    """Divide a tile by a number a row, to the bits of `divide`.

    Of both factors of a remainder it is the row's that is negated: Triton 3.6 spends a subtraction on each value.
    """
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(quotient, -y, x), reciprocal, quotient)
    if EXACT:
        quotient = tl.fma(tl.fma(quotient, -y, x), reciprocal, quotient)
    return quotient


@triton.jit
def _by_lane(tile, BLOCK_N: tl.constexpr):
    """View a piece `[BLOCK_N, PIECE]` as what each lane holds, `[BLOCK_N, LANES, HELD]`."""
    return tl.reshape(tile, [BLOCK_N, LANES, HELD])


@triton.jit
def _mark_lanes(b_min, b_max, minimum, maximum, BLOCK_N: tl.constexpr):
    """Return of each row which lanes hold an extreme, int32: for each, the sum of their numbers plus _MARK."""
    lanes = (tl.arange(0, LANES) + _MARK)[None, :]
    low = tl.where(tl.min(_by_lane(b_min, BLOCK_N), axis=2) <= minimum[:, None], lanes, 0)
    high = tl.where(tl.max(_by_lane(b_max, BLOCK_N), axis=2) >= maximum[:, None], lanes << _HIGH, 0)
    return tl.sum(low + high, axis=1)


@triton.jit
def _store_sums(pointers, to_scale, below, above, to_divisor, mark, m_n):
    """Store the sums of a strip of rows: what the scale gets, the gradients beyond its bounds, and a mark.

    A lane each: as vectors of the rows they would be carried over to other threads, behind barriers.
    """
    lanes = tl.arange(0, LANES)[None, :]
    values = tl.where(lanes == 0, to_scale[:, None], below[:, None])
    values = tl.where(lanes == 2, above[:, None], values)
    values = tl.where(lanes == 3, to_divisor[:, None], values)
    values = tl.where(lanes == 4, mark.to(tl.float32, bitcast=True)[:, None], values)
    tl.store(pointers[:, None] + lanes, values, mask=m_n[:, None] & (lanes < 5))


@triton.jit(do_not_specialize=["steps"])
def strip_gradients_bwd_kernel(
    grad_ptr, weight_ptr, low_ptr, high_ptr, column_scale_ptr, row_divisor_ptr, extremes_ptr,
    kept_ptr, sums_ptr, grad_column_ptr, N, K, steps,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    TO_ROW: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
    FULL: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    strip = tl.program_id(0)
    first = tl.program_id(1) * steps * BLOCK_N
    end = tl.minimum(N, first + steps * BLOCK_N)
    kept_ptr += strip * N * VALUES
    sums_ptr += strip * VALUES
    down = tl.num_programs(0) * VALUES  # from a row's sums to the next row's
    rows = tl.arange(0, BLOCK_N)
    cols = strip * PIECES * PIECE + tl.arange(0, PIECE)
    zeros = tl.zeros([BLOCK_N, PIECE], tl.float32)
    # Asked for before the grids, whose end all threads wait for.
    scales = ()  # of each piece, [BLOCK_N, PIECE]
    to_columns = ()
    for piece in tl.static_range(PIECES):
        o_k = cols + piece * PIECE
        scales += (load_columns(column_scale_ptr, zeros, o_k, o_k < K, FULL) if HAS_COLUMN else 1.0,)  # type: ignore[assignment]
        to_columns += (zeros,)  # type: ignore[assignment]
    _keep_grids(
        low_ptr, high_ptr, extremes_ptr, kept_ptr, first, end, N, HAS_LOW, HAS_HIGH, QMIN, QMAX, SYMMETRIC, SCALE_KIND,
        MIN_SCALE,
    )  # fmt: skip
    weight_ptr += first.to(tl.int64) * K
    grad_ptr += first.to(tl.int64) * K
    ahead = _load_kept(kept_ptr, row_divisor_ptr, first + rows, first + rows < end, HAS_ROW)
    offsets = rows[:, None] * K + cols[None, :]  # of the first piece, from a step's first row
    for step in tl.range(0, tl.cdiv(end - first, BLOCK_N), num_stages=AHEAD):
        n = first + step * BLOCK_N + rows
        m_n = n < end
        given = ()  # of each piece, weight and gradient
        for piece in tl.static_range(PIECES):
            mask = m_n[:, None] & (cols + piece * PIECE < K)[None, :]
            b_raw = _load_wide(weight_ptr + offsets + piece * PIECE, mask, FULL)
            b_g = _load_wide(grad_ptr + offsets + piece * PIECE, mask, FULL)
            given += ((b_raw, b_g),)  # type: ignore[assignment]
        weight_ptr += BLOCK_N * K
        grad_ptr += BLOCK_N * K
        low, high, scale, reciprocal, minimum, maximum, lowest, highest, divisor = ahead
        ahead = _load_kept(kept_ptr, row_divisor_ptr, n + BLOCK_N, n + BLOCK_N < end, HAS_ROW)
        over = tl.div_rn(1.0, divisor)[:, None]
        b_errors = zeros
        b_total = zeros
        b_not_high = zeros
        b_inside = zeros
        b_moment = zeros
        b_min = zeros
        b_max = zeros
        summed = ()
        for piece in tl.static_range(PIECES):
            b_raw, b_g = given[piece]
            b_w = transformed_tile(b_raw, scales[piece], divisor, HAS_COLUMN, False)
            if HAS_ROW:
                b_w = _divide_rows(b_w, divisor[:, None], over, True)
            b_quotient = _divide_rows(b_w, scale[:, None], reciprocal[:, None], SCALE_KIND == 0)
            b_error, b_middle, b_lower = tile_moments(
                b_g, b_w, b_quotient, low, high, lowest, highest, SYMMETRIC, SCALE_KIND
            )
            # The first piece is not added to zeros: the compiler would have to, for the sake of -0.
            b_errors = b_middle * b_error if piece == 0 else tl.fma(b_middle, b_error, b_errors)
            b_total = b_g if piece == 0 else b_total + b_g
            b_not_high = b_lower if piece == 0 else b_not_high + b_lower
            b_inside = b_middle if piece == 0 else b_inside + b_middle
            if TO_ROW:
                b_moment = tl.fma(b_middle, b_w, b_moment)
            b_min = b_w if piece == 0 else tl.minimum(b_min, b_w)
            b_max = b_w if piece == 0 else tl.maximum(b_max, b_w)
            if HAS_ROW:
                b_middle = b_middle * over
            summed += (tl.fma(b_middle, b_raw, to_columns[piece]),)  # type: ignore[assignment]
        to_columns = summed
        not_high = tl.sum(_by_lane(b_not_high, BLOCK_N), axis=2)
        below = not_high - tl.sum(_by_lane(b_inside, BLOCK_N), axis=2)
        above = tl.sum(_by_lane(b_total, BLOCK_N), axis=2) - not_high
        _store_sums(
            sums_ptr + n * down, tl.sum(b_errors, axis=1), tl.sum(below, axis=1), tl.sum(above, axis=1),
            tl.sum(b_moment, axis=1), _mark_lanes(b_min, b_max, minimum, maximum, BLOCK_N), m_n,
        )  # fmt: skip
    to_column_ptrs = grad_column_ptr + tl.program_id(1).to(tl.int64) * K + cols
    for piece in tl.static_range(PIECES):
        m_k = cols + piece * PIECE < K
        store_tile(to_column_ptrs + piece * PIECE, tl.sum(to_columns[piece], axis=0), m_k, FULL)


@triton.jit
def _load_sums(sums_ptr, n, m_n, strips, STRIPS: tl.constexpr):
    """Load what `_store_sums` left of rows; return the sums over the strips, and the marks, `[BLOCK_R, STRIPS]`."""
    strip = tl.arange(0, STRIPS)[None, :]
    pointers = sums_ptr + (n[:, None] * strips + strip) * VALUES
    mask = m_n[:, None] & (strip < strips)
    to_scale = tl.load(pointers, mask=mask, other=0.0)
    below = tl.load(pointers + 1, mask=mask, other=0.0)
    above = tl.load(pointers + 2, mask=mask, other=0.0)
    to_divisor = tl.load(pointers + 3, mask=mask, other=0.0)
    marks = tl.load(pointers + 4, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    return tl.sum(to_scale, axis=1), tl.sum(below, axis=1), tl.sum(above, axis=1), tl.sum(to_divisor, axis=1), marks


@triton.jit
def _places(marks, STRIPS: tl.constexpr):
    """Return of each row how many lanes hold an extreme, and, of a single one, its number in the row."""
    lanes = tl.arange(0, STRIPS)[None, :] * LANES + (marks & (LANES - 1))
    return tl.sum(marks // _MARK, axis=1), tl.sum(tl.where(marks > 0, lanes, 0), axis=1)


@triton.jit
def _find_extreme(
    weight_ptr, column_scale_ptr, divisor, extreme, place, n, m_n, K,
    HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Look for an extreme among the weights of one lane; return how many equal it, and of one the column and weight."""
    cols = tl.arange(0, PIECES * HELD)[None, :]
    strip, lane = place // LANES, place % LANES
    o_k = (strip * PIECES * PIECE + lane * HELD)[:, None] + (cols // HELD) * PIECE + cols % HELD
    mask = m_n[:, None] & (o_k < K)
    b_raw = load_tile(weight_ptr + n.to(tl.int64)[:, None] * K + o_k, mask, False)
    column_scale = 1.0
    if HAS_COLUMN:
        column_scale = load_tile(column_scale_ptr + o_k, mask, False)
    b_w = transformed_tile(b_raw, column_scale, divisor, HAS_COLUMN, HAS_ROW)
    found = mask & (b_w == extreme[:, None])
    count = tl.sum(found.to(tl.int32), axis=1)
    return count, tl.sum(tl.where(found, o_k, 0), axis=1), tl.sum(tl.where(found, b_raw, 0.0), axis=1)


@triton.jit
def _scatter(values, column, first, b_sums):
    """Add to a tile of sums, of _TILE * _TILE columns from `first` on: values of rows, each to its column.

    A product of two matrices of which each row has one entry: no order of additions depends on who comes first. The
    values go in as three bfloat16 each, which hold all their bits.
    """
    factor: tl.constexpr = tl.float32 if INTERPRETED else tl.bfloat16  # which the interpreter multiplies as integers
    numbers = tl.arange(0, _TILE)
    tile, within = (column - first) // _TILE, (column - first) % _TILE
    inside = (column >= first) & (column < first + _TILE * _TILE)
    in_tile = (numbers[:, None] == tile[None, :]) & inside[None, :]  # [_TILE, BLOCK_R]
    b_within = tl.where(within[:, None] == numbers[None, :], 1.0, 0.0).to(factor)  # [BLOCK_R, _TILE]
    for _ in tl.static_range(3):
        part = round_to(values, 2)
        b_sums = tl.dot(tl.where(in_tile, part[None, :], 0.0).to(factor), b_within, b_sums)
        values -= part
    return b_sums


@triton.jit
def _tied_tile(
    weight_ptr, column_scale_ptr, divisor, minimum, maximum, n, m_n, o_k, K, HAS_COLUMN: tl.constexpr,
    HAS_ROW: tl.constexpr,
):  # fmt: skip
    """Return a tile of the weights of rows, and which of them are the minimum and which the maximum."""
    mask = m_n[:, None] & (o_k < K)[None, :]
    b_raw = load_tile(weight_ptr + n.to(tl.int64)[:, None] * K + o_k[None, :], mask, False)
    column_scale = 1.0
    if HAS_COLUMN:
        column_scale = load_columns(column_scale_ptr, b_raw, o_k, o_k < K, False)
    b_w = transformed_tile(b_raw, column_scale, divisor, HAS_COLUMN, HAS_ROW)
    return b_raw, mask & (b_w == minimum[:, None]), mask & (b_w == maximum[:, None])


@triton.jit
def _add_tied(
    row_ptr, weight_ptr, column_scale_ptr, divisor, minimum, maximum, at_minimum, at_maximum, m_low, m_high, n, K,
    HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
):  # fmt: skip
    """Add to a row of column sums what weights get that share an extreme, of rows where some do."""
    m_n = m_low | m_high
    cols = tl.arange(0, _TILE)
    lows = tl.zeros(n.shape, tl.float32)
    highs = tl.zeros(n.shape, tl.float32)
    for first in range(0, K, _TILE):
        b_raw, is_lowest, is_highest = _tied_tile(
            weight_ptr, column_scale_ptr, divisor, minimum, maximum, n, m_n, first + cols, K, HAS_COLUMN, HAS_ROW
        )
        lows += tl.sum(tl.where(is_lowest, 1.0, 0.0), axis=1)
        highs += tl.sum(tl.where(is_highest, 1.0, 0.0), axis=1)
    to_low = tl.where(m_low, at_minimum / (tl.maximum(lows, 1.0) * divisor), 0.0)
    to_high = tl.where(m_high, at_maximum / (tl.maximum(highs, 1.0) * divisor), 0.0)
    for first in range(0, K, _TILE):
        o_k = first + cols
        b_raw, is_lowest, is_highest = _tied_tile(
            weight_ptr, column_scale_ptr, divisor, minimum, maximum, n, m_n, o_k, K, HAS_COLUMN, HAS_ROW
        )
        b_to = tl.where(is_lowest, to_low[:, None], 0.0) + tl.where(is_highest, to_high[:, None], 0.0)
        before = tl.load(row_ptr + o_k, mask=o_k < K, other=0.0)
        tl.store(row_ptr + o_k, before + tl.sum(b_to * b_raw, axis=0), mask=o_k < K)


@triton.jit(do_not_specialize=["strips"])
def extreme_gradients_bwd_kernel(
    weight_ptr, low_ptr, high_ptr, column_scale_ptr, row_divisor_ptr, extremes_ptr, sums_ptr,
    grad_low_ptr, grad_high_ptr, grad_column_ptr, grad_divisor_ptr, N, K, strips,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    TO_ROW: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
    STRIPS: tl.constexpr, BLOCK_R: tl.constexpr, PIECES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    m_n = n < N
    to_scale, below, above, to_divisor, marks = _load_sums(sums_ptr, n, m_n, strips, STRIPS)
    low_seen, low_place = _places(marks & 0xFFFF, STRIPS)
    high_seen, high_place = _places(marks >> _HIGH, STRIPS)
    minimum, maximum, low_share, high_share, grid = _load_rows(
        low_ptr, high_ptr, extremes_ptr, n, m_n, N, HAS_LOW, HAS_HIGH, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
    )
    low, high, raw_scale, _, _, zero_point, low_steps, high_steps = grid
    lowest, highest = step_bounds(low_steps, high_steps, zero_point, QMIN, QMAX)
    at_minimum, at_maximum = store_bound_gradients(
        grad_low_ptr, grad_high_ptr, n, m_n, to_scale, below, above, minimum, maximum, low_share, high_share, low, high,
        raw_scale, low_steps, high_steps, lowest, highest, HAS_LOW, HAS_HIGH, QMIN, QMAX, SYMMETRIC, MIN_SCALE,
    )  # fmt: skip
    divisor = tl.full([BLOCK_R], 1.0, tl.float32)
    if HAS_ROW:
        divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
    if TO_ROW:
        to_divisor += at_minimum * minimum + at_maximum * maximum
        tl.store(grad_divisor_ptr + n, -to_divisor / divisor, mask=m_n)

    # The extremes receive the gradient of the bounds they define.
    low_count, low_column, low_raw = _find_extreme(
        weight_ptr, column_scale_ptr, divisor, minimum, low_place, n, m_n & (low_seen == 1), K, HAS_COLUMN, HAS_ROW,
        PIECES,
    )  # fmt: skip
    high_count, high_column, high_raw = _find_extreme(
        weight_ptr, column_scale_ptr, divisor, maximum, high_place, n, m_n & (high_seen == 1), K, HAS_COLUMN, HAS_ROW,
        PIECES,
    )  # fmt: skip
    to_low = tl.where(low_count == 1, at_minimum * low_raw / divisor, 0.0)
    to_high = tl.where(high_count == 1, at_maximum * high_raw / divisor, 0.0)
    numbers = tl.arange(0, _TILE)
    row_ptr = grad_column_ptr + tl.program_id(0).to(tl.int64) * K
    for first in range(0, K, _TILE * _TILE):
        b_sums = _scatter(to_low, low_column, first, tl.zeros([_TILE, _TILE], tl.float32))
        b_sums = _scatter(to_high, high_column, first, b_sums)
        o_k = first + numbers[:, None] * _TILE + numbers[None, :]
        tl.store(row_ptr + o_k, b_sums, mask=o_k < K)

    # Ties share it equally. They are rare, and their rows are read again.
    low_tied = (low_seen > 1) | (low_count > 1)
    high_tied = (high_seen > 1) | (high_count > 1)
    if tl.max((m_n & (low_tied | high_tied)).to(tl.int32), axis=0) > 0:
        tl.debug_barrier()  # what was stored above is read and added to
        _add_tied(
            row_ptr, weight_ptr, column_scale_ptr, divisor, minimum, maximum, at_minimum, at_maximum,
            m_n & low_tied, m_n & high_tied, n, K, HAS_COLUMN, HAS_ROW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def add_rows_kernel(
    parts_ptr, out_ptr, parts, K, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    o_k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_P):
        mask = (first + rows < parts)[:, None] & (o_k < K)[None, :]
        b_sum += tl.load(parts_ptr + (first + rows)[:, None] * K + o_k[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + o_k, tl.sum(b_sum, axis=0), mask=o_k < K)
