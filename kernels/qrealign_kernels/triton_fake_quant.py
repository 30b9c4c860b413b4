"""Triton kernels of the fake-quantization ops; codes are equal to the reference's bit for bit.

A row is one scale group of a weight, or one token. A program owns whole rows and sums each in a fixed order, so two
runs give the same bits. Divisions are IEEE ones (`tl.div_rn`), rounding is ties-to-even without libdevice, and the
sigmoid of the clipping logits comes from torch.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches
from qrealign_kernels.interface import REFERENCE
from qrealign_kernels.reference import MIN_SCALE, ZERO_SCALE_REPLACEMENT, GradientSums, code_range
from qrealign_kernels.triton_common import on_device_of, tile_width

# A multiplication fused into the addition after it skips a rounding that the reference does, and changes codes.
FP_FUSION = False
_LARGEST_STEP = 2048
_SCALE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@triton.jit
def round_half_even(x):
    """Round to the nearest integer, for |x| < 2**22: adding 1.5 * 2**23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _clip(x, low, high):
    # Not tl.clamp, which may turn a NaN into a bound and hide it.
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _round_scale(x, KIND: tl.constexpr):
    # bfloat16 by its bits, because the interpreter truncates where the hardware rounds.
    if KIND == 1:
        x = x.to(tl.float16).to(tl.float32)
    if KIND == 2:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def _fake_quant_weight_fwd_kernel(
    rows_ptr, low_share_ptr, high_share_ptr, fake_ptr, grid_ptr, R, C,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr,
    SCALE_KIND: tl.constexpr, MIN_SCALE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    m_r = r < R
    cols = tl.arange(0, BLOCK_C)

    # Accumulators are tiles and are reduced once, behind the loop: fewer exchanges between threads, and Triton 3.6
    # fails to compile a loop whose reduced result has several uses.
    b_min = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_max = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + cols
        o_rc = r[:, None] * C + o_c[None, :]  # [BLOCK_R, BLOCK_C]
        mask = m_r[:, None] & (o_c < C)[None, :]
        b_w = tl.load(rows_ptr + o_rc, mask=mask, other=0.0).to(tl.float32)
        b_min = tl.minimum(b_min, b_w)
        b_max = tl.maximum(b_max, b_w)

    minimum = tl.min(b_min, axis=1)
    maximum = tl.max(b_max, axis=1)
    low = minimum
    high = maximum
    if HAS_LOW:
        low = minimum * tl.load(low_share_ptr + r, mask=m_r, other=1.0)
    if HAS_HIGH:
        high = maximum * tl.load(high_share_ptr + r, mask=m_r, other=1.0)
    if SYMMETRIC:
        raw_scale = tl.maximum(tl.div_rn(high, QMAX * 1.0), tl.div_rn(low, QMIN * 1.0))
    else:
        raw_scale = tl.div_rn(high - low, (QMAX - QMIN) * 1.0)
    scale = _round_scale(tl.maximum(raw_scale, MIN_SCALE), SCALE_KIND)
    zero_point = tl.zeros([BLOCK_R], tl.float32)
    if not SYMMETRIC:
        zero_point = _clip(round_half_even(QMIN - tl.div_rn(low, scale)), QMIN * 1.0, QMAX * 1.0)
    tl.store(grid_ptr + r, minimum, mask=m_r)
    tl.store(grid_ptr + R + r, maximum, mask=m_r)
    tl.store(grid_ptr + 2 * R + r, low, mask=m_r)
    tl.store(grid_ptr + 3 * R + r, high, mask=m_r)
    tl.store(grid_ptr + 4 * R + r, raw_scale, mask=m_r)
    tl.store(grid_ptr + 5 * R + r, scale, mask=m_r)
    tl.store(grid_ptr + 6 * R + r, zero_point, mask=m_r)

    for start in range(0, C, BLOCK_C):
        o_c = start + cols
        o_rc = r[:, None] * C + o_c[None, :]  # [BLOCK_R, BLOCK_C]
        mask = m_r[:, None] & (o_c < C)[None, :]
        b_w = tl.load(rows_ptr + o_rc, mask=mask, other=0.0).to(tl.float32)
        b_w = _clip(b_w, low[:, None], high[:, None])
        steps = round_half_even(tl.div_rn(b_w, scale[:, None]))
        steps = _clip(steps, (QMIN - zero_point)[:, None], (QMAX - zero_point)[:, None])
        tl.store(fake_ptr + o_rc, steps * scale[:, None], mask=mask)


@triton.jit
def _weight_gradient_sums_bwd_kernel(
    grad_ptr, rows_ptr, grid_ptr, sums_ptr, R, C,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    m_r = r < R
    cols = tl.arange(0, BLOCK_C)
    low = tl.load(grid_ptr + 2 * R + r, mask=m_r, other=0.0)
    high = tl.load(grid_ptr + 3 * R + r, mask=m_r, other=0.0)
    scale = tl.load(grid_ptr + 5 * R + r, mask=m_r, other=1.0)
    zero_point = tl.zeros([BLOCK_R], tl.float32)
    if not SYMMETRIC:
        zero_point = tl.load(grid_ptr + 6 * R + r, mask=m_r, other=0.0)

    b_below = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_above = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_error = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + cols
        o_rc = r[:, None] * C + o_c[None, :]  # [BLOCK_R, BLOCK_C]
        mask = m_r[:, None] & (o_c < C)[None, :]
        b_w = tl.load(rows_ptr + o_rc, mask=mask, other=0.0).to(tl.float32)
        b_g = tl.load(grad_ptr + o_rc, mask=mask, other=0.0)
        clipped = _clip(b_w, low[:, None], high[:, None])
        steps = round_half_even(tl.div_rn(clipped, scale[:, None]))
        steps = _clip(steps, (QMIN - zero_point)[:, None], (QMAX - zero_point)[:, None])
        b_below += tl.where(b_w < low[:, None], b_g, 0.0)
        b_above += tl.where(b_w > high[:, None], b_g, 0.0)
        b_error += b_g * (steps * scale[:, None] - clipped)
    tl.store(sums_ptr + r, tl.sum(b_below, axis=1), mask=m_r)
    tl.store(sums_ptr + R + r, tl.sum(b_above, axis=1), mask=m_r)
    tl.store(sums_ptr + 2 * R + r, tl.div_rn(tl.sum(b_error, axis=1), scale), mask=m_r)


@triton.jit
def _weight_gradient_rows_bwd_kernel(
    grad_ptr, rows_ptr, grid_ptr, at_minimum_ptr, at_maximum_ptr, result_ptr, R, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    m_r = r < R
    cols = tl.arange(0, BLOCK_C)
    minimum = tl.load(grid_ptr + r, mask=m_r, other=0.0)
    maximum = tl.load(grid_ptr + R + r, mask=m_r, other=0.0)
    low = tl.load(grid_ptr + 2 * R + r, mask=m_r, other=0.0)
    high = tl.load(grid_ptr + 3 * R + r, mask=m_r, other=0.0)

    b_minima = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_maxima = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + cols
        o_rc = r[:, None] * C + o_c[None, :]  # [BLOCK_R, BLOCK_C]
        mask = m_r[:, None] & (o_c < C)[None, :]
        b_w = tl.load(rows_ptr + o_rc, mask=mask, other=0.0).to(tl.float32)
        b_minima += tl.where(mask & (b_w == minimum[:, None]), 1.0, 0.0)
        b_maxima += tl.where(mask & (b_w == maximum[:, None]), 1.0, 0.0)
    minima = tl.sum(b_minima, axis=1)
    maxima = tl.sum(b_maxima, axis=1)
    to_minimum = tl.div_rn(tl.load(at_minimum_ptr + r, mask=m_r, other=0.0), tl.maximum(minima, 1.0))
    to_maximum = tl.div_rn(tl.load(at_maximum_ptr + r, mask=m_r, other=0.0), tl.maximum(maxima, 1.0))

    for start in range(0, C, BLOCK_C):
        o_c = start + cols
        o_rc = r[:, None] * C + o_c[None, :]  # [BLOCK_R, BLOCK_C]
        mask = m_r[:, None] & (o_c < C)[None, :]
        b_w = tl.load(rows_ptr + o_rc, mask=mask, other=0.0).to(tl.float32)
        b_g = tl.load(grad_ptr + o_rc, mask=mask, other=0.0)
        b_g = tl.where((b_w < low[:, None]) | (b_w > high[:, None]), 0.0, b_g)
        b_g += tl.where(b_w == minimum[:, None], to_minimum[:, None], 0.0)
        b_g += tl.where(b_w == maximum[:, None], to_maximum[:, None], 0.0)
        tl.store(result_ptr + o_rc, b_g, mask=mask)


@triton.jit
def _quantize_per_token_fwd_kernel(
    x_ptr, out_ptr, scale_ptr, R, C,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    m_r = r < R
    cols = tl.arange(0, BLOCK_C)
    b_largest = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + cols
        o_rc = r[:, None] * C + o_c[None, :]  # [BLOCK_R, BLOCK_C]
        mask = m_r[:, None] & (o_c < C)[None, :]
        b_x = tl.load(x_ptr + o_rc, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_C]
        b_largest = tl.maximum(b_largest, tl.abs(b_x))
    scale = tl.div_rn(tl.max(b_largest, axis=1), (QMAX - QMIN) * 0.5)
    scale = tl.where(scale == 0.0, ZERO_SCALE, scale)
    if CODES:
        tl.store(scale_ptr + r, scale, mask=m_r)

    for start in range(0, C, BLOCK_C):
        o_c = start + cols
        o_rc = r[:, None] * C + o_c[None, :]  # [BLOCK_R, BLOCK_C]
        mask = m_r[:, None] & (o_c < C)[None, :]
        b_x = tl.load(x_ptr + o_rc, mask=mask, other=0.0).to(tl.float32)
        steps = _clip(round_half_even(tl.div_rn(b_x, scale[:, None])), QMIN * 1.0, QMAX * 1.0)
        if CODES:
            tl.store(out_ptr + o_rc, steps.to(tl.int8), mask=mask)
        else:
            b_y = (steps * scale[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + o_rc, b_y, mask=mask)


def looped_columns(key: str) -> dict[str, int]:
    """Return what a key of the table "looped_rows" stands for: the columns that a program takes at a time."""
    return {"BLOCK_C": 32 if key == launches.DEFAULT else int(key)}


def _looped_tile(columns: int, device: torch.device) -> launches.Choice:
    """Return tile and warps for rows of this width: short rows share a program, long ones are walked in steps."""
    width = tile_width(columns, _LARGEST_STEP)
    return launches.choice("looped_rows", str(width), device) | {"BLOCK_C": width}


def fake_quant_weight(
    rows: Tensor,
    low_share: Tensor | None,
    high_share: Tensor | None,
    *,
    num_bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.fake_quant_weight_rows`."""
    rows = rows.contiguous()
    count, columns = rows.shape
    fake = torch.empty_like(rows, dtype=torch.float32)
    block = torch.empty(7, count, 1, dtype=torch.float32, device=rows.device)
    qmin, qmax = code_range(num_bits)
    tile = _looped_tile(columns, rows.device)
    with on_device_of(rows):
        _fake_quant_weight_fwd_kernel[(triton.cdiv(count, tile["BLOCK_R"]),)](
            rows,
            rows if low_share is None else low_share.contiguous(),
            rows if high_share is None else high_share.contiguous(),
            fake,
            block,
            count,
            columns,
            HAS_LOW=low_share is not None,
            HAS_HIGH=high_share is not None,
            QMIN=qmin,
            QMAX=qmax,
            SYMMETRIC=symmetric,
            SCALE_KIND=_SCALE_KINDS[scale_dtype],
            MIN_SCALE=MIN_SCALE,
            enable_fp_fusion=FP_FUSION,
            **tile,
        )
    return fake, block


def weight_gradient_sums(
    grad: Tensor, rows: Tensor, fake: None, block: Tensor, *, num_bits: int, symmetric: bool
) -> GradientSums:
    """Compute `reference.weight_gradient_sums`; the forward's result is not needed."""
    grad, rows = grad.float().contiguous(), rows.contiguous()
    count, columns = rows.shape
    sums = torch.empty(3, count, 1, dtype=torch.float32, device=rows.device)
    qmin, qmax = code_range(num_bits)
    tile = _looped_tile(columns, rows.device)
    with on_device_of(rows):
        _weight_gradient_sums_bwd_kernel[(triton.cdiv(count, tile["BLOCK_R"]),)](
            grad,
            rows,
            block.contiguous(),
            sums,
            count,
            columns,
            QMIN=qmin,
            QMAX=qmax,
            SYMMETRIC=symmetric,
            enable_fp_fusion=FP_FUSION,
            **tile,
        )
    return GradientSums(*sums)


def weight_gradient_rows(grad: Tensor, rows: Tensor, block: Tensor, at_minimum: Tensor, at_maximum: Tensor) -> Tensor:
    """Compute `reference.weight_gradient_rows`."""
    grad, rows = grad.float().contiguous(), rows.contiguous()
    count, columns = rows.shape
    result = torch.empty_like(grad)
    tile = _looped_tile(columns, rows.device)
    with on_device_of(rows):
        _weight_gradient_rows_bwd_kernel[(triton.cdiv(count, tile["BLOCK_R"]),)](
            grad,
            rows,
            block.contiguous(),
            at_minimum.contiguous(),
            at_maximum.contiguous(),
            result,
            count,
            columns,
            enable_fp_fusion=FP_FUSION,
            **tile,
        )
    return result


def fake_quant_per_token(x: Tensor, num_bits: int) -> Tensor:
    """Compute `reference.fake_quant_per_token_rows`."""
    x = x.contiguous()
    fake = torch.empty_like(x)
    _launch_per_token(x, fake, None, num_bits)
    return fake


def quantize_per_token(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Compute `reference.quantize_per_token_rows`."""
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    _launch_per_token(x, codes, scale, num_bits)
    return codes, scale


def _launch_per_token(x: Tensor, out: Tensor, scale: Tensor | None, num_bits: int) -> None:
    columns = x.shape[-1]
    count = x.numel() // columns
    if count == 0:
        return
    qmin, qmax = code_range(num_bits)
    tile = _looped_tile(columns, x.device)
    with on_device_of(x):
        _quantize_per_token_fwd_kernel[(triton.cdiv(count, tile["BLOCK_R"]),)](
            x,
            out,
            x if scale is None else scale,
            count,
            columns,
            CODES=scale is not None,
            QMIN=qmin,
            QMAX=qmax,
            ZERO_SCALE=ZERO_SCALE_REPLACEMENT,
            enable_fp_fusion=FP_FUSION,
            **tile,
        )


BACKEND = dataclasses.replace(
    REFERENCE,
    fake_quant_weight=fake_quant_weight,
    weight_gradient_sums=weight_gradient_sums,
    weight_gradient_rows=weight_gradient_rows,
    fake_quant_per_token=fake_quant_per_token,
    quantize_per_token=quantize_per_token,
    keeps_fake=False,
)
