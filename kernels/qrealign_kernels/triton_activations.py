"""Triton kernels that quantize tokens, alone and behind an RMS norm or a gate; codes equal the unfused ones.

A program holds whole tokens in registers: each is read once. Sums have a fixed order, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches, reference, reference_calibration
from qrealign_kernels.reference import ZERO_SCALE_REPLACEMENT, code_range
from qrealign_kernels.triton_common import LARGEST_WIDTH, on_device_of, tile_width, width_key
from qrealign_kernels.triton_math import (
    FLOAT_KINDS,
    FP_FUSION,
    clip,
    convert,
    exponential,
    largest_magnitude,
    round_half_even,
    round_to,
    to_int8,
)
from qrealign_kernels.triton_overlap import overlap, wait_for_inputs

FEW_TOKENS = 128  # up to here a token has a multiprocessor to itself, and wants more threads


@triton.jit
def store_tokens(
    b_y, out_ptr, scale_ptr, r, o_c, m_r, mask, C,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr,
):  # fmt: skip
    """Store a tile of tokens as codes and scales, or rounded to their grid."""
    scale = tl.div_rn(largest_magnitude(b_y, 1), (QMAX - QMIN) * 0.5)
    scale = tl.where(scale == 0.0, ZERO_SCALE, scale)
    steps = clip(round_half_even(tl.div_rn(b_y, scale[:, None])), QMIN * 1.0, QMAX * 1.0)
    offsets = r[:, None] * C + o_c[None, :]
    if CODES:
        tl.store(scale_ptr + r, scale, mask=m_r)
        tl.store(out_ptr + offsets, to_int8(steps), mask=mask)
    else:
        tl.store(out_ptr + offsets, convert(steps * scale[:, None], out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_per_token_fwd_kernel(
    x_ptr, out_ptr, scale_ptr, R, C, stride_xr,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    o_c = tl.arange(0, BLOCK_C)
    m_r = r < R
    mask = m_r[:, None] & (o_c < C)[None, :]
    b_x = tl.load(x_ptr + r[:, None] * stride_xr + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    store_tokens(b_x, out_ptr, scale_ptr, r, o_c, m_r, mask, C, CODES, QMIN, QMAX, ZERO_SCALE)


@triton.jit
def _rms_norm_quantize_fwd_kernel(
    x_ptr, weight_ptr, out_ptr, scale_ptr, R, C, stride_xr, eps, offset,
    WEIGHT_LAST: tl.constexpr, X_KIND: tl.constexpr, OUT_KIND: tl.constexpr,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    o_c = tl.arange(0, BLOCK_C)
    m_r = r < R
    m_c = o_c < C
    mask = m_r[:, None] & m_c[None, :]
    b_x = tl.load(x_ptr + r[:, None] * stride_xr + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    mean_square = tl.div_rn(tl.sum(b_x * b_x, axis=1), C.to(tl.float32))
    b_y = b_x * tl.rsqrt(mean_square + eps)[:, None]
    b_y = round_to(b_y, X_KIND) * b_weight[None, :] if WEIGHT_LAST else b_y * (offset + b_weight)[None, :]
    b_y = round_to(b_y, OUT_KIND)
    store_tokens(b_y, out_ptr, scale_ptr, r, o_c, m_r, mask, C, CODES, QMIN, QMAX, ZERO_SCALE)


@triton.jit
def _silu_mul_quantize_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, scale_ptr, R, C, stride_gr, stride_ur,
    KIND: tl.constexpr, CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    o_c = tl.arange(0, BLOCK_C)
    m_r = r < R
    mask = m_r[:, None] & (o_c < C)[None, :]
    b_gate = tl.load(gate_ptr + r[:, None] * stride_gr + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(up_ptr + r[:, None] * stride_ur + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_silu = round_to(tl.div_rn(b_gate, 1.0 + exponential(-b_gate)), KIND)
    b_y = round_to(b_silu * b_up, KIND)
    store_tokens(b_y, out_ptr, scale_ptr, r, o_c, m_r, mask, C, CODES, QMIN, QMAX, ZERO_SCALE)


@triton.jit
def _rms_norm_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, grad_x_ptr, grad_weight_ptr, R, C, stride_xr, eps, offset,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_weight = offset + tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = tl.program_id(0).to(tl.int64) * (BLOCK_R * STEPS)
    for step in range(STEPS):
        r = first + step * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        mask = (r < R)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptr + r[:, None] * stride_xr + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        b_g = tl.load(grad_ptr + r[:, None] * C + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / C + eps)
        b_normed = b_x * rstd[:, None]
        b_sums += b_g * b_normed
        b_scaled = b_g * b_weight[None, :]
        mean = tl.sum(b_scaled * b_normed, axis=1) / C
        b_dx = rstd[:, None] * (b_scaled - b_normed * mean[:, None])
        tl.store(grad_x_ptr + r[:, None] * C + o_c[None, :], convert(b_dx, grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_weight_ptr + tl.program_id(0).to(tl.int64) * C + o_c, tl.sum(b_sums, axis=0), mask=m_c)


@triton.jit
def _silu_mul_bwd_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, R, C, stride_gr, stride_ur,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (r < R)[:, None] & (o_c < C)[None, :]
    offsets = r[:, None] * C + o_c[None, :]
    b_g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(gate_ptr + r[:, None] * stride_gr + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(up_ptr + r[:, None] * stride_ur + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_share = 1.0 / (1.0 + tl.exp(-b_gate))
    b_dgate = b_g * b_up * b_share * (1.0 + b_gate * (1.0 - b_share))
    tl.store(grad_gate_ptr + offsets, convert(b_dgate, grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + offsets, convert(b_g * b_gate * b_share, grad_up_ptr.dtype.element_ty), mask=mask)


def token_columns(key: str) -> dict[str, int]:
    """Return what a key of the tables of token tiles stands for, such as "4096" or, for few tokens, "4096-few"."""
    return {"BLOCK_C": int(key.partition("-")[0])}


def token_tile(kernel: str, rows: Tensor) -> launches.Choice:
    """Return the launch of a kernel whose tiles hold whole tokens."""
    tokens, columns = rows.shape
    block = tile_width(columns)
    key = width_key(block) + ("-few" if tokens <= FEW_TOKENS else "")
    return launches.choice(kernel, key, rows.device) | {"BLOCK_C": block}


def as_rows(x: Tensor) -> Tensor:
    """Return `[R, C]` with contiguous rows: a view where it can be, such as of one half of a wider tensor."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def code_constants(num_bits: int, device: torch.device, *, codes: bool) -> dict[str, object]:
    """Return what kernels that round tokens are compiled for, tiles aside: to codes, or to what codes stand for."""
    qmin, qmax = code_range(num_bits)
    return {
        "CODES": codes,
        "QMIN": qmin,
        "QMAX": qmax,
        "ZERO_SCALE": ZERO_SCALE_REPLACEMENT,
        "enable_fp_fusion": FP_FUSION,
        **overlap(device),
    }


def _outputs(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Return what a kernel fills: codes and scales, or a tensor of `dtype`."""
    if dtype is not None:
        return torch.empty(x.shape, dtype=dtype, device=x.device), None
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)


def fake_quant_per_token(x: Tensor, num_bits: int) -> Tensor:
    """Compute `reference.fake_quant_per_token_rows`."""
    if x.shape[-1] > LARGEST_WIDTH:
        return reference.fake_quant_per_token_rows(x, num_bits)
    return _quantize_tokens(x, num_bits, x.dtype)[0]


def quantize_per_token(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Compute `reference.quantize_per_token_rows`."""
    if x.shape[-1] > LARGEST_WIDTH:
        return reference.quantize_per_token_rows(x, num_bits)
    codes, scale = _quantize_tokens(x, num_bits, None)
    assert scale is not None
    return codes, scale


def _quantize_tokens(x: Tensor, num_bits: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    rows = as_rows(x)
    out, scale = _outputs(x, dtype)
    if rows.shape[0]:
        tile = token_tile("quantize_per_token", rows)
        constants = code_constants(num_bits, x.device, codes=scale is not None)
        with on_device_of(x):
            _quantize_per_token_fwd_kernel[(triton.cdiv(rows.shape[0], tile["BLOCK_R"]),)](
                rows, out, out if scale is None else scale, *rows.shape, rows.stride(0), **constants, **tile
            )
    return out, scale


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, *, offset: float, num_bits: int) -> tuple[Tensor, Tensor]:
    """Compute `reference_calibration.rms_norm_quantize_ref`."""
    if x.shape[-1] > LARGEST_WIDTH:
        return reference_calibration.rms_norm_quantize_ref(x, weight, eps, offset=offset, num_bits=num_bits)
    codes, scale = _norm_tokens(x, weight, eps, offset, num_bits, codes=True)
    assert scale is not None
    return codes, scale


def rms_norm_fake_quant(x: Tensor, weight: Tensor, eps: float, *, offset: float, num_bits: int) -> Tensor:
    """Compute the value of `reference_calibration.rms_norm_fake_quant_ref`."""
    if x.shape[-1] > LARGEST_WIDTH:
        return reference_calibration.rms_norm_fake_quant_ref(x, weight, eps, offset=offset, num_bits=num_bits)
    return _norm_tokens(x, weight, eps, offset, num_bits, codes=False)[0]


def _norm_tokens(
    x: Tensor, weight: Tensor, eps: float, offset: float, num_bits: int, *, codes: bool
) -> tuple[Tensor, Tensor | None]:
    weight_last = offset == 0.0
    dtype = torch.promote_types(x.dtype, weight.dtype) if weight_last else x.dtype
    rows = as_rows(x)
    out, scale = _outputs(x, None if codes else dtype)
    if rows.shape[0]:
        tile = token_tile("rms_norm_quantize", rows)
        with on_device_of(x):
            _rms_norm_quantize_fwd_kernel[(triton.cdiv(rows.shape[0], tile["BLOCK_R"]),)](
                rows,
                weight.contiguous(),
                out,
                out if scale is None else scale,
                *rows.shape,
                rows.stride(0),
                eps,
                offset,
                WEIGHT_LAST=weight_last,
                X_KIND=FLOAT_KINDS[x.dtype],
                OUT_KIND=FLOAT_KINDS[dtype],
                **code_constants(num_bits, x.device, codes=codes),
                **tile,
            )
    return out, scale


def rms_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, eps: float, *, offset: float) -> tuple[Tensor, Tensor]:
    """Compute `reference_calibration.rms_norm_gradients`."""
    if x.shape[-1] > LARGEST_WIDTH or x.numel() == 0:
        return reference_calibration.rms_norm_gradients(grad, x, weight, eps, offset=offset)
    rows = as_rows(x)
    tile = token_tile("rms_norm_bwd", rows)
    programs = triton.cdiv(rows.shape[0], tile["BLOCK_R"] * tile["STEPS"])
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _rms_norm_bwd_kernel[(programs,)](
            grad.contiguous(), rows, weight.contiguous(), grad_x, partial, *rows.shape, rows.stride(0), eps, offset,
            **tile,
        )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


def silu_mul_quantize(gate: Tensor, up: Tensor, *, num_bits: int) -> tuple[Tensor, Tensor]:
    """Compute `reference_calibration.silu_mul_quantize_ref`."""
    if gate.shape[-1] > LARGEST_WIDTH:
        return reference_calibration.silu_mul_quantize_ref(gate, up, num_bits=num_bits)
    codes, scale = _gate_tokens(gate, up, num_bits, None)
    assert scale is not None
    return codes, scale


def silu_mul_fake_quant(gate: Tensor, up: Tensor, *, num_bits: int) -> Tensor:
    """Compute the value of `reference_calibration.silu_mul_fake_quant_ref`."""
    if gate.shape[-1] > LARGEST_WIDTH:
        return reference_calibration.silu_mul_fake_quant_ref(gate, up, num_bits=num_bits)
    return _gate_tokens(gate, up, num_bits, gate.dtype)[0]


def _gate_tokens(gate: Tensor, up: Tensor, num_bits: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    gates, ups = as_rows(gate), as_rows(up)
    out, scale = _outputs(gate, dtype)
    if gates.shape[0]:
        tile = token_tile("silu_mul_quantize", gates)
        with on_device_of(gate):
            _silu_mul_quantize_fwd_kernel[(triton.cdiv(gates.shape[0], tile["BLOCK_R"]),)](
                gates,
                ups,
                out,
                out if scale is None else scale,
                *gates.shape,
                gates.stride(0),
                ups.stride(0),
                KIND=FLOAT_KINDS[gate.dtype],
                **code_constants(num_bits, gate.device, codes=scale is not None),
                **tile,
            )
    return out, scale


def silu_mul_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference_calibration.silu_mul_gradients`."""
    gates, ups = as_rows(gate), as_rows(up)
    count, columns = gates.shape
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if count:
        tile = launches.choice("silu_mul_bwd", launches.DEFAULT, gate.device)
        with on_device_of(gate):
            _silu_mul_bwd_kernel[(triton.cdiv(count, tile["BLOCK_R"]), triton.cdiv(columns, tile["BLOCK_C"]))](
                grad.contiguous(), gates, ups, grad_gate, grad_up, count, columns, gates.stride(0), ups.stride(0),
                **tile,
            )  # fmt: skip
    return grad_gate, grad_up
