"""The product of an edited linear on its grid for GPUs: the weight is rounded anew for each pass.

Between the passes a layer keeps its input as codes, a byte a number, and no weight: rounding one reads two bytes and
writes one or two, which next to the products is little. So blocks whose activations are kept cost no copy of their
weights, and blocks whose weights are streamed need theirs only while they run. Where there is memory to spare, a layer
may keep its weight's codes as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qrealign.quant.edits import LowRankEdit
from qrealign_kernels import (
    QuantizedActivations,
    encode_weight,
    fake_quant_per_token,
    fake_quant_weight,
    int8_matmul,
    int8_matmul_dx,
    low_rank_gradients,
    quantize_per_token,
)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a linear rounds: its weight's grid, and the bits of its input, None where that stays in floating point."""

    num_bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype
    activation_bits: int | None

    @property
    def grid(self) -> dict[str, Any]:
        """The grid as the ops' keyword arguments."""
        names = ("num_bits", "group_size", "symmetric", "scale_dtype")
        return {name: getattr(self, name) for name in names}


class InputCodes:
    """What became of the tensor that was read last: linears that read the same tensor quantize it once."""

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._key: tuple[object, ...] = ()
        self._codes: tuple[Tensor, Tensor] | None = None
        self._fake: weakref.ref[Tensor] | None = None

    def of(self, x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        """Return int8 codes `[M, K]` and float32 scales `[M, 1]` of `x` `[..., K]`."""
        self._read(x, num_bits)
        if self._codes is None:
            codes, scale = quantize_per_token(x.detach(), num_bits=num_bits)
            self._codes = codes.flatten(0, -2), scale.flatten(0, -2)
        return self._codes

    def fake(self, x: Tensor, num_bits: int) -> Tensor:
        """Return `x` fake-quantized, with autograd.

        The result lives as long as somebody else holds it, as products do for their backward pass.
        """
        self._read(x, num_bits)
        fake = None if self._fake is None else self._fake()
        if fake is None:
            fake = fake_quant_per_token(x, num_bits=num_bits)
            self._fake = weakref.ref(fake)
        return fake

    def provide(self, fake: Tensor, num_bits: int) -> Tensor:
        """Take note that a tensor has been fake-quantized where it was made, and return it."""
        self._read(fake, num_bits)
        self._fake = weakref.ref(fake)
        return fake

    def provide_codes(self, x: Tensor, num_bits: int, codes: Tensor, scale: Tensor) -> Tensor:
        """Take note of the codes of a tensor that nobody else reads, and return it."""
        self._read(x, num_bits)
        self._codes = codes.flatten(0, -2), scale.flatten(0, -2)
        return x

    def _read(self, x: Tensor, num_bits: int) -> None:
        """Forget what is known of another tensor, or of another content or use of this one."""
        key = (x._version, num_bits, torch.is_grad_enabled())
        if self._source is None or self._source() is not x or self._key != key:
            self._source, self._key = weakref.ref(x), key
            self._codes = self._fake = None


class _Coded(torch.autograd.Function):
    """Stands for a tensor of which there are codes alone: it has shape and gradient, and one number as its content."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, gradients: Callable[..., Sequence[Tensor]], *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.gradients = gradients
        return like.new_full((), float("nan")).expand(like.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.gradients(grad, *ctx.saved_tensors)
        return None, None, *(each if need else None for each, need in zip(found, ctx.needs_input_grad[2:], strict=True))


def coded_input(
    quantize: Callable[..., QuantizedActivations],
    gradients: Callable[..., Sequence[Tensor]],
    operands: Sequence[Tensor],
    num_bits: int,
    inputs: InputCodes,
) -> Tensor:
    """Quantize a tensor where it is made, for linears that read codes; nobody else may read what is returned.

    Args:
        quantize: makes the codes of the operands, `[..., K]`.
        gradients: takes the gradient of the result and the operands and returns theirs, straight through the rounding.
        operands: the first is of the shape of the result.
        num_bits: of the codes.
        inputs: of the linears that will read it.
    """
    with torch.no_grad():
        codes, scale, _ = quantize(*operands)
    return inputs.provide_codes(_Coded.apply(operands[0], gradients, *operands), num_bits, codes, scale)


class _IntegerLinear(torch.autograd.Function):
    """Codes times codes forward; the input's gradient from the weight rounded anew, or from its kept codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: tuple[Tensor, Tensor],
        weight: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        rounding: Rounding,
        keep: bool,
    ) -> Tensor:
        w_codes, w_scale, zero_point = encode_weight(weight, left=left, right=right, **rounding.grid)
        kept = (w_codes, w_scale, zero_point) if keep else (weight,)
        ctx.save_for_backward(*codes, left, right, *kept)
        ctx.rounding, ctx.keep = rounding, keep
        out = int8_matmul(*codes, w_codes, w_scale, bias, x.dtype, zero_point=zero_point)
        return out.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scale, left, right, *kept = ctx.saved_tensors
        rows, d_x = grad.flatten(0, -2), None
        if ctx.needs_input_grad[0] and ctx.keep:
            d_x = int8_matmul_dx(rows, *kept)
        elif ctx.needs_input_grad[0]:
            # Rounded to the dtype of the product at once: codes would be read, scaled and written once more for it.
            d_x = rows @ _rounded(kept[0], left, right, ctx.rounding, grad.dtype)
        d_left, d_right = low_rank_gradients(rows, x_codes, left, right, x_scale)
        d_x = None if d_x is None else d_x.reshape(*grad.shape[:-1], -1)
        return d_x, None, None, None, d_left, d_right, None, None


class _RoundedLinear(torch.autograd.Function):
    """The product of a floating-point input with the rounded weight, which the backward pass computes again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, rounding: Rounding
    ) -> Tensor:
        ctx.save_for_backward(x, weight, left, right)
        ctx.rounding = rounding
        return F.linear(x, _rounded(weight, left, right, rounding, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right = ctx.saved_tensors
        d_x = grad @ _rounded(weight, left, right, ctx.rounding, grad.dtype) if ctx.needs_input_grad[0] else None
        d_left, d_right = low_rank_gradients(grad.flatten(0, -2), x.flatten(0, -2), left, right)
        return d_x, None, None, d_left, d_right, None


def _rounded(weight: Tensor, left: Tensor, right: Tensor, rounding: Rounding, dtype: torch.dtype) -> Tensor:
    """Return the edited weight on its grid, `[N, K]` in `dtype`."""
    return fake_quant_weight(weight, left=left, right=right, out_dtype=dtype, **rounding.grid)


def coded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    edit: LowRankEdit,
    rounding: Rounding,
    inputs: InputCodes,
    *,
    keep: bool = False,
) -> Tensor:
    """Return the product of `x` with the rounded, edited weight, with gradients to `x` and to the edit's factors.

    Equal to `edited_linear` of the fake-quantized operands up to the order of the sums, and to the rounding of a
    fake-quantized input to its dtype, which integer codes are spared.

    Args:
        x: `[..., K]` floating point.
        weight: `[N, K]`, without the edit, as loaded.
        bias: `[N]` in x's dtype, or None; it gets no gradient.
        edit: unmasked.
        rounding: the grids.
        inputs: shared by the linears that may read the same tensor.
        keep: hold the weight's codes, a byte a weight, until the backward pass, instead of rounding the weight again;
            without effect where the input stays in floating point.
    """
    if rounding.activation_bits is None:
        return _RoundedLinear.apply(x, weight, bias, edit.left, edit.right, rounding)
    codes = inputs.of(x, rounding.activation_bits)
    return _IntegerLinear.apply(x, codes, weight, bias, edit.left, edit.right, rounding, keep)
