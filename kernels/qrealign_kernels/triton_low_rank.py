"""Triton kernels for the gradients of a weight's low-rank edit: two launches in the place of some fifteen.

Next to the products of a layer this is little arithmetic over tensors that the L2 cache still holds, so what counts is
how many kernels there are. A program carries two ranks at a time and sums in a fixed order; a library's products are
faster where the ranks are many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches
from qrealign_kernels.reference_calibration import low_rank_gradients_ref
from qrealign_kernels.triton_common import as_float, on_device_of

LARGEST_RANK = 8
_RANKS = 2  # of a program


@triton.jit
def _along_rows(
    rows_ptr, factor_ptr, x_scale_ptr, out_ptr, M, C, stride_c, stride_r, RANK,
    HAS_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Multiply rows `[M, C]` by two columns of a factor; `[M, RANK]` float32, in units of the tokens' scale."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_rank = tl.program_id(1) * 2
    second_rank = tl.minimum(first_rank + 1, RANK - 1)  # of an odd number the last one is computed twice
    b_first = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    b_second = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (m < M)[:, None] & (cols < C)[None, :]
        b_rows = tl.load(rows_ptr + m[:, None] * C + cols[None, :], mask=mask, other=0).to(tl.float32)
        # As tiles of the rows' shape, whose values come to lie where they are needed.
        factors = tl.broadcast_to((factor_ptr + cols * stride_c)[None, :], b_rows.shape)
        b_first += b_rows * tl.load(factors + first_rank * stride_r, mask=mask, other=0.0)
        b_second += b_rows * tl.load(factors + second_rank * stride_r, mask=mask, other=0.0)
    first, second = tl.sum(b_first, axis=1), tl.sum(b_second, axis=1)
    if HAS_SCALE:
        scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
        first *= scale
        second *= scale
    tl.store(out_ptr + m * RANK + first_rank, first, mask=m < M)
    tl.store(out_ptr + m * RANK + second_rank, second, mask=m < M)


@triton.jit
def _low_rank_inner_kernel(
    grad_ptr, x_ptr, x_scale_ptr, left_ptr, right_ptr, inner_ptr, M, N, K, RANK,
    HAS_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write `x @ right.T` and `grad @ left`, `[2, M, RANK]` float32, both times the tokens' scale."""
    if tl.program_id(2) == 0:
        _along_rows(x_ptr, right_ptr, x_scale_ptr, inner_ptr, M, K, 1, K, RANK, HAS_SCALE, BLOCK_M, BLOCK_C)
    else:
        inner_ptr += M * RANK
        _along_rows(grad_ptr, left_ptr, x_scale_ptr, inner_ptr, M, N, RANK, 1, RANK, HAS_SCALE, BLOCK_M, BLOCK_C)


@triton.jit
def _along_columns(
    rows_ptr, inner_ptr, out_ptr, M, C, stride_c, stride_r, RANK,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Multiply the transpose of rows `[M, C]` by two columns of `inner` `[M, RANK]`; nothing behind the last column."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_rank = tl.program_id(1) * 2
    second_rank = tl.minimum(first_rank + 1, RANK - 1)  # of an odd number the last one is computed twice
    b_first = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    b_second = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    end = tl.where(tl.program_id(0) * BLOCK_C < C, M, 0)
    for start in range(0, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & (cols < C)[None, :]
        b_rows = tl.load(rows_ptr + m.to(tl.int64)[:, None] * C + cols[None, :], mask=mask, other=0).to(tl.float32)
        first = tl.load(inner_ptr + m * RANK + first_rank, mask=m < M, other=0.0)
        second = tl.load(inner_ptr + m * RANK + second_rank, mask=m < M, other=0.0)
        b_first += b_rows * first[:, None]
        b_second += b_rows * second[:, None]
    out_ptrs = out_ptr + cols * stride_c
    tl.store(out_ptrs + first_rank * stride_r, tl.sum(b_first, axis=0), mask=cols < C)
    tl.store(out_ptrs + second_rank * stride_r, tl.sum(b_second, axis=0), mask=cols < C)


@triton.jit
def _low_rank_outer_kernel(
    grad_ptr, x_ptr, inner_ptr, grad_left_ptr, grad_right_ptr, M, N, K, RANK,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of `left` `[N, RANK]` and `right` `[RANK, K]`."""
    if tl.program_id(2) == 0:
        _along_columns(grad_ptr, inner_ptr, grad_left_ptr, M, N, RANK, 1, RANK, BLOCK_M, BLOCK_C)
    else:
        _along_columns(x_ptr, inner_ptr + M * RANK, grad_right_ptr, M, K, 1, K, RANK, BLOCK_M, BLOCK_C)


def low_rank_gradients(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, x_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `reference_calibration.low_rank_gradients_ref`; nothing between the sums is rounded."""
    (tokens, rows), (rank, columns) = grad.shape, right.shape
    if rank > LARGEST_RANK or tokens == 0:
        return low_rank_gradients_ref(grad, x, left, right, x_scale)
    grad, x = grad.contiguous(), x.contiguous()
    inner = torch.empty(2, tokens, rank, device=grad.device)
    d_left, d_right = (torch.empty(factor.shape, device=grad.device) for factor in (left, right))
    pairs = triton.cdiv(rank, _RANKS)
    with on_device_of(grad):
        choice = launches.choice("low_rank_inner", launches.DEFAULT, grad.device)
        _low_rank_inner_kernel[(triton.cdiv(tokens, choice["BLOCK_M"]), pairs, 2)](
            grad,
            x,
            inner if x_scale is None else x_scale.contiguous(),
            as_float(left),
            as_float(right),
            inner,
            tokens,
            rows,
            columns,
            rank,
            HAS_SCALE=x_scale is not None,
            **choice,
        )
        choice = launches.choice("low_rank_outer", launches.DEFAULT, grad.device)
        _low_rank_outer_kernel[(triton.cdiv(max(rows, columns), choice["BLOCK_C"]), pairs, 2)](
            grad, x, inner, d_left, d_right, tokens, rows, columns, rank, **choice
        )
    return d_left.to(left.dtype), d_right.to(right.dtype)
