"""Triton kernels that transform, edit and round a weight in one pass.

A program owns whole scale groups of a few rows. Where a group fits a tile, its weights are read once, stay in
registers, and whatever the backward needs of the grid is computed again: the forward keeps nothing. Only an edit takes
a second path, in steps along the columns, because its product `left @ right` pays off for tiles of many rows, which
registers cannot hold in full width; the second reading of a row then mostly meets the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches
from qrealign_kernels.reference import MIN_SCALE, code_range, kept_share
from qrealign_kernels.reference_calibration import WeightTransform
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
def weight_grid(
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
def code_steps(b_w, low, high, scale, zero_point, QMIN: tl.constexpr, QMAX: tl.constexpr, SCALE_KIND: tl.constexpr):
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
    low, high, _, scale, zero_point = weight_grid(
        minimum, maximum, low_share, high_share, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
    )
    steps = code_steps(b_w, low[:, None], high[:, None], scale[:, None], zero_point[:, None], QMIN, QMAX, SCALE_KIND)
    if CODES:
        tl.store(out_ptr + offsets, to_int8(steps + zero_point[:, None]), mask=mask)
        tl.store(scale_ptr + group, scale, mask=m_n)
        if not SYMMETRIC:
            tl.store(zero_point_ptr + group, to_int8(zero_point), mask=m_n)
    else:
        tl.store(out_ptr + offsets, convert(steps * scale[:, None], out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def kept_shares(low_share_ptr, high_share_ptr, group, m_n, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    """Return the kept shares of the groups' extremes, 1 where no logit asks for less."""
    low_share = tl.full(group.shape, 1.0, tl.float32)
    high_share = tl.full(group.shape, 1.0, tl.float32)
    if HAS_LOW:
        low_share = tl.load(low_share_ptr + group, mask=m_n, other=1.0)
    if HAS_HIGH:
        high_share = tl.load(high_share_ptr + group, mask=m_n, other=1.0)
    return low_share, high_share


@triton.jit
def transformed_tile(
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
        b_w = transformed_tile(b_w, n, o_k, m_n, m_c, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW)
        minimum = tl.minimum(tl.min(b_w, axis=1), 0.0)
        maximum = tl.maximum(tl.max(b_w, axis=1), 0.0)
        low_share, high_share = kept_shares(low_share_ptr, high_share_ptr, group, m_n, HAS_LOW, HAS_HIGH)
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
    b_w = transformed_tile(b_w, n, o_k, m_n, m_k, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW)
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
    low_share, high_share = kept_shares(low_share_ptr, high_share_ptr, group, m_n, HAS_LOW, HAS_HIGH)

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
    column_scale, row_divisor, left, right = (None if part is None else as_float(part) for part in transform)
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
            tile = row_tile("fake_quant_edited_fwd", width, weight.device)
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


def as_float(tensor: Tensor) -> Tensor:
    """Return contiguous float32, the tensor itself where it is."""
    return tensor.float().contiguous()


def row_tile(kernel: str, width: int, device: torch.device) -> launches.Choice:
    """Return the launch of a kernel whose tiles hold whole groups of this width."""
    block = tile_width(width)
    return launches.choice(kernel, width_key(block), device) | {"BLOCK_C": block}


def _edited_tile_launch(rank: int, width: int, device: torch.device) -> launches.Choice:
    """Return the launch of the kernel that adds an edit, whose tiles are no wider than a group."""
    padded = max(16, tile_width(rank))  # no less than tensor cores multiply
    tile = launches.choice("fake_quant_edited_steps_fwd", str(padded), device)
    return tile | {"BLOCK_RANK": padded, "BLOCK_C": max(16, min(tile_width(width), tile["BLOCK_C"]))}
