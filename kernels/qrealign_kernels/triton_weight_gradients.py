"""Triton kernel that reduces the gradient of a rounded weight to all that the rounding depends on, in one pass.

A program owns whole scale groups of its rows and takes them one after the other; every sum has a fixed order, so two
runs give the same bits. Sums along columns are kept in registers and leave as one row a program, which torch adds up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels.reference import MIN_SCALE, code_range, kept_share
from qrealign_kernels.reference_calibration import (
    WeightGradients,
    WeightTransform,
    fake_quant_edited_weight_ref,
    transformed_weight,
)
from qrealign_kernels.triton_common import LARGEST_WIDTH, on_device_of
from qrealign_kernels.triton_math import FLOAT_KINDS, FP_FUSION, clip, convert
from qrealign_kernels.triton_weight import as_float, code_steps, kept_shares, row_tile, transformed_tile, weight_grid


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
        b_w = transformed_tile(b_raw, n, o_k, m_n, m_c, column_scale_ptr, row_divisor_ptr, HAS_COLUMN, HAS_ROW)
        if HAS_LOW or HAS_HIGH:
            minimum = tl.minimum(tl.min(b_w, axis=1), 0.0)
            maximum = tl.maximum(tl.max(b_w, axis=1), 0.0)
            low_share, high_share = kept_shares(low_share_ptr, high_share_ptr, group, m_n, HAS_LOW, HAS_HIGH)
            low, high, raw_scale, scale, zero_point = weight_grid(
                minimum, maximum, low_share, high_share, QMIN, QMAX, SYMMETRIC, SCALE_KIND, MIN_SCALE
            )
            steps = code_steps(
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
    column_scale, row_divisor = (None if part is None else as_float(part) for part in transform[:2])
    tile = row_tile("weight_gradients_bwd", width, weight.device)
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
