"""Triton kernels of a step beside its products and its attention: norm behind a sum, gate, and rows of the embedding.

What they move is small, so a step has as few launches as possible, and each starts while the one in front of it ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches, reference_block
from qrealign_kernels.reference_block import normed_dtype
from qrealign_kernels.triton_activations import FEW_TOKENS, as_rows, code_constants, store_tokens, token_tile
from qrealign_kernels.triton_common import LARGEST_WIDTH, on_device_of
from qrealign_kernels.triton_math import FLOAT_KINDS, FP_FUSION, convert, exponential, round_to
from qrealign_kernels.triton_overlap import overlap, wait_for_inputs


@triton.jit
def _add_rms_norm_fwd_kernel(
    x_ptr, branch_ptr, weight_ptr, sum_ptr, out_ptr, scale_ptr, R, C, stride_xr, stride_br, eps, offset,
    HAS_BRANCH: tl.constexpr, WEIGHT_LAST: tl.constexpr, X_KIND: tl.constexpr, OUT_KIND: tl.constexpr,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add, normalize, and with CODES quantize what comes of it."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m_r = r < R
    mask = m_r[:, None] & m_c[None, :]
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    b_x = tl.load(x_ptr + r[:, None] * stride_xr + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    offsets = r[:, None] * C + o_c[None, :]
    if HAS_BRANCH:
        b_branch = tl.load(branch_ptr + r[:, None] * stride_br + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x = round_to(b_x + b_branch, X_KIND)
        tl.store(sum_ptr + offsets, convert(b_x, sum_ptr.dtype.element_ty), mask=mask)
    mean_square = tl.div_rn(tl.sum(b_x * b_x, axis=1), C.to(tl.float32))
    b_y = b_x * tl.rsqrt(mean_square + eps)[:, None]
    b_y = round_to(b_y, X_KIND) * b_weight[None, :] if WEIGHT_LAST else b_y * (offset + b_weight)[None, :]
    b_y = round_to(b_y, OUT_KIND)
    if CODES:
        store_tokens(b_y, out_ptr, scale_ptr, r, o_c, m_r, mask, C, CODES, QMIN, QMAX, ZERO_SCALE)
    else:
        tl.store(out_ptr + offsets, convert(b_y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, C, stride_gr, stride_ur, KIND: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = o_c < C
    b_gate = tl.load(gate_ptr + r * stride_gr + o_c, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(up_ptr + r * stride_ur + o_c, mask=mask, other=0.0).to(tl.float32)
    b_y = round_to(tl.div_rn(b_gate, 1.0 + exponential(-b_gate)), KIND) * b_up
    tl.store(out_ptr + r * C + o_c, convert(round_to(b_y, KIND), out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gather_rows_fwd_kernel(
    table_ptr, indices_ptr, out_ptr, C, OVERLAP: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(table_ptr + tl.load(indices_ptr + r) * C + o_c, mask=o_c < C)
    tl.store(out_ptr + r * C + o_c, row, mask=o_c < C)


def add_rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, offset: float
) -> tuple[Tensor, Tensor]:
    """Compute `reference_block.add_rms_norm_ref`."""
    if x.shape[-1] > LARGEST_WIDTH or x.numel() == 0:
        return reference_block.add_rms_norm_ref(x, branch, weight, eps, offset=offset)
    out = torch.empty(x.shape, dtype=normed_dtype(x, weight, offset), device=x.device)
    return _sum_tokens(x, branch, weight, eps, offset, out, None, 8), out


def add_rms_norm_quantize(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, *, offset: float, num_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference_block.add_rms_norm_quantize_ref`."""
    if x.shape[-1] > LARGEST_WIDTH or x.numel() == 0:
        return reference_block.add_rms_norm_quantize_ref(x, branch, weight, eps, offset=offset, num_bits=num_bits)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    return _sum_tokens(x, branch, weight, eps, offset, codes, scale, num_bits), codes, scale


def _sum_tokens(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    out: Tensor,
    scale: Tensor | None,
    num_bits: int,
) -> Tensor:
    """Fill `out` with the normalized sum, or with its codes where there is a scale to fill too; return the sum."""
    rows, branches = as_rows(x), as_rows(x if branch is None else branch)
    total = x if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = token_tile("rms_norm_quantize", rows)  # it moves what that kernel moves
    with on_device_of(x):
        _add_rms_norm_fwd_kernel[(triton.cdiv(rows.shape[0], tile["BLOCK_R"]),)](
            rows,
            branches,
            weight.contiguous(),
            total,
            out,
            out if scale is None else scale,
            *rows.shape,
            rows.stride(0),
            branches.stride(0),
            eps,
            offset,
            HAS_BRANCH=branch is not None,
            WEIGHT_LAST=offset == 0.0,
            X_KIND=FLOAT_KINDS[x.dtype],
            OUT_KIND=FLOAT_KINDS[normed_dtype(x, weight, offset)],
            **code_constants(num_bits, x.device, codes=scale is not None),
            **tile,
        )
    return total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `reference_calibration.silu_mul_ref`."""
    gates, ups = as_rows(gate), as_rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        choice = launches.choice("silu_mul", "few" if len(gates) <= FEW_TOKENS else launches.DEFAULT, gate.device)
        with on_device_of(gate):
            _silu_mul_fwd_kernel[(len(gates), triton.cdiv(gates.shape[1], choice["BLOCK_C"]))](
                gates,
                ups,
                out,
                gates.shape[1],
                gates.stride(0),
                ups.stride(0),
                KIND=FLOAT_KINDS[gate.dtype],
                enable_fp_fusion=FP_FUSION,
                **overlap(gate.device),
                **choice,
            )
    return out


def gather_rows(table: Tensor, indices: Tensor) -> Tensor:
    """Compute `reference_block.gather_rows_ref`."""
    columns = table.shape[1]
    flat = indices.reshape(-1).contiguous()
    out = torch.empty(*indices.shape, columns, dtype=table.dtype, device=indices.device)
    if out.numel():
        choice = launches.choice("gather_rows", launches.DEFAULT, indices.device)
        with on_device_of(indices):
            _gather_rows_fwd_kernel[(len(flat), triton.cdiv(columns, choice["BLOCK_C"]))](
                table, flat, out, columns, **overlap(indices.device), **choice
            )
    return out
