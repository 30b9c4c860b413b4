"""Pure-PyTorch definitions of the ops of calibration that are fused with what stands before the rounding.

A weight is transformed and edited before it is rounded; activations are normalized or gated. As in `reference.py`,
`*_ref` are definitions that torch differentiates by itself, and what kernels are measured against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qrealign_kernels.reference import (
    fake_quant_per_token_ref,
    fake_quant_weight_ref,
    quantize_per_token_ref,
    quantize_weight_ref,
)


class WeightTransform(NamedTuple):
    """What changes a weight before it is rounded; each is optional, but `left` and `right` come together.

    column_scale: `[K]`. row_divisor: `[N]`. left: `[N, r]`, right: `[r, K]`, an additive edit of rank r.
    """

    column_scale: Tensor | None = None
    row_divisor: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return all(part is None for part in self)


class WeightGradients(NamedTuple):
    """Gradients of what a rounded weight depends on, in the order of the op's arguments; None where not wanted."""

    weight: Tensor | None = None
    low_logit: Tensor | None = None
    high_logit: Tensor | None = None
    column_scale: Tensor | None = None
    row_divisor: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


def transformed_weight(weight: Tensor, transform: WeightTransform) -> Tensor:
    """Return `weight * column_scale / row_divisor + left @ right`, `[N, K]`: float32, or the weight itself if nothing
    changes it.
    """
    if transform.is_empty:
        return weight
    column_scale, row_divisor, left, right = transform
    edited = weight.float()
    if column_scale is not None:
        edited = edited * column_scale.float()
    if row_divisor is not None:
        edited = edited / row_divisor.float()[:, None]
    if left is not None and right is not None:
        edited = edited + left.float() @ right.float()
    return edited


def fake_quant_edited_weight_ref(
    weight: Tensor,
    low_logit: Tensor | None = None,
    high_logit: Tensor | None = None,
    *,
    transform: WeightTransform,
    num_bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Transform and edit a weight, round it to its grid and back; the definition of value and gradients.

    It is `fake_quant_weight_ref` of `transformed_weight`, in `out_dtype`; torch's autograd through both, straight
    through the rounding, is the definition of every gradient.
    """
    edited = transformed_weight(weight, transform)
    fake = fake_quant_weight_ref(
        edited,
        low_logit,
        high_logit,
        num_bits=num_bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )
    return fake.to(out_dtype)


def encode_weight_ref(
    weight: Tensor,
    low_logit: Tensor | None = None,
    high_logit: Tensor | None = None,
    *,
    transform: WeightTransform,
    num_bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes, scales and zero points behind `fake_quant_edited_weight_ref`: `quantize_weight_ref` of
    `transformed_weight`.
    """
    with torch.no_grad():
        return quantize_weight_ref(
            transformed_weight(weight, transform),
            low_logit,
            high_logit,
            num_bits=num_bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
        )


def reduced_weight_gradient_ref(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    *,
    transform: WeightTransform,
    num_bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> WeightGradients:
    """Return what the gradient `grad.T @ x` of the rounded weight gives to logits, column scale and row divisor.

    Args:
        grad: `[M, N]` floating point, gradient of the layer's output.
        x: `[M, K]`, the layer's input.

    The other arguments are those of `fake_quant_edited_weight_ref`; an edit gets no gradient.
    """
    column_scale, row_divisor, left, right = transform
    wanted = {
        name: tensor.detach().requires_grad_()
        for name, tensor in (
            ("low_logit", low_logit),
            ("high_logit", high_logit),
            ("column_scale", column_scale),
            ("row_divisor", row_divisor),
        )
        if tensor is not None
    }
    with torch.enable_grad():
        fake = fake_quant_edited_weight_ref(
            weight.detach(),
            wanted.get("low_logit"),
            wanted.get("high_logit"),
            transform=WeightTransform(wanted.get("column_scale"), wanted.get("row_divisor"), left, right),
            num_bits=num_bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
        )
    found = torch.autograd.grad(fake, list(wanted.values()), (grad.T @ x).float()) if wanted else ()
    return WeightGradients(**dict(zip(wanted, found, strict=True)))


def low_rank_gradients_ref(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the factors of an additive edit `left @ right` of a linear layer's weight.

    The gradient of the weight, `dW = grad.T @ x` `[N, K]`, is never formed: `d_left = dW right.T = grad.T (x right.T)`
    and `d_right = left.T dW = (grad left).T x` take `r / K` and `r / N` of its work.

    Args:
        grad: `[M, N]` floating point, gradient of the layer's output.
        x: `[M, K]` in grad's dtype, what the product read, or its int8 codes.
        left: `[N, r]` floating point.
        right: `[r, K]` floating point.
        x_scale: `[M, 1]` float32, units of a code, where `x` holds codes.

    Returns:
        The gradients in the factors' shapes and dtypes; operands and both inner products are rounded to grad's dtype.
    """
    dtype = grad.dtype
    x = x.to(dtype)
    into, out_of = x @ right.T.to(dtype), grad @ left.to(dtype)  # [M, r]
    if x_scale is not None:
        into, out_of = (into * x_scale).to(dtype), (out_of * x_scale).to(dtype)
    return (grad.T @ into).to(left.dtype), (out_of.T @ x).to(right.dtype)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Normalize each token by its root mean square, in float32, and scale it: Hugging Face's norms.

    With offset 0 the normalized token is rounded to x's dtype and then multiplied by the weight (Llama, Qwen2). With an
    offset it is multiplied by `offset + weight` in float32 and then rounded (Gemma).

    Args:
        x: `[..., K]` floating point.
        weight: `[K]` floating point.
        eps: added to the mean square.
        offset: added to the weight.

    Returns:
        `[..., K]`: in the dtype of `weight * x` with offset 0, else in x's.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset == 0.0:
        return weight * normed.to(x.dtype)
    return (normed * (offset + weight.float())).to(x.dtype)


def rms_norm_quantize_ref(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, num_bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Return `quantize_per_token_ref(rms_norm_ref(...))`: codes and scales."""
    return quantize_per_token_ref(rms_norm_ref(x, weight, eps, offset=offset), num_bits=num_bits)


def rms_norm_fake_quant_ref(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, num_bits: int = 8) -> Tensor:
    """Return `fake_quant_per_token_ref(rms_norm_ref(...))`: the gradient passes the rounding straight through."""
    return fake_quant_per_token_ref(rms_norm_ref(x, weight, eps, offset=offset), num_bits=num_bits)


def silu_mul_ref(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, each step rounded to the tensors' dtype, as a gated MLP computes it."""
    return F.silu(gate) * up


def silu_mul_quantize_ref(gate: Tensor, up: Tensor, *, num_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return `quantize_per_token_ref(silu_mul_ref(...))`: codes and scales."""
    return quantize_per_token_ref(silu_mul_ref(gate, up), num_bits=num_bits)


def silu_mul_fake_quant_ref(gate: Tensor, up: Tensor, *, num_bits: int = 8) -> Tensor:
    """Return `fake_quant_per_token_ref(silu_mul_ref(...))`: the gradient passes the rounding straight through."""
    return fake_quant_per_token_ref(silu_mul_ref(gate, up), num_bits=num_bits)


def rms_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `rms_norm_ref` in x and weight, computed in float32, in their dtypes."""
    wide, grad = x.float(), grad.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    scaled = grad * (offset + weight.float())
    grad_x = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    grad_weight = (grad * normed).reshape(-1, weight.numel()).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def silu_mul_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `silu_mul_ref` in gate and up, computed in float32, in their dtype."""
    wide, grad = gate.float(), grad.float()
    share = torch.sigmoid(wide)
    grad_gate = grad * up.float() * share * (1 + wide * (1 - share))
    return grad_gate.to(gate.dtype), (grad * wide * share).to(up.dtype)


def rotate_heads_ref(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool = False) -> Tensor:
    """Turn each head by its token's position, as Hugging Face's models do: `x * cos + rotate_half(x) * sin`.

    Args:
        x: `[B, H, T, D]`, D even.
        cos, sin: `[B or 1, T, D]`.
        transposed: apply the transpose instead, which takes the gradient of the result to that of x.

    Returns:
        `[B, H, T, D]` in x's dtype, every operation rounded to it.

    Source: rotary position embedding, arXiv 2104.09864, with halves in the place of neighbours.
    """
    cos, sin = cos[:, None], sin[:, None]
    if transposed:
        first, second = (x * sin).chunk(2, dim=-1)
        return x * cos + torch.cat([second, -first], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
