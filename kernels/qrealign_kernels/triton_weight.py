"""Triton kernels that transform, edit and round a weight in one pass.

A program owns whole scale groups of a few rows. Where a group fits a tile, its weights are read once, stay in
registers, and of what the backward needs the forward keeps the extremes alone. A tile's width is a power of two; a
row that would leave much of one idle is held in several narrower ones. One case takes a second path, in steps along
the columns, whose second reading of a row mostly meets a cache: an edit of more than a small rank, because its product
`left @ right` pays off for tiles of many rows, which registers cannot hold in full width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches
from qrealign_kernels.reference import MIN_SCALE, code_range, kept_share
from qrealign_kernels.reference_calibration import WeightTransform
from qrealign_kernels.triton_common import (
    LARGEST_WIDTH,
    as_float,
    interpreting,
    on_device_of,
    tile_width,
    width_key,
)
from qrealign_kernels.triton_math import (
    FLOAT_KINDS,
    FP_FUSION,
    INTERPRETED,
    ROUNDER,
    clip,
    convert,
    divide,
    load_columns,
    load_tile,
    low_byte,
    round_half_even,
    round_to,
    row_extremes,
    sigmoid,
    store_tile,
    to_int8,
)

# Edits up to this rank are added to rows held whole, a multiplication each; of a higher one, by tensor cores.
SMALL_RANK = 4


@triton.jit
def weight_grid(
    minimum, maximum, low_share, high_share,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr,
):  # fmt: skip
    """Return of each group its bounds, raw scale, scale, the scale's reciprocal, zero point and bounds in steps."""
    low = minimum * low_share
    high = maximum * high_share
    if SYMMETRIC:
        raw_scale = tl.maximum(divide(high, QMAX * 1.0, 1.0 / QMAX, True), divide(low, QMIN * 1.0, 1.0 / QMIN, True))
    else:
        raw_scale = divide(high - low, (QMAX - QMIN) * 1.0, 1.0 / (QMAX - QMIN), True)
    scale = round_to(tl.maximum(raw_scale, MIN_SCALE), SCALE_KIND)
    reciprocal = tl.div_rn(1.0, scale)
    low_steps = divide(low, scale, reciprocal, SCALE_KIND == 0)
    high_steps = divide(high, scale, reciprocal, SCALE_KIND == 0)
    zero_point = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero_point = clip(round_half_even(QMIN - low_steps), QMIN * 1.0, QMAX * 1.0)
    return low, high, raw_scale, scale, reciprocal, zero_point, low_steps, high_steps


@triton.jit
def step_bounds(low_steps, high_steps, zero_point, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Return the least and the largest `code - zero_point`.

    Dividing by a positive scale and rounding never swap two values: clipping a weight to its bounds and clipping its
    steps to those of the bounds are the same, and the second joins the clip to the code range.
    """
    lowest = tl.maximum(round_half_even(low_steps), QMIN - zero_point)
    return lowest, tl.minimum(round_half_even(high_steps), QMAX - zero_point)


@triton.jit
def load_logits(low_ptr, high_ptr, group, m_n, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    """Load what `kept_shares` takes."""
    low = tl.full(group.shape, 1.0, tl.float32)
    high = tl.full(group.shape, 1.0, tl.float32)
    if HAS_LOW:
        low = tl.load(low_ptr + group, mask=m_n, other=0.0)
    if HAS_HIGH:
        high = tl.load(high_ptr + group, mask=m_n, other=0.0)
    return low, high


@triton.jit
def kept_shares(low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    """Return the kept shares of the groups' extremes, 1 where no logit asks for less.

    The interpreter's exponential is not torch's in the last bit, so that there shares are given already.
    """
    if not INTERPRETED:
        if HAS_LOW:
            low = sigmoid(low)
        if HAS_HIGH:
            high = sigmoid(high)
    return low, high


@triton.jit
def load_factors(
    like, n, o_k, m_n, m_k, column_scale_ptr, row_divisor_ptr,
    HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Load the column scale and the row divisor of a tile, 1 where there is none."""
    column_scale = 1.0
    divisor = 1.0
    if HAS_COLUMN:
        column_scale = load_columns(column_scale_ptr, like, o_k, m_k, FULL)
    if HAS_ROW:
        divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0)
    return column_scale, divisor


@triton.jit
def transformed_tile(b_w, column_scale, divisor, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr):
    """Return `weight * column_scale / row_divisor` of a tile."""
    if HAS_COLUMN:
        b_w = b_w * column_scale
    if HAS_ROW:
        b_w = divide(b_w, divisor[:, None], tl.div_rn(1.0, divisor)[:, None], True)
    return b_w


@triton.jit
def _store_rounded(
    out_ptrs, scale_ptr, zero_point_ptr, mask, b_w, minimum, maximum, low_share, high_share, group, m_n,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr,
    MIN_SCALE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Store a tile as codes or as rounded weights; scales and zero points go with codes, and are the same each time."""
    _, _, _, scale, reciprocal, zero_point, low_steps, high_steps = weight_grid(
        minimum, maximum, low_share, high_share, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
    )
    lowest, highest = step_bounds(low_steps, high_steps, zero_point, QMIN, QMAX)
    # Steps stay in the form that adding ROUNDER gives them until they are stored.
    b_steps = divide(b_w, scale[:, None], reciprocal[:, None], SCALE_KIND == 0) + ROUNDER
    b_steps = clip(b_steps, (lowest + ROUNDER)[:, None], (highest + ROUNDER)[:, None])
    if CODES:
        if not SYMMETRIC:
            b_steps = b_steps + zero_point[:, None]
            tl.store(zero_point_ptr + group, to_int8(zero_point), mask=m_n)
        tl.store(scale_ptr + group, scale, mask=m_n)
        store_tile(out_ptrs, low_byte(b_steps), mask, FULL)
    else:
        if SCALE_KIND == 0:
            b_out = (b_steps - ROUNDER) * scale[:, None]
        else:  # ROUNDER times so short a scale is exact, so that this rounds as the product does
            b_out = tl.fma(b_steps, scale[:, None], (scale * -ROUNDER)[:, None])
        store_tile(out_ptrs, convert(b_out, out_ptrs.dtype.element_ty), mask, FULL)


@triton.jit
def _fake_quant_edited_fwd_kernel(
    weight_ptr, low_ptr, high_ptr, column_scale_ptr, row_divisor_ptr, left_ptr, right_ptr, out_ptr, scale_ptr,
    zero_point_ptr, extremes_ptr, N, K, C, G,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_KIND: tl.constexpr,
    MIN_SCALE: tl.constexpr, KEEP_EXTREMES: tl.constexpr, FULL: tl.constexpr, RANK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    n = first + rows  # [BLOCK_N]
    m_n = n < N
    group = n * G + g
    # All that is loaded is asked for before the first exchange between threads and before the first division, whose
    # rare path is a branch: loads do not move across either.
    given = ()  # of each piece of the rows: weight and column scale, [BLOCK_N, BLOCK_C]
    for piece in tl.static_range(PIECES):
        cols = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = cols < C
        offsets = rows[:, None] * K + (g * C + cols)[None, :]  # from the program's first row
        b_w = load_tile(weight_ptr + first * K + offsets, m_n[:, None] & m_c[None, :], FULL)
        column_scale = load_columns(column_scale_ptr, b_w, g * C + cols, m_c, FULL) if HAS_COLUMN else 1.0
        given += ((b_w, column_scale),)  # type: ignore[assignment]
    low, high = load_logits(low_ptr, high_ptr, group, m_n, HAS_LOW, HAS_HIGH)
    divisor = tl.load(row_divisor_ptr + n, mask=m_n, other=1.0) if HAS_ROW else 1.0
    low_share, high_share = kept_shares(low, high, HAS_LOW, HAS_HIGH)
    edited = ()
    b_min = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    b_max = b_min
    for piece in tl.static_range(PIECES):
        cols = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        b_w = transformed_tile(given[piece][0], given[piece][1], divisor, HAS_COLUMN, HAS_ROW)
        for rank in tl.static_range(RANK):  # 0 where there is no edit
            b_left = tl.load(left_ptr + n * RANK + rank, mask=m_n, other=0.0)  # [BLOCK_N]
            b_w += b_left[:, None] * load_columns(right_ptr + rank * K, b_w, g * C + cols, cols < C, FULL)
        b_min = b_w if piece == 0 else tl.minimum(b_min, b_w)
        b_max = b_w if piece == 0 else tl.maximum(b_max, b_w)
        edited += (b_w,)  # type: ignore[assignment]
    minimum, maximum = row_extremes(b_min, b_max)
    minimum = tl.minimum(minimum, 0.0)
    maximum = tl.maximum(maximum, 0.0)
    if KEEP_EXTREMES:
        tl.store(extremes_ptr + group, minimum, mask=m_n)
        tl.store(extremes_ptr + N * G + group, maximum, mask=m_n)
    for piece in tl.static_range(PIECES):
        cols = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        offsets = rows[:, None] * K + (g * C + cols)[None, :]
        _store_rounded(
            out_ptr + first * K + offsets, scale_ptr, zero_point_ptr, m_n[:, None] & (cols < C)[None, :], edited[piece],
            minimum, maximum, low_share, high_share, group, m_n, CODES, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE,
            FULL,
        )  # fmt: skip


@triton.jit
def _edited_tile(
    weight_ptr, column_scale_ptr, row_divisor_ptr, right_ptr, b_left, n, m_n, o_k, m_k, K, RANK,
    HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr, HAS_EDIT: tl.constexpr, BLOCK_RANK: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Return the transformed and edited weight of a tile."""
    mask = m_n[:, None] & m_k[None, :]
    b_w = load_tile(weight_ptr + n[:, None] * K + o_k[None, :], mask, FULL)
    column_scale, divisor = load_factors(
        b_w, n, o_k, m_n, m_k, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW, FULL
    )
    b_w = transformed_tile(b_w, column_scale, divisor, HAS_COLUMN, HAS_ROW)
    if HAS_EDIT:
        ranks = tl.arange(0, BLOCK_RANK)
        m_rk = (ranks < RANK)[:, None] & m_k[None, :]
        b_right = tl.load(right_ptr + ranks[:, None] * K + o_k[None, :], mask=m_rk, other=0.0)  # [BLOCK_RANK, BLOCK_C]
        # Three products of the halves of a float32 that tensor cores take: as exact as float32, and faster.
        b_w = b_w + tl.dot(b_left, b_right, input_precision="tf32x3")
    return b_w


@triton.jit
def _fake_quant_edited_steps_fwd_kernel(
    weight_ptr, low_ptr, high_ptr, column_scale_ptr, row_divisor_ptr, left_ptr, right_ptr, out_ptr,
    scale_ptr, zero_point_ptr, N, K, C, G, RANK,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_EDIT: tl.constexpr, CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr,
    SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, FULL: tl.constexpr, ONE_STEP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = n < N
    group = n * G + g
    cols = tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_RANK)
    b_left = tl.zeros([BLOCK_N, BLOCK_RANK], tl.float32)
    if HAS_EDIT:
        m_left = m_n[:, None] & (ranks < RANK)[None, :]
        b_left = tl.load(left_ptr + n[:, None] * RANK + ranks[None, :], mask=m_left, other=0.0)
    low, high = load_logits(low_ptr, high_ptr, group, m_n, HAS_LOW, HAS_HIGH)
    low_share, high_share = kept_shares(low, high, HAS_LOW, HAS_HIGH)

    if ONE_STEP:
        m_k = cols < C
        o_k = g * C + cols
        b_w = _edited_tile(
            weight_ptr, column_scale_ptr, row_divisor_ptr, right_ptr, b_left, n, m_n, o_k, m_k, K, RANK,
            HAS_COLUMN, HAS_ROW, HAS_EDIT, BLOCK_RANK, FULL,
        )  # fmt: skip
        minimum, maximum = row_extremes(b_w, b_w)
        _store_rounded(
            out_ptr + n[:, None] * K + o_k[None, :], scale_ptr, zero_point_ptr, m_n[:, None] & m_k[None, :], b_w,
            tl.minimum(minimum, 0.0), tl.maximum(maximum, 0.0), low_share, high_share, group, m_n, CODES, QMIN, QMAX,
            SYMMETRIC, SCALE_KIND, MIN_SCALE, FULL,
        )  # fmt: skip
    else:
        # Extremes are tiles and are reduced once, behind the loop: fewer exchanges between threads, and Triton 3.6
        # fails to compile a loop whose reduced result has several uses.
        b_min = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        b_max = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in tl.range(0, C, BLOCK_C, num_stages=AHEAD):
            m_k = start + cols < C
            b_w = _edited_tile(
                weight_ptr, column_scale_ptr, row_divisor_ptr, right_ptr, b_left, n, m_n, g * C + start + cols, m_k, K,
                RANK, HAS_COLUMN, HAS_ROW, HAS_EDIT, BLOCK_RANK, FULL,
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
                HAS_COLUMN, HAS_ROW, HAS_EDIT, BLOCK_RANK, FULL,
            )  # fmt: skip
            _store_rounded(
                out_ptr + n[:, None] * K + o_k[None, :], scale_ptr, zero_point_ptr, m_n[:, None] & m_k[None, :], b_w,
                minimum, maximum, low_share, high_share, group, m_n, CODES, QMIN, QMAX, SYMMETRIC, SCALE_KIND,
                MIN_SCALE, FULL,
            )  # fmt: skip


def row_tile_columns(key: str) -> dict[str, int]:
    """Return what a key of the tables of row tiles stands for: the columns of a tile that holds a whole group."""
    return {"BLOCK_C": int(key.partition("-")[0])}


def row_piece_columns(key: str) -> dict[str, int]:
    """Return the same for a row in pieces: the columns of one, see `pieces_of`."""
    return {"BLOCK_C": int(key) // 4}


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
    keep: bool,
    **grid: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute `reference_calibration.fake_quant_edited_weight_ref`.

    Returns:
        The rounded weight and, where asked to `keep` something for the backward and no edit is given, the extremes of
        each group, `[2, N, G]` float32: 8 bytes a group that spare the backward the search.
    """
    rows, columns = weight.shape
    groups = columns // (grid["group_size"] or columns)
    out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
    extremes = None
    if keep and transform.left is None and columns // groups <= LARGEST_WIDTH:
        extremes = torch.empty(2, rows, groups, dtype=torch.float32, device=weight.device)
    _launch_forward(weight, low_logit, high_logit, transform, out, None, None, extremes, **grid)
    return out, extremes


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
        None,
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
    extremes: Tensor | None,
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
    low, high = share_source(low_logit), share_source(high_logit)
    column_scale, row_divisor, left, right = (None if part is None else as_float(part) for part in transform)
    qmin, qmax = code_range(num_bits)
    constants = {
        "HAS_LOW": low is not None,
        "HAS_HIGH": high is not None,
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
    read = [weight if part is None else part for part in (low, high, column_scale, row_divisor, left, right)]
    written = [out if part is None else part for part in (out, scale, zero_point)]
    sizes = (rows, columns, width, columns // width)
    rank = 0 if left is None else left.shape[1]
    with on_device_of(weight):
        if rank <= SMALL_RANK and width <= LARGEST_WIDTH:
            constants |= {"KEEP_EXTREMES": extremes is not None, "RANK": rank}
            pointers = [weight, *read, *written, out if extremes is None else extremes]
            _launch_whole_groups(pointers, sizes, constants)
        else:
            _launch_steps([weight, *read, *written], sizes, rank, constants)


def _launch_whole_groups(
    pointers: Sequence[Tensor], sizes: tuple[int, int, int, int], constants: dict[str, Any]
) -> None:
    """Launch the kernel whose programs hold whole groups; sizes are N, K, a group's columns, and groups of a row."""
    rows, _, width, groups = sizes
    suffix = "-edit" if constants["RANK"] else ""
    tile = row_tile("fake_quant_edited_fwd", width, pointers[0].device, suffix) | pieces_of(width)
    _fake_quant_edited_fwd_kernel[(groups, triton.cdiv(rows, tile["BLOCK_N"]))](
        *pointers, *sizes, FULL=is_full(rows, width, tile), **constants, **tile
    )


def _launch_steps(
    pointers: Sequence[Tensor], sizes: tuple[int, int, int, int], rank: int, constants: dict[str, Any]
) -> None:
    """Launch the kernel that walks along groups in steps; rank 0: no edit."""
    rows, _, width, groups = sizes
    tile = _edited_tile_launch(rank, width, pointers[0].device)
    _fake_quant_edited_steps_fwd_kernel[(groups, triton.cdiv(rows, tile["BLOCK_N"]))](
        *pointers,
        *sizes,
        max(1, rank),
        HAS_EDIT=rank > 0,
        FULL=width % tile["BLOCK_C"] == 0 and rows % tile["BLOCK_N"] == 0,
        ONE_STEP=width <= tile["BLOCK_C"],
        **constants,
        **tile,
    )


def share_source(logit: Tensor | None) -> Tensor | None:
    """Return what `kept_shares` reads: contiguous float32 logits, or shares for the interpreter."""
    if logit is None:
        return None
    return kept_share(logit) if interpreting() else as_float(logit)


def is_full(rows: int, width: int, tile: launches.Choice) -> bool:
    """Tell whether tiles of whole groups need no mask."""
    return width == tile["BLOCK_C"] and rows % tile["BLOCK_N"] == 0


def row_tile(kernel: str, width: int, device: torch.device, suffix: str = "") -> launches.Choice:
    """Return the launch of a kernel whose tiles hold whole groups of this width; tables may know keys with a suffix."""
    block = tile_width(width)
    return launches.choice(kernel, width_key(block) + suffix, device) | {"BLOCK_C": block}


def pieces_of(width: int) -> dict[str, int]:
    """Return of how many tiles a row is made, and their columns: of one, or of quarters where one would be left out."""
    whole = tile_width(width)
    if width > 4096 and 4 * width <= 3 * whole:
        return {"BLOCK_C": whole // 4, "PIECES": 3}
    return {"BLOCK_C": whole, "PIECES": 1}


def _edited_tile_launch(rank: int, width: int, device: torch.device) -> launches.Choice:
    """Return the launch of the kernel that walks rows in steps, whose tiles are no wider than a group."""
    padded = max(16, tile_width(max(1, rank)))  # no less than tensor cores multiply
    tile = launches.choice("fake_quant_edited_steps_fwd", str(padded) if rank else "rows", device)
    return tile | {"BLOCK_RANK": padded, "BLOCK_C": max(16, min(tile_width(width), tile["BLOCK_C"]))}
