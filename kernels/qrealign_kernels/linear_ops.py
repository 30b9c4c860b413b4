"""Public linear products on quantized operands: arguments are checked here, the backend is chosen as in `ops.py`.

Eager calls go straight to the backend. Under torch.compile a call is one opaque operator, `qrealign::packed_linear` and
its like, so that nothing traces into a kernel launch and nothing but the launch happens at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.backend import backend_for
from qrealign_kernels.interface import REFERENCE
from qrealign_kernels.operators import opaque
from qrealign_kernels.packing import PACKABLE_BITS
from qrealign_kernels.quantized import CODES, PackedWeight, QuantizedActivations

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_COLUMNS = 1 << 16  # int32 sums of products up to 128 * 255 are exact below this


def repack_weight(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    num_bits: int,
    activation_bits: int | None,
) -> PackedWeight:
    """Return a quantized weight in the layout that `packed_linear` reads on its device; once, at load.

    Args:
        codes: `[N, K]` int8 in the range of signed `num_bits` codes, as `quantize_weight` and `unpack_codes` return
            them; K < 65,536.
        scale: `[N, G]` floating point > 0; G divides K.
        zero_point: `[N, G]` int8, None for symmetric weights.
        num_bits: 4 or 8.
        activation_bits: 4 or 8 to round each token to that many bits and multiply integers; None to multiply floating
            point activations by the dequantized weight.

    Returns:
        The weight, on the codes' device.

    Raises:
        ValueError: a shape or a number of bits does not fit.
        TypeError: a dtype is not of the ones named.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    if num_bits not in PACKABLE_BITS or activation_bits not in (None, *PACKABLE_BITS):
        raise ValueError(
            f"num_bits must be 4 or 8 and activation_bits 4, 8 or None, got {num_bits} and {activation_bits}"
        )
    _check_weight(codes, scale, zero_point)
    backend = backend_for(codes)
    return backend.repack_weight(codes, scale, zero_point, num_bits=num_bits, activation_bits=activation_bits)


def packed_linear(
    x: Tensor | QuantizedActivations,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply tokens by a packed weight: `x @ dequantize(weight).T + bias`. No gradient.

    With `weight.activation_bits` None, floating point tokens meet the dequantized weight and are accumulated in
    float32; a backend may round the dequantized weight to x's dtype, or tokens of 16-bit floating point to 16-bit
    integers, with a scale for every 16 columns. Else tokens are rounded to symmetric codes
    (`quantize_per_token`) unless they come as codes, the products of codes are summed exactly in int32, and scales and
    bias are applied in float32. Either way the result is rounded once.

    Args:
        x: `[..., K]` float32, float16 or bfloat16; or codes, where the weight has `activation_bits`.
        weight: as `repack_weight` made it, on x's device.
        bias: `[N]` floating point, or None.
        out_dtype: None for x's dtype.

    Returns:
        `[..., N]`.

    Raises:
        ValueError: a shape does not fit, or codes meet a weight for floating point activations.
        TypeError: a dtype is not of the ones named.
        BackendUnavailableError: the backend chosen by name cannot take these tensors or this weight's layout.
    """
    tokens, x_scale, dtype = x if isinstance(x, QuantizedActivations) else (x, None, x.dtype)
    _check_tokens(tokens, x_scale, weight.shape[1])
    if x_scale is not None and weight.activation_bits is None:
        raise ValueError("quantized activations need a weight repacked with activation_bits")
    _check_bias(bias, weight.shape[0])
    dtype = _float_dtype(out_dtype or dtype)
    rows = tokens.reshape(-1, weight.shape[1])
    scale_rows = None if x_scale is None else x_scale.reshape(-1, 1)
    run = _packed_linear_op if torch.compiler.is_compiling() else _packed_linear
    out = run(
        rows,
        scale_rows,
        weight.data,
        weight.scale,
        weight.zero_point,
        bias,
        *weight.shape,
        weight.num_bits,
        weight.activation_bits,
        weight.layout,
        dtype,
    )
    return out.reshape(*tokens.shape[:-1], weight.shape[0])


def int8_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Multiply codes exactly and scale, reading the weight's codes as `quantize_weight` writes them. No gradient.

    The definition is `reference_linear.int8_matmul_ref`.

    Args:
        x_codes: `[M, K]` int8; K < 65,536.
        x_scale: `[M, 1]` float32.
        w_codes: `[N, K]` int8, of 2 to 8 bits.
        w_scale: `[N, G]` floating point; G divides K.
        bias: `[N]` floating point, or None.
        out_dtype: float32, float16 or bfloat16.
        zero_point: `[N, G]` int8, None for symmetric weights.

    Returns:
        `[M, N]` in `out_dtype`.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype is not of the ones named.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    _check_weight(w_codes, w_scale, zero_point)
    if x_codes.dim() != 2 or x_codes.dtype != torch.int8:
        raise TypeError(f"x_codes must be [M, K] int8, got {tuple(x_codes.shape)} {x_codes.dtype}")
    _check_tokens(x_codes, x_scale, w_codes.shape[1])
    _check_bias(bias, w_codes.shape[0])
    run = _int8_matmul_op if torch.compiler.is_compiling() else _int8_matmul
    return run(x_codes, x_scale, w_codes, w_scale, zero_point, bias, _float_dtype(out_dtype))


def int8_matmul_dx(grad: Tensor, w_codes: Tensor, w_scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return `grad @ dequantize(w)`, the input gradient of a linear layer, reading the weight's int8 codes.

    Args:
        grad: `[M, N]` float32, float16 or bfloat16.
        w_codes: `[N, K]` int8.
        w_scale: `[N, G]` floating point; G divides K.
        zero_point: `[N, G]` int8, None for symmetric weights.

    Returns:
        `[M, K]` in grad's dtype, accumulated in float32; a backend may round grad times scale, or the dequantized
        weight, to grad's dtype first.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype is not of the ones named.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    _check_weight(w_codes, w_scale, zero_point)
    _float_dtype(grad.dtype)
    if grad.dim() != 2 or grad.shape[1] != w_codes.shape[0]:
        raise ValueError(f"grad and w_codes disagree on N: {tuple(grad.shape)} vs {tuple(w_codes.shape)}")
    run = _int8_matmul_dx_op if torch.compiler.is_compiling() else _int8_matmul_dx
    return run(grad, w_codes, w_scale, zero_point)


def _packed_linear(
    x: Tensor,
    x_scale: Tensor | None,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    num_bits: int,
    activation_bits: int | None,
    layout: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Call the backend on rows; the flat arguments are those an operator's schema can hold."""
    weight = PackedWeight(
        data=data,
        scale=scale,
        zero_point=zero_point,
        shape=(n, k),
        num_bits=num_bits,
        activation_bits=activation_bits,
        layout=layout,
    )
    tokens = x if x_scale is None else QuantizedActivations(x, x_scale, out_dtype)
    backend = REFERENCE if layout == CODES else backend_for(x)
    with torch.no_grad():
        return backend.packed_linear(tokens, weight, bias, out_dtype)


def _int8_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    with torch.no_grad():
        run = backend_for(x_codes).int8_matmul
        return run(x_codes, x_scale, w_codes, w_scale, zero_point, bias, out_dtype=out_dtype)


def _int8_matmul_dx(grad: Tensor, w_codes: Tensor, w_scale: Tensor, zero_point: Tensor | None) -> Tensor:
    with torch.no_grad():
        return backend_for(grad).int8_matmul_dx(grad, w_codes, w_scale, zero_point)


_packed_linear_op = opaque(_packed_linear, lambda x, *rest: x.new_empty(x.shape[0], rest[5], dtype=rest[-1]))
_int8_matmul_op = opaque(_int8_matmul, lambda x, _, w, *rest: x.new_empty(x.shape[0], w.shape[0], dtype=rest[-1]))
_int8_matmul_dx_op = opaque(_int8_matmul_dx, lambda grad, w, *_: grad.new_empty(grad.shape[0], w.shape[1]))


def _check_weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    for name, tensor in (("codes", codes), ("zero_point", zero_point)):
        if tensor is not None and tensor.dtype != torch.int8:
            raise TypeError(f"{name} must be int8, got {tensor.dtype}")
    if codes.dim() != 2 or codes.numel() == 0 or codes.shape[1] >= MAX_COLUMNS:
        raise ValueError(f"codes must be [N, K], not empty and K below {MAX_COLUMNS}, got {tuple(codes.shape)}")
    if scale.dim() != 2 or scale.shape[0] != codes.shape[0] or not scale.shape[1] or codes.shape[1] % scale.shape[1]:
        raise ValueError(
            f"scale must be [N, G] with G a divisor of K, got {tuple(scale.shape)} for codes {tuple(codes.shape)}"
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(f"zero_point and scale disagree: {tuple(zero_point.shape)} vs {tuple(scale.shape)}")


def _check_tokens(tokens: Tensor, scale: Tensor | None, columns: int) -> None:
    if tokens.dim() == 0 or tokens.shape[-1] != columns:
        raise ValueError(f"x must be [..., {columns}] for this weight, got {tuple(tokens.shape)}")
    if scale is None:
        _float_dtype(tokens.dtype)
    elif tokens.dtype != torch.int8 or scale.dtype != torch.float32:
        raise TypeError(f"codes must be int8 and their scale float32, got {tokens.dtype} and {scale.dtype}")
    elif scale.shape != (*tokens.shape[:-1], 1):
        raise ValueError(f"codes and scale disagree: {tuple(tokens.shape)} vs {tuple(scale.shape)}")


def _check_bias(bias: Tensor | None, rows: int) -> None:
    if bias is not None and (tuple(bias.shape) != (rows,) or bias.dtype not in FLOATS):
        raise ValueError(f"bias must be [{rows}] floating point, got {tuple(bias.shape)} {bias.dtype}")


def _float_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return dtype
