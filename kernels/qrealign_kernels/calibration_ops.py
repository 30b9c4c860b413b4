"""Public ops of calibration that join rounding with what stands before it; checks and choice of backend as in `ops.py`.

Under torch.compile each op without a gradient is one opaque operator, such as `qrealign::rms_norm_quantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.autograd_calibration import (
    RmsNormFakeQuantFunction,
    RotateHeadsFunction,
    SiluMulFakeQuantFunction,
)
from qrealign_kernels.backend import backend_for
from qrealign_kernels.operators import opaque
from qrealign_kernels.ops import check_activation, check_transform, check_weight, empty_codes
from qrealign_kernels.quantized import QuantizedActivations
from qrealign_kernels.reference_block import normed_dtype
from qrealign_kernels.reference_calibration import WeightGradients


def encode_weight(
    weight: Tensor,
    low_logit: Tensor | None = None,
    high_logit: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    column_scale: Tensor | None = None,
    row_divisor: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the codes behind `fake_quant_weight`, for an integer product; no gradient.

    Equal to `quantize_weight` of the explicit weight `weight * column_scale / row_divisor + left @ right`. Without an
    edit the codes are the same bit for bit; with one, `left @ right` is summed in another order, to within 2**-20 of
    the sum of its terms' magnitudes: scales agree to that and one rounding to `scale_dtype`, and a code differs by one
    where a weight lies that close to the border between two codes. A kernel stores neither the explicit weight nor the
    edit.

    Args:
        weight: `[N, K]` floating point.
        column_scale: `[K]` floating point, or None.
        row_divisor: `[N]` floating point, or None.
        left: `[N, r]` floating point, or None; comes with `right`.
        right: `[r, K]` floating point, or None.

    The other arguments, and the errors, are those of `fake_quant_weight`.

    Returns:
        `[N, K]` int8 codes, `[N, G]` float32 scales that `scale_dtype` holds exactly, and `[N, G]` int8 zero points, or
        None if symmetric.
    """
    check_weight(weight, low_logit, high_logit, num_bits, group_size, scale_dtype)
    transform = check_transform(weight, column_scale, row_divisor, left, right)
    with torch.no_grad():
        return backend_for(weight).encode_weight(
            weight,
            low_logit,
            high_logit,
            transform=transform,
            num_bits=num_bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
        )


def reduced_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    low_logit: Tensor | None = None,
    high_logit: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    column_scale: Tensor | None = None,
    row_divisor: Tensor | None = None,
) -> WeightGradients:
    """Return what the weight gradient of a linear layer gives to its rounding's parameters, without storing it.

    For `y = x @ fake_quant_weight(weight, ...).T` and the gradient of y, the `[N, K]` gradient `grad.T @ x` is consumed
    where it is made; the result equals differentiating `fake_quant_weight` with it.

    Args:
        grad: `[M, N]` floating point, gradient of the layer's output.
        x: `[M, K]` floating point, the layer's input as the product took it.

    The other arguments, and the errors, are those of `fake_quant_weight`.

    Returns:
        Gradients of `low_logit`, `high_logit`, `column_scale` and `row_divisor` where these are given, in their dtype;
        every other field is None.
    """
    check_weight(weight, low_logit, high_logit, num_bits, group_size, scale_dtype)
    transform = check_transform(weight, column_scale, row_divisor, None, None)
    rows, columns = weight.shape
    if grad.dim() != 2 or x.dim() != 2 or grad.shape != (x.shape[0], rows) or x.shape[1] != columns:
        raise ValueError(
            f"grad must be [M, {rows}] and x [M, {columns}] for this weight, got {tuple(grad.shape)} and "
            f"{tuple(x.shape)}"
        )
    with torch.no_grad():
        return backend_for(weight).reduced_weight_gradient(
            grad,
            x,
            weight,
            low_logit,
            high_logit,
            transform=transform,
            num_bits=num_bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
        )


def low_rank_gradients(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the factors of an edit `left @ right` of a linear layer's weight, straight through its
    rounding; the gradient of the weight itself, `[N, K]`, is never formed.

    Args:
        grad: `[M, N]` floating point, gradient of the layer's output.
        x: `[M, K]` floating point, the layer's input as the product took it, or its int8 codes.
        left: `[N, r]` floating point.
        right: `[r, K]` floating point.
        x_scale: `[M, 1]` float32; comes with codes.

    Returns:
        `[N, r]` and `[r, K]` in the factors' dtypes, accumulated in float32; a backend may round operands and inner
        products to grad's dtype first.

    Raises:
        ValueError: shapes disagree, or codes come without their scale.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    shapes = (grad.shape, x.shape, left.shape, right.shape)
    if any(len(shape) != 2 for shape in shapes) or shapes != (
        (grad.shape[0], left.shape[0]),
        (grad.shape[0], right.shape[1]),
        (left.shape[0], right.shape[0]),
        (left.shape[1], right.shape[1]),
    ):
        raise ValueError(
            "grad, x, left and right must be [M, N], [M, K], [N, r] and [r, K], got "
            + ", ".join(str(tuple(shape)) for shape in shapes)
        )
    if x.is_floating_point() != (x_scale is None) or (x_scale is not None and x_scale.shape != (x.shape[0], 1)):
        raise ValueError("codes come with a scale [M, 1], floating point values without one")
    with torch.no_grad():
        return backend_for(grad).low_rank_gradients(grad, x, left, right, x_scale)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, num_bits: int = 8
) -> QuantizedActivations:
    """Normalize tokens as Hugging Face's RMS norms do and quantize the result per token, in one pass. No gradient.

    Equal to `quantize_per_token` of `reference_calibration.rms_norm_ref`, the rounding to the model's dtype included;
    only the mean square is summed in another order, so a value whose rounding hangs on the sum's last bits can give
    another code, by one.

    Args:
        x: `[..., K]` float32, float16 or bfloat16, K > 0.
        weight: `[K]` floating point.
        eps: added to the mean square.
        offset: 0 where the rounded token is multiplied by the weight (Llama, Qwen2); else added to the weight in
            float32, before the rounding (Gemma: 1).
        num_bits: 2 to 8.

    Returns:
        `[..., K]` int8 codes, `[..., 1]` float32 scales, and the dtype that the normalized tokens would have.

    Raises:
        ValueError: a shape or the number of bits does not fit.
        TypeError: x or the weight is not floating point.
        BackendUnavailableError: the backend chosen by name cannot take this tensor.
    """
    check_norm(x, weight, num_bits)
    run = _rms_norm_quantize_op if torch.compiler.is_compiling() else _rms_norm_quantize
    codes, scale = run(x, weight, eps, offset, num_bits)
    return QuantizedActivations(codes, scale, normed_dtype(x, weight, offset))


def rms_norm_fake_quant(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, num_bits: int = 8) -> Tensor:
    """Normalize and quantize tokens as `rms_norm_quantize`, and back; gradients pass the rounding straight through.

    Arguments and errors are those of `rms_norm_quantize`.

    Returns:
        `[..., K]` in the dtype of the normalized tokens; differentiable in x and weight, for which x alone is kept.
    """
    check_norm(x, weight, num_bits)
    fake: Tensor = RmsNormFakeQuantFunction.apply(x, weight, eps, offset, num_bits, backend_for(x))
    return fake


def rms_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `rms_norm_fake_quant` in x and weight, for those who keep codes of its result alone.

    Args:
        grad: `[..., K]` floating point, gradient of the result.

    The other arguments, and the errors, are those of `rms_norm_quantize`.

    Returns:
        Gradients in the shapes and dtypes of x and weight.
    """
    check_norm(x, weight)
    _check_gradient(grad, x)
    with torch.no_grad():
        return backend_for(x).rms_norm_gradients(grad, x, weight, eps, offset=offset)


def silu_mul_quantize(gate: Tensor, up: Tensor, *, num_bits: int = 8) -> QuantizedActivations:
    """Quantize `silu(gate) * up` per token, as a gated MLP computes it, in one pass. No gradient.

    Equal to `quantize_per_token(F.silu(gate) * up)`, the roundings to the tensors' dtype included.

    Args:
        gate: `[..., K]` float32, float16 or bfloat16, K > 0; rows may be strided, such as one half of a wider tensor.
        up: the same shape and dtype.
        num_bits: 2 to 8.

    Returns:
        `[..., K]` int8 codes, `[..., 1]` float32 scales, and the tensors' dtype.

    Raises:
        ValueError: the shapes or the number of bits do not fit.
        TypeError: the tensors are not floating point, or of two dtypes.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    check_gate(gate, up, num_bits)
    run = _silu_mul_quantize_op if torch.compiler.is_compiling() else _silu_mul_quantize
    codes, scale = run(gate, up, num_bits)
    return QuantizedActivations(codes, scale, gate.dtype)


def silu_mul_fake_quant(gate: Tensor, up: Tensor, *, num_bits: int = 8) -> Tensor:
    """Quantize `silu(gate) * up` per token and back; gradients pass the rounding straight through.

    Arguments and errors are those of `silu_mul_quantize`.

    Returns:
        `[..., K]` in the tensors' dtype.
    """
    check_gate(gate, up, num_bits)
    fake: Tensor = SiluMulFakeQuantFunction.apply(gate, up, num_bits, backend_for(gate))
    return fake


def silu_mul_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `silu_mul_fake_quant` in gate and up, for those who keep codes of its result alone.

    Args:
        grad: `[..., K]` floating point, gradient of the result.

    The other arguments, and the errors, are those of `silu_mul_quantize`.

    Returns:
        Gradients in the shapes and dtype of gate and up.
    """
    check_gate(gate, up)
    _check_gradient(grad, gate)
    with torch.no_grad():
        return backend_for(gate).silu_mul_gradients(grad, gate, up)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions, as Hugging Face's models do: `x * cos + rotate_half(x) * sin`.

    Args:
        x: `[B, H, T, D]` float32, float16 or bfloat16, D even.
        cos: `[B or 1, T, D]` in x's dtype; gets no gradient, nor does `sin`.
        sin: the same.

    Returns:
        `[B, H, T, D]` in x's dtype, bit for bit that of the operations one by one; differentiable in x.

    Raises:
        ValueError: the shapes or dtypes do not fit.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    batch, _, tokens, width = x.shape if x.dim() == 4 else (0, 0, 0, 1)
    angles = {cos.shape, sin.shape} <= {(1, tokens, width), (batch, tokens, width)}
    if width % 2 or not angles or {cos.dtype, sin.dtype} != {x.dtype} or not x.is_floating_point():
        raise ValueError(
            "heads must be [B, H, T, D] with D even, cos and sin [B or 1, T, D] of their dtype, got "
            f"{tuple(x.shape)} {x.dtype}, {tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}"
        )
    turned: Tensor = RotateHeadsFunction.apply(x, cos, sin, backend_for(x))
    return turned


def _rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, offset: float, num_bits: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return backend_for(x).rms_norm_quantize(x, weight, eps, offset=offset, num_bits=num_bits)


def _silu_mul_quantize(gate: Tensor, up: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return backend_for(gate).silu_mul_quantize(gate, up, num_bits=num_bits)


_rms_norm_quantize_op = opaque(_rms_norm_quantize, lambda x, *_: empty_codes(x))
_silu_mul_quantize_op = opaque(_silu_mul_quantize, lambda gate, *_: empty_codes(gate))


def check_norm(x: Tensor, weight: Tensor, num_bits: int = 8) -> None:
    """Raise ValueError or TypeError where tokens cannot be normalized."""
    check_activation(x, num_bits)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight must be {(x.shape[-1],)} for x {tuple(x.shape)}, got {tuple(weight.shape)}")


def check_gate(gate: Tensor, up: Tensor, num_bits: int = 8) -> None:
    """Raise ValueError or TypeError where one tensor cannot be the gate of the other."""
    check_activation(gate, num_bits)
    if gate.shape != up.shape:
        raise ValueError(f"gate and up disagree: {tuple(gate.shape)} vs {tuple(up.shape)}")
    if gate.dtype != up.dtype:
        raise TypeError(f"gate and up must have one dtype, got {gate.dtype} and {up.dtype}")


def _check_gradient(grad: Tensor, like: Tensor) -> None:
    if grad.shape != like.shape or not grad.is_floating_point():
        raise ValueError(f"grad must be {tuple(like.shape)} floating point, got {tuple(grad.shape)} {grad.dtype}")
