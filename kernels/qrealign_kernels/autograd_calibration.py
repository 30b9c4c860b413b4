"""Autograd of the ops that join rounding with what stands before it: explicit backward passes, nothing extra kept."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qrealign_kernels.interface import Backend
from qrealign_kernels.reference_calibration import WeightGradients, WeightTransform


class EditedFakeQuantFunction(torch.autograd.Function):
    """`fake_quant_edited_weight_ref` by a backend that fuses it; of the grid, the groups' extremes alone are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        low_logit: Tensor | None,
        high_logit: Tensor | None,
        column_scale: Tensor | None,
        row_divisor: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        grid: dict[str, Any],
        out_dtype: torch.dtype,
        backend: Backend,
    ) -> Tensor:
        assert backend.fake_quant_edited_weight is not None
        transform = WeightTransform(column_scale, row_divisor, left, right)
        learns_bounds = any(ctx.needs_input_grad) and (low_logit is not None or high_logit is not None)
        fake, extremes = backend.fake_quant_edited_weight(
            weight, low_logit, high_logit, transform=transform, out_dtype=out_dtype, keep=learns_bounds, **grid
        )
        ctx.save_for_backward(weight, low_logit, high_logit, *transform, extremes)
        ctx.grid, ctx.backend = grid, backend
        return fake

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, low_logit, high_logit, *transform, extremes = ctx.saved_tensors
        gradients = ctx.backend.edited_weight_gradients(
            grad,
            weight,
            low_logit,
            high_logit,
            transform=WeightTransform(*transform),
            extremes=extremes,
            wanted=frozenset(itertools.compress(WeightGradients._fields, ctx.needs_input_grad)),
            **ctx.grid,
        )
        return (*gradients, None, None, None)


class RmsNormFakeQuantFunction(torch.autograd.Function):
    """`rms_norm_fake_quant_ref`, keeping its input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, num_bits: int, backend: Backend
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset, ctx.backend = eps, offset, backend
        return backend.rms_norm_fake_quant(x, weight, eps, offset=offset, num_bits=num_bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = ctx.backend.rms_norm_gradients(grad, x, weight, ctx.eps, offset=ctx.offset)
        return grad_x, grad_weight, None, None, None, None


class SiluMulFakeQuantFunction(torch.autograd.Function):
    """`silu_mul_fake_quant_ref`, keeping its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, num_bits: int, backend: Backend) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return backend.silu_mul_fake_quant(gate, up, num_bits=num_bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.backend.silu_mul_gradients(grad, *ctx.saved_tensors), None, None


class RotateHeadsFunction(torch.autograd.Function):
    """`rotate_heads_ref`, keeping the angles alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend
        return backend.rotate_heads(x, cos, sin, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.backend.rotate_heads(grad, *ctx.saved_tensors, transposed=True), None, None, None
