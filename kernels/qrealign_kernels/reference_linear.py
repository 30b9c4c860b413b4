"""Pure-PyTorch definition of the quantized linear products, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.quantized import CODES, PackedWeight, QuantizedActivations
from qrealign_kernels.reference import dequantize_weight_ref, quantize_per_token_ref

# Products of an int8 code and an int8 code less its zero point are at most 128 * 255: sums of 512 stay below 2**24, so
# float32 holds every one exactly, in whatever order a library adds them.
_EXACT_TERMS = 512


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """Return `x @ w.T` of integers, exactly; a float32 product is the fastest exact one on every device.

    Args:
        x: `[M, K]` int8.
        w: `[N, K]` int8 or int16, of magnitude at most 255.

    Returns:
        `[M, N]` int32; K < 65,536.
    """
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], _EXACT_TERMS):
        piece = slice(start, start + _EXACT_TERMS)
        total += (x[:, piece].float() @ w[:, piece].float().T).to(torch.int32)
    return total


def int8_matmul_ref(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply codes exactly and scale: `sum_g (x_g @ (w_g - zero_g).T) * w_scale_g * x_scale + bias`.

    The sum over a group g of columns is an int32; everything behind it is float32, rounded once to `out_dtype`.

    Args:
        x_codes: `[M, K]` int8.
        x_scale: `[M, 1]` float32.
        w_codes: `[N, K]` int8.
        w_scale: `[N, G]` floating point; G divides K.
        zero_point: `[N, G]` int8, None for symmetric weights.
        bias: `[N]` floating point, or None.
        out_dtype: dtype of the result.

    Returns:
        `[M, N]` in `out_dtype`.

    Source: per-token by per-channel int8 products, arXiv 2211.10438 section 2.
    """
    groups = w_scale.shape[1]
    width = w_codes.shape[1] // groups
    total = torch.zeros(x_codes.shape[0], w_codes.shape[0], device=x_codes.device)
    for group in range(groups):
        columns = slice(group * width, (group + 1) * width)
        steps = w_codes[:, columns]
        if zero_point is not None:
            steps = steps.to(torch.int16) - zero_point[:, group : group + 1]
        total += integer_product(x_codes[:, columns], steps).float() * w_scale[:, group].float()
    total *= x_scale
    if bias is not None:
        total += bias.float()
    return total.to(out_dtype)


def int8_matmul_dx_ref(grad: Tensor, w_codes: Tensor, w_scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return `grad @ dequantize(w)`, the gradient of a linear layer's input.

    Args:
        grad: `[M, N]` floating point.
        w_codes: `[N, K]` int8.
        w_scale: `[N, G]` floating point; G divides K.
        zero_point: `[N, G]` int8, None for symmetric weights.

    Returns:
        `[M, K]` in grad's dtype, accumulated in float32.
    """
    return (grad.float() @ dequantize_weight_ref(w_codes, w_scale.float(), zero_point)).to(grad.dtype)


def repack_weight_ref(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, num_bits: int, activation_bits: int | None
) -> PackedWeight:
    """Return the weight as it is: layout `CODES`, one byte a code whatever `num_bits`."""
    return PackedWeight(
        data=codes.contiguous(),
        scale=scale.float().contiguous(),
        zero_point=None if zero_point is None else zero_point.contiguous(),
        shape=(codes.shape[0], codes.shape[1]),
        num_bits=num_bits,
        activation_bits=activation_bits,
        layout=CODES,
    )


def packed_linear_ref(
    x: Tensor | QuantizedActivations, weight: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return the definition of `linear_ops.packed_linear` for a weight of layout `CODES`.

    Args:
        x: `[M, K]` floating point, or its codes.
        weight: as `repack_weight_ref` makes it.
        bias: `[N]` floating point, or None.
        out_dtype: dtype of the result.

    Returns:
        `[M, N]` in `out_dtype`.
    """
    if weight.activation_bits is None:
        assert isinstance(x, Tensor)
        out = x.float() @ dequantize_weight_ref(weight.data, weight.scale, weight.zero_point).T
        return (out if bias is None else out + bias.float()).to(out_dtype)
    codes, scale = (
        quantize_per_token_ref(x, num_bits=weight.activation_bits) if isinstance(x, Tensor) else (x.codes, x.scale)
    )
    return int8_matmul_ref(codes, scale, weight.data, weight.scale, weight.zero_point, bias, out_dtype=out_dtype)
