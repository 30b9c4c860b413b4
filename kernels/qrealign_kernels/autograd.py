"""Straight-through autograd of the fake-quantization ops, with an explicit backward on every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qrealign_kernels.interface import Backend
from qrealign_kernels.reference import WeightGrid, bound_gradients


class FakeQuantWeightFunction(torch.autograd.Function):
    """`fake_quant_weight_ref`, keeping no weight-sized tensor that its caller does not hold anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        low_logit: Tensor | None,
        high_logit: Tensor | None,
        num_bits: int,
        group_size: int | None,
        symmetric: bool,
        scale_dtype: torch.dtype,
        backend: Backend,
    ) -> Tensor:
        rows = weight.reshape(-1, group_size or weight.shape[1])
        # The sigmoid is torch's, since one of C++ would differ in the last bit, and with it codes.
        shares = [
            None if logit is None else torch.sigmoid(logit.float()).reshape(-1, 1) for logit in (low_logit, high_logit)
        ]
        fake, block = backend.fake_quant_weight(
            rows, *shares, num_bits=num_bits, symmetric=symmetric, scale_dtype=scale_dtype
        )
        fake = fake.reshape(weight.shape)
        ctx.weight_dtype, ctx.clips = weight.dtype, low_logit is not None or high_logit is not None
        if ctx.clips:
            ctx.num_bits, ctx.symmetric, ctx.backend = num_bits, symmetric, backend
            ctx.save_for_backward(weight, fake if backend.keeps_fake else None, low_logit, high_logit, *shares, block)
        return fake

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.clips:
            return grad.to(ctx.weight_dtype), *[None] * 7
        weight, fake, low_logit, high_logit, low_share, high_share, block = ctx.saved_tensors
        grid, backend = WeightGrid.of(block, symmetric=ctx.symmetric), ctx.backend
        by_row = (block.shape[1], -1)
        rows, grad = weight.reshape(by_row), grad.reshape(by_row)
        sums = backend.weight_gradient_sums(
            grad,
            rows,
            None if fake is None else fake.reshape(by_row),
            block,
            num_bits=ctx.num_bits,
            symmetric=ctx.symmetric,
        )
        grad_low, grad_high = bound_gradients(sums, grid, num_bits=ctx.num_bits, symmetric=ctx.symmetric)
        grad_weight = None
        if ctx.needs_input_grad[0]:
            at_minimum, at_maximum = _times_share(grad_low, low_share), _times_share(grad_high, high_share)
            grad_weight = backend.weight_gradient_rows(grad, rows, block, at_minimum, at_maximum)
            grad_weight = grad_weight.reshape(weight.shape).to(weight.dtype)
        return (
            grad_weight,
            _logit_gradient(grad_low, grid.minimum, low_share, low_logit),
            _logit_gradient(grad_high, grid.maximum, high_share, high_logit),
            *[None] * 5,
        )


def _times_share(grad_bound: Tensor, share: Tensor | None) -> Tensor:
    """Return the gradient of the extreme behind a bound: none where no logit moves the bound."""
    return torch.zeros_like(grad_bound) if share is None else grad_bound * share


def _logit_gradient(grad_bound: Tensor, extreme: Tensor, share: Tensor | None, logit: Tensor | None) -> Tensor | None:
    """Return the logit's gradient, through `bound = extreme * sigmoid(logit)`."""
    if share is None or logit is None:
        return None
    return (grad_bound * extreme * share * (1 - share)).reshape(logit.shape).to(logit.dtype)


class FakeQuantPerTokenFunction(torch.autograd.Function):
    """`fake_quant_per_token_ref`: the gradient passes straight through, so nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_bits: int, backend: Backend) -> Tensor:
        return backend.fake_quant_per_token(x, num_bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
