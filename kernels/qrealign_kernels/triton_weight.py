"""Triton kernels that transform, edit and round a weight in one pass, and reduce the gradients of that in one.

A program owns whole scale groups of a few rows, so that each sum has a fixed order and two runs give the same bits.
Where a group fits a tile, its weights are read once, stay in registers, and whatever the backward needs of the grid is
computed again: the forward keeps nothing. Only an edit takes a second path, in steps along the columns, because its
product `left @ right` pays off for tiles of many rows, which registers cannot hold in full width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches
from qrealign_kernels.reference import MIN_SCALE, code_range, kept_share
from qrealign_kernels.reference_calibration import (
    WeightGradients,
    WeightTransform,
    fake_quant_edited_weight_ref,
    transformed_weight,
)
from qrealign_kernels.triton_common import LARGEST_WIDTH, on_device_of, tile_width, width_key
from qrealign_kernels.triton_math import (
    FLOAT_KINDS,
    FP_FUSION,
    clip,
    convert,
    divide,
    round_half_even,
    round_to,
    to_int8,
)


@triton.jit
def _weight_grid(
    minimum, maximum, low_share, high_share,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
):  # fmt: skip
    """Return bounds, raw scale, scale and zero point of each group."""
    low = minimum * low_share
    high = maximum * high_share
    if SYMMETRIC:
        raw_scale = tl.maximum(tl.div_rn(high, QMAX * 1.0), tl.div_rn(low, QMIN * 1.0))
    else:
        raw_scale = tl.div_rn(high - low, (QMAX - QMIN) * 1.0)
    scale = round_to(tl.maximum(raw_scale, MIN_SCALE), SCALE_KIND)
    zero_point = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero_point = clip(round_half_even(QMIN - tl.div_rn(low, scale)), QMIN * 1.0, QMAX * 1.0)
    return low, high, raw_scale, scale, zero_point


@triton.jit
def _steps(b_w, low, high, scale, zero_point, QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_KIND: tl.constexpr):
    """Return `code - zero_point` of each weight; bounds and grid are `[rows, 1]`.

    Dividing by a positive scale and rounding never swap two values: clipping the weight to its bounds and clipping its
    steps to those of the bounds are the same, and the second joins the clip to the code range.
    """
    reciprocal = tl.div_rn(1.0, scale)
    lowest = tl.maximum(round_half_even(tl.div_rn(low, scale)), QMIN - zero_point)
    highest = tl.minimum(round_half_even(tl.div_rn(high, scale)), QMAX - zero_point)
    return clip(round_half_even(divide(b_w, scale, reciprocal, SCALE_KIND == 0)), lowest, highest)


@triton.jit
def _store_rounded(
    out_ptr, scale_ptr, zero_point_ptr, offsets, mask, b_w, minimum, maximum, low_share, high_share, group, m_n,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr,
    MIN_SCALE: tl.constexpr,
):  # fmt: skip
    """Store a tile as codes or as rounded weights; scales and zero points go with codes, and are the same each time."""
    low, high, _, scale, zero_point = _weight_grid(
        minimum, maximum, low_share, high_share, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
    )
    steps = _steps(b_w, low[:, None], high[:, None], scale[:, None], zero_point[:, None], QMIN, QMAX, SCALE_KIND)
    if CODES:
        tl.store(out_ptr + offsets, to_int8(steps + zero_point[:, None]), mask=mask)
        tl.store(scale_ptr + group, scale, mask=m_n)
        if not SYMMETRIC:
            tl.store(zero_point_ptr + group, to_int8(zero_point), mask=m_n)
    else:
        tl.store(out_ptr + offsets, convert(steps * scale[:, None], out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shares(low_share_ptr, high_share_ptr, group, m_n, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    """Return the kept shares of the groups' extremes, 1 where no logit asks for less."""
    low_share = tl.full(group.shape, 1.0, tl.float32)
    high_share = tl.full(group.shape, 1.0, tl.float32)
    if HAS_LOW:
        low_share = tl.load(low_share_ptr + group, mask=m_n, other=1.0)
    if HAS_HIGH:
        high_share = tl.load(high_share_ptr + group, mask=m_n, other=1.0)
    return low_share, high_share


@triton.jit
def _transformed(
    b_w, n, o_k, m_n, m_k, column_scale_ptr, row_divisor_ptr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr
):
    """Return `weight * column_scale / row_divisor` of a tile."""
    if HAS_COLUMN:
        b_w = b_w * tl.load(column_scale_ptr + o_k, mask=m_k, other=0.0)[None, :]
    if HAS_ROW:
        divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
        b_w = divide(b_w, divisor[:, None], tl.div_rn(1.0, divisor)[:, None], True)
    return b_w


@triton.jit
def _fake_quant_edited_fwd_kernel(
    weight_ptr, low_share_ptr, high_share_ptr, column_scale_ptr, row_divisor_ptr, out_ptr, scale_ptr, zero_point_ptr,
    N, K, C,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr,
    MIN_SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    m_c = cols < C
    o_k = g * C + cols
    first = tl.program_id(1).to(tl.int64) * (BLOCK_N * STEPS)
    for step in tl.range(0, STEPS, num_stages=AHEAD):
        n = first + step * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        m_n = n < N
        group = n * (K // C) + g
        offsets = n[:, None] * K + o_k[None, :]  # [BLOCK_N, BLOCK_C]
        mask = m_n[:, None] & m_c[None, :]
        b_w = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        b_w = _transformed(b_w, n, o_k, m_n, m_c, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW)
        minimum = tl.minimum(tl.min(b_w, axis=1), 0.0)
        maximum = tl.maximum(tl.max(b_w, axis=1), 0.0)
        low_share, high_share = _shares(low_share_ptr, high_share_ptr, group, m_n, HAS_LOW, HAS_HIGH)
        _store_rounded(
            out_ptr, scale_ptr, zero_point_ptr, offsets, mask, b_w, minimum, maximum, low_share, high_share, group,
            m_n, CODES, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE,
        )  # fmt: skip


@triton.jit
def _edited_tile(
    weight_ptr, column_scale_ptr, row_divisor_ptr, right_ptr, b_left, n, m_n, o_k, m_k, K, RANK,
    HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr, HAS_EDIT: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Return the transformed and edited weight of a tile."""
    mask = m_n[:, None] & m_k[None, :]
    b_w = tl.load(weight_ptr + n[:, None] * K + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    b_w = _transformed(b_w, n, o_k, m_n, m_k, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW)
    if HAS_EDIT:
        ranks = tl.arange(0, BLOCK_RANK)
        m_rk = (ranks < RANK)[:, None] & m_k[None, :]
        b_right = tl.load(right_ptr + ranks[:, None] * K + o_k[None, :], mask=m_rk, other=0.0)  # [BLOCK_RANK, BLOCK_C]
        # Three products of the halves of a float32 that tensor cores take: as exact as float32, and faster.
        b_w = b_w + tl.dot(b_left, b_right, input_precision="tf32x3")
    return b_w


@triton.jit
def _fake_quant_edited_steps_fwd_kernel(
    weight_ptr, low_share_ptr, high_share_ptr, column_scale_ptr, row_divisor_ptr, left_ptr, right_ptr, out_ptr,
    scale_ptr, zero_point_ptr, N, K, C, RANK,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_EDIT: tl.constexpr, CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr,
    SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, ONE_STEP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = n < N
    group = n * (K // C) + g
    cols = tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_RANK)
    b_left = tl.zeros([BLOCK_N, BLOCK_RANK], tl.float32)
    if HAS_EDIT:
        m_left = m_n[:, None] & (ranks < RANK)[None, :]
        b_left = tl.load(left_ptr + n[:, None] * RANK + ranks[None, :], mask=m_left, other=0.0)
    low_share, high_share = _shares(low_share_ptr, high_share_ptr, group, m_n, HAS_LOW, HAS_HIGH)

    # Extremes are tiles and are reduced once, behind the loop: fewer exchanges between threads, and Triton 3.6 fails to
    # compile a loop whose reduced result has several uses.
    b_min = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    b_max = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    if ONE_STEP:
        m_k = cols < C
        b_w = _edited_tile(
            weight_ptr, column_scale_ptr, row_divisor_ptr, right_ptr, b_left, n, m_n, g * C + cols, m_k, K, RANK,
            HAS_COLUMN, HAS_ROW, HAS_EDIT, BLOCK_RANK,
        )  # fmt: skip
        _store_rounded(
            out_ptr, scale_ptr, zero_point_ptr, n[:, None] * K + (g * C + cols)[None, :], m_n[:, None] & m_k[None, :],
            b_w, tl.minimum(tl.min(b_w, axis=1), 0.0), tl.maximum(tl.max(b_w, axis=1), 0.0), low_share, high_share,
            group, m_n, CODES, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE,
        )  # fmt: skip
    else:
        for start in tl.range(0, C, BLOCK_C, num_stages=AHEAD):
            m_k = start + cols < C
            b_w = _edited_tile(
                weight_ptr, column_scale_ptr, row_divisor_ptr, right_ptr, b_left, n, m_n, g * C + start + cols, m_k, K,
                RANK, HAS_COLUMN, HAS_ROW, HAS_EDIT, BLOCK_RANK,
            )  # fmt: skip
            b_min = tl.minimum(b_min, b_w)
            b_max = tl.maximum(b_max, b_w)
        minimum = tl.min(b_min, axis=1)
        maximum = tl.max(b_max, axis=1)
        for start in tl.range(0, C, BLOCK_C, num_stages=AHEAD):
            m_k = start + cols < C
            o_k = g * C + start + cols
            b_w = _edited_tile(
                weight_ptr, column_scale_ptr, row_divisor_ptr, right_ptr, b_left, n, m_n, o_k, m_k, K, RANK,
                HAS_COLUMN, HAS_ROW, HAS_EDIT, BLOCK_RANK,
            )  # fmt: skip
            _store_rounded(
                out_ptr, scale_ptr, zero_point_ptr, n[:, None] * K + o_k[None, :], m_n[:, None] & m_k[None, :], b_w,
                minimum, maximum, low_share, high_share, group, m_n, CODES, QMIN, QMAX, SYMMETRIC, SCALE_KIND,
                MIN_SCALE,
            )  # fmt: skip


@triton.jit
def _weight_gradients_bwd_kernel(
    grad_ptr, weight_ptr, low_share_ptr, high_share_ptr, column_scale_ptr, row_divisor_ptr,
    grad_low_ptr, grad_high_ptr, grad_column_ptr, grad_divisor_ptr, grad_edited_ptr, N, K, C,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    TO_COLUMN: tl.constexpr, TO_ROW: tl.constexpr, TO_WEIGHT: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    m_c = cols < C
    o_k = g * C + cols
    first = tl.program_id(1).to(tl.int64) * (BLOCK_N * STEPS)
    b_column = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for step in tl.range(0, STEPS, num_stages=AHEAD):
        n = first + step * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        m_n = n < N
        group = n * (K // C) + g
        offsets = n[:, None] * K + o_k[None, :]  # [BLOCK_N, BLOCK_C]
        mask = m_n[:, None] & m_c[None, :]
        b_raw = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        b_g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        b_w = _transformed(b_raw, n, o_k, m_n, m_c, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW)
        if HAS_LOW or HAS_HIGH:
            minimum = tl.minimum(tl.min(b_w, axis=1), 0.0)
            maximum = tl.maximum(tl.max(b_w, axis=1), 0.0)
            low_share, high_share = _shares(low_share_ptr, high_share_ptr, group, m_n, HAS_LOW, HAS_HIGH)
            low, high, raw_scale, scale, zero_point = _weight_grid(
                minimum, maximum, low_share, high_share, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
            )
            steps = _steps(
                b_w, low[:, None], high[:, None], scale[:, None], zero_point[:, None], QMIN, QMAX, SCALE_KIND
            )
            # What a code's error gives to the scale: at a clipped weight the error of its bound.
            error = steps * scale[:, None] - clip(b_w, low[:, None], high[:, None])
            grad_scale = tl.div_rn(tl.sum(b_g * error, axis=1), scale)
            below = b_w < low[:, None]
            above = b_w > high[:, None]
            grad_low = tl.sum(tl.where(below, b_g, 0.0), axis=1)
            grad_high = tl.sum(tl.where(above, b_g, 0.0), axis=1)
            grad_scale = tl.where(raw_scale >= MIN_SCALE, grad_scale, 0.0)
            if SYMMETRIC:  # the side that sets the scale gets its gradient; equal sides share it
                from_low = tl.div_rn(low, QMIN * 1.0)
                from_high = tl.div_rn(high, QMAX * 1.0)
                by_low = tl.where(from_low > from_high, 1.0, tl.where(from_low == from_high, 0.5, 0.0))
                grad_low += grad_scale * by_low / QMIN
                grad_high += grad_scale * (1.0 - by_low) / QMAX
            else:
                grad_low -= grad_scale / (QMAX - QMIN)
                grad_high += grad_scale / (QMAX - QMIN)
            if HAS_LOW:
                tl.store(grad_low_ptr + group, grad_low * minimum * low_share * (1.0 - low_share), mask=m_n)
            if HAS_HIGH:
                tl.store(grad_high_ptr + group, grad_high * maximum * high_share * (1.0 - high_share), mask=m_n)
            if TO_COLUMN or TO_ROW or TO_WEIGHT:
                b_g = tl.where(below | above, 0.0, b_g)
                if HAS_LOW:  # the extremes receive the gradient of the bounds they define; ties share it equally
                    lowest = mask & (b_w == minimum[:, None])
                    ties = tl.maximum(tl.sum(lowest.to(tl.float32), axis=1), 1.0)
                    b_g += tl.where(lowest, (grad_low * low_share / ties)[:, None], 0.0)
                if HAS_HIGH:
                    highest = mask & (b_w == maximum[:, None])
                    ties = tl.maximum(tl.sum(highest.to(tl.float32), axis=1), 1.0)
                    b_g += tl.where(highest, (grad_high * high_share / ties)[:, None], 0.0)
        if TO_WEIGHT:
            tl.store(grad_edited_ptr + offsets, convert(b_g, grad_edited_ptr.dtype.element_ty), mask=mask)
        if TO_ROW:
            divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
            tl.store(grad_divisor_ptr + g * N + n, -tl.sum(b_g * b_w, axis=1) / divisor, mask=m_n)
        if TO_COLUMN:
            if HAS_ROW:
                reciprocal = 1.0 / tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
                b_g = b_g * reciprocal[:, None]
            b_column = tl.fma(b_g, b_raw, b_column)
    if TO_COLUMN:
        tl.store(grad_column_ptr + tl.program_id(1).to(tl.int64) * K + o_k, tl.sum(b_column, axis=0), mask=m_c)


def row_tile_columns(key: str) -> dict[str, int]:
    """Return what a key of the tables of row tiles stands for: the columns of a tile that holds a whole group."""
    return {"BLOCK_C": int(key)}


def edited_tile_rank(key: str) -> dict[str, int]:
    """Return what a key of the table "fake_quant_edited_steps_fwd" stands for: the edit's rank, padded."""
    return {"BLOCK_RANK": 256 if key == launches.DEFAULT else int(key)}


def fake_quant_edited_weight(
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    *,
    transform: WeightTransform,
    out_dtype: torch.dtype,
    **grid: Any,
) -> Tensor:
    """Compute `reference_calibration.fake_quant_edited_weight_ref`."""
    out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
    _launch_forward(weight, low_logit, high_logit, transform, out, None, None, **grid)
    return out


def encode_weight(
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    *,
    transform: WeightTransform,
    num_bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute `reference_calibration.encode_weight_ref`."""
    rows, columns = weight.shape
    groups = columns // (group_size or columns)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
    zero_point = None if symmetric else torch.empty(rows, groups, dtype=torch.int8, device=weight.device)
    _launch_forward(
        weight,
        low_logit,
        high_logit,
        transform,
        codes,
        scale,
        zero_point,
        num_bits=num_bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )
    return codes, scale, zero_point


def _launch_forward(
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    transform: WeightTransform,
    out: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    num_bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> None:
    """Fill `out` with codes if there is a `scale` to fill, else with rounded weights."""
    weight = weight.contiguous()
    rows, columns = weight.shape
    width = group_size or columns
    low_share, high_share = kept_share(low_logit), kept_share(high_logit)
    column_scale, row_divisor, left, right = (None if part is None else _float(part) for part in transform)
    qmin, qmax = code_range(num_bits)
    constants = {
        "HAS_LOW": low_share is not None,
        "HAS_HIGH": high_share is not None,
        "HAS_COLUMN": column_scale is not None,
        "HAS_ROW": row_divisor is not None,
        "CODES": scale is not None,
        "QMIN": qmin,
        "QMAX": qmax,
        "SYMMETRIC": symmetric,
        "SCALE_KIND": FLOAT_KINDS[scale_dtype],
        "MIN_SCALE": MIN_SCALE,
        "enable_fp_fusion": FP_FUSION,
    }
    inputs = [
        weight,
        *(weight if part is None else part for part in (low_share, high_share, column_scale, row_divisor)),
    ]
    outputs = [out, out if scale is None else scale, out if zero_point is None else zero_point]
    groups = columns // width
    with on_device_of(weight):
        if left is None and width <= LARGEST_WIDTH:
            tile = _row_tile("fake_quant_edited_fwd", width, weight.device)
            grid = (groups, triton.cdiv(rows, tile["BLOCK_N"] * tile["STEPS"]))
            _fake_quant_edited_fwd_kernel[grid](*inputs, *outputs, rows, columns, width, **constants, **tile)
            return
        rank = 1 if left is None else left.shape[1]
        tile = _edited_tile_launch(rank, width, weight.device)
        _fake_quant_edited_steps_fwd_kernel[(groups, triton.cdiv(rows, tile["BLOCK_N"]))](
            *inputs,
            weight if left is None else left,
            weight if right is None else right,
            *outputs,
            rows,
            columns,
            width,
            rank,
            HAS_EDIT=left is not None,
            ONE_STEP=width <= tile["BLOCK_C"],
            **constants,
            **tile,
        )


def _float(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _row_tile(kernel: str, width: int, device: torch.device) -> launches.Choice:
    """Return the launch of a kernel whose tiles hold whole groups of this width."""
    block = tile_width(width)
    return launches.choice(kernel, width_key(block), device) | {"BLOCK_C": block}


def _edited_tile_launch(rank: int, width: int, device: torch.device) -> launches.Choice:
    """Return the launch of the kernel that adds an edit, whose tiles are no wider than a group."""
    padded = max(16, tile_width(rank))  # no less than tensor cores multiply
    tile = launches.choice("fake_quant_edited_steps_fwd", str(padded), device)
    return tile | {"BLOCK_RANK": padded, "BLOCK_C": max(16, min(tile_width(width), tile["BLOCK_C"]))}


def edited_weight_gradients(
    grad: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    *,
    transform: WeightTransform,
    wanted: frozenset[str],
    **grid: Any,
) -> WeightGradients:
    """Compute the gradients of `fake_quant_edited_weight_ref` that are wanted, by their names in `WeightGradients`.

    Reductions alone need no tensor of the weight's size. The weight and the factors of an edit do: their gradients
    are made of the `[N, K]` gradient of the edited weight.
    """
    width = grid["group_size"] or weight.shape[1]
    if width > LARGEST_WIDTH:
        return _gradients_by_definition(grad, weight, low_logit, high_logit, transform, wanted, **grid)
    if transform.left is None:
        found = _launch_backward(grad, weight, low_logit, high_logit, transform, wanted, **grid)
        if found.weight is None:
            return found
        return found._replace(weight=_through_transform(found.weight, transform).to(weight.dtype))
    edited = transformed_weight(weight, transform)
    found = _launch_backward(grad, edited, low_logit, high_logit, WeightTransform(), frozenset({"weight"}), **grid)
    return _through_edit(found, weight, transform, wanted)


def _launch_backward(
    grad: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    transform: WeightTransform,
    wanted: frozenset[str],
    *,
    num_bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> WeightGradients:
    """Return the gradients wanted; the field `weight` holds that of the edited weight, in float32."""
    grad, weight = grad.contiguous(), weight.contiguous()
    rows, columns = weight.shape
    width = group_size or columns
    groups = columns // width
    low_share, high_share = kept_share(low_logit), kept_share(high_logit)
    column_scale, row_divisor = (None if part is None else _float(part) for part in transform[:2])
    tile = _row_tile("weight_gradients_bwd", width, weight.device)
    programs = triton.cdiv(rows, tile["BLOCK_N"] * tile["STEPS"])

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=weight.device)

    to_low, to_high = (None if share is None else empty(rows, groups) for share in (low_share, high_share))
    to_column = empty(programs, columns) if "column_scale" in wanted else None
    to_divisor = empty(groups, rows) if "row_divisor" in wanted else None
    to_weight = empty(rows, columns) if "weight" in wanted else None
    qmin, qmax = code_range(num_bits)
    tensors = (low_share, high_share, column_scale, row_divisor, to_low, to_high, to_column, to_divisor, to_weight)
    with on_device_of(weight):
        _weight_gradients_bwd_kernel[(groups, programs)](
            grad,
            weight,
            *(weight if tensor is None else tensor for tensor in tensors),
            rows,
            columns,
            width,
            HAS_LOW=low_share is not None,
            HAS_HIGH=high_share is not None,
            HAS_COLUMN=column_scale is not None,
            HAS_ROW=row_divisor is not None,
            TO_COLUMN=to_column is not None,
            TO_ROW=to_divisor is not None,
            TO_WEIGHT=to_weight is not None,
            QMIN=qmin,
            QMAX=qmax,
            SYMMETRIC=symmetric,
            SCALE_KIND=FLOAT_KINDS[scale_dtype],
            MIN_SCALE=MIN_SCALE,
            enable_fp_fusion=FP_FUSION,
            **tile,
        )
    return WeightGradients(
        weight=to_weight,
        low_logit=_like(to_low, low_logit),
        high_logit=_like(to_high, high_logit),
        column_scale=None if to_column is None else _like(to_column.sum(0), transform.column_scale),
        row_divisor=None if to_divisor is None else _like(to_divisor.sum(0), transform.row_divisor),
    )


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
