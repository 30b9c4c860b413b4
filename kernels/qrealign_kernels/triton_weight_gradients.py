"""Triton kernel that reduces the gradient of a rounded weight to all that the rounding depends on, in one pass.

A program owns whole scale groups of its rows and takes them one after the other; every sum has a fixed order, so two
runs give the same bits. Sums along columns are kept in registers and leave as one row a program, which torch adds up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches
from qrealign_kernels.reference import MIN_SCALE, code_range
from qrealign_kernels.reference_calibration import (
    WeightGradients,
    WeightTransform,
    fake_quant_edited_weight_ref,
    transformed_weight,
)
from qrealign_kernels.triton_common import LARGEST_WIDTH, on_device_of, tile_width
from qrealign_kernels.triton_math import (
    FLOAT_KINDS,
    FP_FUSION,
    clip,
    divide,
    load_tile,
    round_half_even,
    row_extremes,
    row_sums_2,
    row_sums_4,
    row_sums_5,
    store_tile,
)
from qrealign_kernels.triton_weight import (
    as_float,
    is_full,
    kept_shares,
    row_tile,
    share_source,
    step_bounds,
    transformed_tile,
    weight_grid,
)

# Where the product is reduced as it is made; docs/kernels.md has the measurements.
WIDEST_IN_PRODUCT = 128
MOST_TOKENS_IN_PRODUCT = 256


@triton.jit
def _tile_moments(
    b_g, b_w, low, high, scale, reciprocal, lowest, highest, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr
):
    """Return of a tile what rounding leaves over, in steps, and the gradient without and with what lies above.

    Differences of the sums of the last two and of the whole gradient are the sums of what is clipped.
    """
    b_quotient = divide(b_w, scale[:, None], reciprocal[:, None], SCALE_KIND == 0)
    b_steps = round_half_even(b_quotient)
    if not (SYMMETRIC and SCALE_KIND == 2):  # there no weight between the bounds rounds to more than an end code
        b_steps = clip(b_steps, lowest[:, None], highest[:, None])
    b_not_high = tl.where(b_w > high[:, None], 0.0, b_g)
    b_inside = tl.where(b_w < low[:, None], 0.0, b_not_high)
    return b_steps - b_quotient, b_inside, b_not_high


@triton.jit
def _store_bound_gradients(
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
def _reduce_tile(
    b_g, b_raw, n, o_k, m_n, m_c, g, first, offsets, N, K, G,
    low_ptr, high_ptr, column_scale_ptr, row_divisor_ptr, extremes_ptr,
    grad_low_ptr, grad_high_ptr, grad_divisor_ptr, grad_edited_ptr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_EXTREMES: tl.constexpr, TO_COLUMN: tl.constexpr, TO_ROW: tl.constexpr, TO_WEIGHT: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Reduce the gradient of a tile of whole groups; store all but what goes to the column scale.

    Returns the tile's gradient over the row divisor: times the weight, it is what goes to the column scale.
    """
    group = n * G + g
    mask = m_n[:, None] & m_c[None, :]
    b_w = transformed_tile(b_raw, n, o_k, m_n, m_c, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW, FULL)
    to_divisor = tl.zeros(n.shape, tl.float32)
    if HAS_LOW or HAS_HIGH:
        low_share, high_share = kept_shares(low_ptr, high_ptr, group, m_n, HAS_LOW, HAS_HIGH)
        if HAS_EXTREMES:
            minimum = tl.load(extremes_ptr + group, mask=m_n, other=0.0)
            maximum = tl.load(extremes_ptr + N * G + group, mask=m_n, other=0.0)
        else:
            minimum, maximum = row_extremes(b_w)
            minimum = tl.minimum(minimum, 0.0)
            maximum = tl.maximum(maximum, 0.0)
        low, high, raw_scale, scale, reciprocal, zero_point, low_steps, high_steps = weight_grid(
            minimum, maximum, low_share, high_share, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
        )
        lowest, highest = step_bounds(low_steps, high_steps, zero_point, QMIN, QMAX)
        b_error, b_inside, b_not_high = _tile_moments(
            b_g, b_w, low, high, scale, reciprocal, lowest, highest, SYMMETRIC, SCALE_KIND
        )
        b_error = b_inside * b_error
        if TO_ROW:
            grad_scale, total, not_high, inside, to_divisor = row_sums_5(
                b_error, b_g, b_not_high, b_inside, b_inside * b_w
            )
        else:
            grad_scale, total, not_high, inside = row_sums_4(b_error, b_g, b_not_high, b_inside)
        grad_low = not_high - inside
        grad_high = total - not_high
        b_g = b_inside
        at_minimum, at_maximum = _store_bound_gradients(
            grad_low_ptr, grad_high_ptr, group, m_n, grad_scale, grad_low, grad_high, minimum, maximum, low_share,
            high_share, low, high, raw_scale, low_steps, high_steps, lowest, highest, HAS_LOW, HAS_HIGH, QMIN, QMAX,
            SYMMETRIC, MIN_SCALE,
        )  # fmt: skip
        # The extremes receive the gradient of the bounds they define; ties share it equally.
        to_divisor += at_minimum * minimum + at_maximum * maximum
        if TO_COLUMN or TO_WEIGHT:
            is_lowest = b_w == minimum[:, None]
            is_highest = b_w == maximum[:, None]
            if not FULL:
                is_lowest = is_lowest & mask
                is_highest = is_highest & mask
            lows, highs = row_sums_2(tl.where(is_lowest, 1.0, 0.0), tl.where(is_highest, 1.0, 0.0))
            b_g += tl.where(is_lowest, (at_minimum / tl.maximum(lows, 1.0))[:, None], 0.0)
            b_g += tl.where(is_highest, (at_maximum / tl.maximum(highs, 1.0))[:, None], 0.0)
    elif TO_ROW:
        to_divisor = tl.sum(b_g * b_w, axis=1)
    if TO_WEIGHT:
        store_tile(grad_edited_ptr + first * K + offsets, b_g, mask, FULL)
    if TO_ROW:
        divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
        tl.store(grad_divisor_ptr + g * N + n, -to_divisor / divisor, mask=m_n)
    if TO_COLUMN and HAS_ROW:
        b_g = b_g * (1.0 / tl.load(row_divisor_ptr + n, mask=m_n, other=1.0))[:, None]
    return b_g


@triton.jit
def _weight_gradients_bwd_kernel(
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
    start = tl.program_id(1).to(tl.int64) * steps * BLOCK_N
    here = tl.minimum(steps, tl.cdiv(N - tl.program_id(1) * steps * BLOCK_N, BLOCK_N))
    for step in tl.range(0, here, num_stages=AHEAD):
        first = start + step * BLOCK_N
        n = first + rows  # [BLOCK_N]
        m_n = n < N
        mask = m_n[:, None] & m_c[None, :]
        b_raw = load_tile(weight_ptr + first * K + offsets, mask, FULL)
        b_g = load_tile(grad_ptr + first * K + offsets, mask, FULL)
        b_g = _reduce_tile(
            b_g, b_raw, n, o_k, m_n, m_c, g, first, offsets, N, K, G, low_ptr, high_ptr, column_scale_ptr,
            row_divisor_ptr, extremes_ptr, grad_low_ptr, grad_high_ptr, grad_divisor_ptr, grad_edited_ptr, HAS_LOW,
            HAS_HIGH, HAS_COLUMN, HAS_ROW, HAS_EXTREMES, TO_COLUMN, TO_ROW, TO_WEIGHT, QMIN, QMAX, SYMMETRIC,
            SCALE_KIND, MIN_SCALE, FULL,
        )  # fmt: skip
        if TO_COLUMN:
            b_column = tl.fma(b_g, b_raw, b_column)
    if TO_COLUMN:
        store_tile(grad_column_ptr + tl.program_id(1).to(tl.int64) * K + o_k, tl.sum(b_column, axis=0), m_c, FULL)


@triton.jit
def _bound_gradients_bwd_kernel(
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
    low_share, high_share = kept_shares(low_ptr, high_ptr, group, m_n, HAS_LOW, HAS_HIGH)
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
        b_w = transformed_tile(b_w, n, o_k, m_n, m_k, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW, FULL)
        b_error, b_inside, b_not_high = _tile_moments(
            b_g, b_w, low, high, scale, reciprocal, lowest, highest, SYMMETRIC, SCALE_KIND
        )
        b_total += b_g
        b_lower += b_not_high
        b_middle += b_inside
        b_errors = tl.fma(b_inside, b_error, b_errors)
        if TO_ROW:
            b_moment = tl.fma(b_inside, b_w, b_moment)
    not_high = tl.sum(b_lower, axis=1)
    inside = tl.sum(b_middle, axis=1)
    at_minimum, at_maximum = _store_bound_gradients(
        grad_low_ptr, grad_high_ptr, group, m_n, tl.sum(b_errors, axis=1), not_high - inside,
        tl.sum(b_total, axis=1) - not_high, minimum, maximum, low_share, high_share, low, high, raw_scale, low_steps,
        high_steps, lowest, highest, HAS_LOW, HAS_HIGH, QMIN, QMAX, SYMMETRIC, MIN_SCALE,
    )  # fmt: skip
    if TO_ROW:
        to_divisor = tl.sum(b_moment, axis=1) + at_minimum * minimum + at_maximum * maximum
        divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
        tl.store(grad_divisor_ptr + g * N + n, -to_divisor / divisor, mask=m_n)


@triton.jit
def _product_gradients_bwd_kernel(
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
    b_g = _reduce_tile(
        b_g, b_raw, n, o_k, m_n, m_c, g, first, offsets, N, K, G, low_ptr, high_ptr, column_scale_ptr,
        row_divisor_ptr, weight_ptr, grad_low_ptr, grad_high_ptr, grad_divisor_ptr, weight_ptr, HAS_LOW, HAS_HIGH,
        HAS_COLUMN, HAS_ROW, False, TO_COLUMN, TO_ROW, False, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE, False,
    )  # fmt: skip
    if TO_COLUMN:
        tl.store(grad_column_ptr + tl.program_id(0).to(tl.int64) * K + o_k, tl.sum(b_g * b_raw, axis=0), mask=m_c)


def edited_weight_gradients(
    grad: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    *,
    transform: WeightTransform,
    wanted: frozenset[str],
    extremes: Tensor | None = None,
    **grid: Any,
) -> WeightGradients:
    """Compute the gradients of `fake_quant_edited_weight_ref` that are wanted, by their names in `WeightGradients`.

    `extremes` is what `triton_weight.fake_quant_edited_weight` kept, or None to find them again. Reductions alone need no tensor of the weight's size. The weight and the factors of an edit do: their gradients
    are made of the `[N, K]` gradient of the edited weight.
    """
    width = grid["group_size"] or weight.shape[1]
    if width > LARGEST_WIDTH:
        return _gradients_by_definition(grad, weight, low_logit, high_logit, transform, wanted, **grid)
    if transform.left is None:
        reduction = _Reduction(weight.contiguous(), low_logit, high_logit, transform, wanted, **grid)
        if extremes is not None and not wanted & {"weight", "column_scale"}:
            return _reduce_streamed(grad, reduction, extremes)
        found = _reduce_stored(grad, reduction, extremes)
        if found.weight is None:
            return found
        return found._replace(weight=_through_transform(found.weight, transform).to(weight.dtype))
    edited = transformed_weight(weight, transform)
    reduction = _Reduction(edited, low_logit, high_logit, WeightTransform(), frozenset({"weight"}), **grid)
    return _through_edit(_reduce_stored(grad, reduction, None), weight, transform, wanted)


@dataclasses.dataclass(frozen=True)
class _Reduction:
    """The arguments and results that both kernels share: what a gradient is reduced to."""

    weight: Tensor
    low_logit: Tensor | None
    high_logit: Tensor | None
    transform: WeightTransform
    wanted: frozenset[str]
    num_bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def width(self) -> int:
        """Columns of a scale group."""
        return self.group_size or self.weight.shape[1]

    def arguments(self) -> list[Tensor | None]:
        """Return what the kernels read besides weight and gradient."""
        column_scale, row_divisor = (None if part is None else as_float(part) for part in self.transform[:2])
        return [share_source(self.low_logit), share_source(self.high_logit), column_scale, row_divisor]

    def results(self, programs: int) -> list[Tensor | None]:
        """Return what the kernels fill: gradients of the logits, partial sums of column scale and row divisor."""
        rows, columns = self.weight.shape
        groups = columns // self.width
        shapes = (
            (rows, groups) if self.low_logit is not None else None,
            (rows, groups) if self.high_logit is not None else None,
            (programs, columns) if "column_scale" in self.wanted else None,
            (groups, rows) if "row_divisor" in self.wanted else None,
        )
        return [
            None if shape is None else torch.empty(shape, dtype=torch.float32, device=self.weight.device)
            for shape in shapes
        ]

    def constants(self) -> dict[str, Any]:
        """Return the constexpr arguments that both kernels have."""
        qmin, qmax = code_range(self.num_bits)
        return {
            "HAS_LOW": self.low_logit is not None,
            "HAS_HIGH": self.high_logit is not None,
            "HAS_COLUMN": self.transform.column_scale is not None,
            "HAS_ROW": self.transform.row_divisor is not None,
            "TO_COLUMN": "column_scale" in self.wanted,
            "TO_ROW": "row_divisor" in self.wanted,
            "QMIN": qmin,
            "QMAX": qmax,
            "SYMMETRIC": self.symmetric,
            "SCALE_KIND": FLOAT_KINDS[self.scale_dtype],
            "MIN_SCALE": MIN_SCALE,
            "enable_fp_fusion": FP_FUSION,
        }

    def gradients(self, results: list[Tensor | None]) -> WeightGradients:
        """Return what the kernels filled, summed over the programs."""
        to_low, to_high, to_column, to_divisor = results
        return WeightGradients(
            low_logit=_like(to_low, self.low_logit),
            high_logit=_like(to_high, self.high_logit),
            column_scale=None if to_column is None else _like(to_column.sum(0), self.transform.column_scale),
            row_divisor=None if to_divisor is None else _like(to_divisor.sum(0), self.transform.row_divisor),
        )


def _pointers(weight: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    """Return a kernel's pointer arguments; one that it does not follow points to the weight."""
    return [weight if tensor is None else tensor for tensor in tensors]


def _reduce_stored(grad: Tensor, reduction: _Reduction, extremes: Tensor | None) -> WeightGradients:
    """Reduce a stored gradient; the field `weight`, where wanted, is that of the edited weight, in float32."""
    weight = reduction.weight
    rows, columns = weight.shape
    tile = row_tile("weight_gradients_bwd", reduction.width, weight.device)
    # As many programs as run at once: each leaves a row of sums over its rows, and memory is to hold few of these.
    groups, tiles = columns // reduction.width, triton.cdiv(rows, tile["BLOCK_N"])
    steps = triton.cdiv(tiles, max(1, tile.pop("PROGRAMS") // groups))
    programs = triton.cdiv(tiles, steps)
    results = reduction.results(programs)
    to_weight = None
    if "weight" in reduction.wanted:
        to_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    with on_device_of(weight):
        _weight_gradients_bwd_kernel[(groups, programs)](
            grad.contiguous(),
            weight,
            *_pointers(weight, [*reduction.arguments(), extremes, *results, to_weight]),
            rows,
            columns,
            reduction.width,
            groups,
            steps,
            FULL=is_full(rows, reduction.width, tile),
            HAS_EXTREMES=extremes is not None,
            TO_WEIGHT=to_weight is not None,
            **reduction.constants(),
            **tile,
        )
    return reduction.gradients(results)._replace(weight=to_weight)


def _reduce_streamed(grad: Tensor, reduction: _Reduction, extremes: Tensor) -> WeightGradients:
    """Reduce a stored gradient to logits and row divisor, where the groups' extremes are known.

    Then no weight is needed twice: rows are walked in steps by a few threads each, which the work on a group's grid
    costs little of.
    """
    weight = reduction.weight
    rows, columns = weight.shape
    groups = columns // reduction.width
    key = "rows" if groups == 1 else "groups"
    tile = launches.choice("bound_gradients_bwd", key, weight.device)
    tile = tile | {"BLOCK_C": min(tile["BLOCK_C"], tile_width(reduction.width))}
    results = reduction.results(0)
    constants = reduction.constants()
    del constants["TO_COLUMN"]
    with on_device_of(weight):
        _bound_gradients_bwd_kernel[(groups, triton.cdiv(rows, tile["BLOCK_N"]))](
            grad.contiguous(),
            weight,
            *_pointers(weight, [*reduction.arguments(), extremes, results[0], results[1], results[3]]),
            rows,
            columns,
            reduction.width,
            groups,
            FULL=reduction.width % tile["BLOCK_C"] == 0 and rows % tile["BLOCK_N"] == 0,
            **constants,
            **tile,
        )
    return reduction.gradients(results)


def _reduce_product(grad: Tensor, x: Tensor, reduction: _Reduction) -> WeightGradients:
    """Reduce `grad.T @ x` tile by tile; groups fit a tile."""
    weight = reduction.weight
    rows, columns = weight.shape
    tile = launches.choice("product_gradients_bwd", launches.DEFAULT, weight.device)
    block = max(16, tile_width(reduction.width))
    programs = triton.cdiv(rows, tile["BLOCK_N"])
    results = reduction.results(programs)
    with on_device_of(weight):
        _product_gradients_bwd_kernel[(programs, columns // reduction.width)](
            grad.contiguous(),
            x.contiguous(),
            weight,
            *_pointers(weight, [*reduction.arguments(), *results]),
            x.shape[0],
            rows,
            columns,
            reduction.width,
            columns // reduction.width,
            BLOCK_C=block,
            **reduction.constants(),
            **tile,
        )
    return reduction.gradients(results)


def reduced_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    *,
    transform: WeightTransform,
    **grid: Any,
) -> WeightGradients:
    """Compute `reference_calibration.reduced_weight_gradient_ref` by the form that moves less.

    Reducing in the product reads a weight once, 2 bytes in bfloat16; storing the product first writes and reads it, 6
    bytes. But torch's own product is the faster one, which counts more the more tokens there are; and where a group is
    a whole row no tile holds it, so that its grid would take another reading.
    """
    names = ("low_logit", "high_logit", *WeightTransform._fields[:2])
    given = (low_logit, high_logit, *transform[:2])
    wanted = frozenset(name for name, tensor in zip(names, given, strict=True) if tensor is not None)
    reduction = _Reduction(weight.contiguous(), low_logit, high_logit, transform, wanted, **grid)
    if reduction.width <= WIDEST_IN_PRODUCT and x.shape[0] <= MOST_TOKENS_IN_PRODUCT:
        return _reduce_product(grad, x.to(grad.dtype), reduction)
    product = grad.T @ x.to(grad.dtype)
    return edited_weight_gradients(product, weight, low_logit, high_logit, transform=transform, wanted=wanted, **grid)


def _like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """Return a gradient in the dtype of what it belongs to."""
    return None if gradient is None or tensor is None else gradient.to(tensor.dtype)


def _through_transform(grad_edited: Tensor, transform: WeightTransform) -> Tensor:
    """Return the weight's gradient, float32."""
    if transform.row_divisor is not None:
        grad_edited = grad_edited / transform.row_divisor[:, None].float()
    return grad_edited if transform.column_scale is None else grad_edited * transform.column_scale.float()


def _through_edit(
    found: WeightGradients, weight: Tensor, transform: WeightTransform, wanted: frozenset[str]
) -> WeightGradients:
    """Return the gradients wanted, from that of the edited weight."""
    column_scale, row_divisor, left, right = transform
    grad_edited = found.weight
    assert grad_edited is not None and left is not None and right is not None
    to_column = to_divisor = None
    if "column_scale" in wanted:
        to_column = _like(
            (_through_transform(grad_edited, WeightTransform(None, row_divisor)) * weight).sum(0), column_scale
        )
    if "row_divisor" in wanted and row_divisor is not None:
        unedited = transformed_weight(weight, WeightTransform(column_scale, row_divisor))
        to_divisor = _like(-(grad_edited * unedited).sum(1) / row_divisor, row_divisor)
    return found._replace(
        weight=_through_transform(grad_edited, transform).to(weight.dtype) if "weight" in wanted else None,
        column_scale=to_column,
        row_divisor=to_divisor,
        left=_like(grad_edited @ right.float().T, left) if "left" in wanted else None,
        right=_like(left.float().T @ grad_edited, right) if "right" in wanted else None,
    )


def _gradients_by_definition(
    grad: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    transform: WeightTransform,
    wanted: frozenset[str],
    **grid: Any,
) -> WeightGradients:
    """Return the gradients of groups that no tile holds, by torch's autograd."""
    given = zip(WeightGradients._fields, (weight, low_logit, high_logit, *transform), strict=True)
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in wanted) for name, tensor in given
    }
    with torch.enable_grad():
        fake = fake_quant_edited_weight_ref(
            weight if leaves["weight"] is None else leaves["weight"],
            leaves["low_logit"],
            leaves["high_logit"],
            transform=WeightTransform(*(leaves[name] for name in WeightTransform._fields)),
            **grid,
        )
    inputs = {name: leaf for name, leaf in leaves.items() if leaf is not None and name in wanted}
    found = torch.autograd.grad(fake, list(inputs.values()), grad.float())
    return WeightGradients(**dict(zip(inputs, found, strict=True)))
