"""Public ops: arguments are checked here, the backend is chosen by device or by `use_backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels import reference
from qrealign_kernels.autograd import FakeQuantPerTokenFunction, FakeQuantWeightFunction
from qrealign_kernels.autograd_calibration import EditedFakeQuantFunction
from qrealign_kernels.backend import backend_for
from qrealign_kernels.operators import opaque
from qrealign_kernels.packing import PACKABLE_BITS, packed_length
from qrealign_kernels.reference_calibration import WeightTransform, transformed_weight

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fake_quant_weight(
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
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Round a weight to its learned grid and back: equal to `dequantize_weight(*quantize_weight(...))`.

    Before that it is transformed and edited where asked: `weight * column_scale / row_divisor + left @ right`. The
    definition of this is `reference_calibration.fake_quant_edited_weight_ref`; on GPUs `encode_weight` says how exact
    an edit is.

    Gradients reach the weight straight through where it is not clipped, what transforms and edits it, and the logits.
    Without logits the (edited) weight's gradient is the incoming one; with them the group extremes also receive the
    gradient of the bounds they define. The full definition stands at `reference.fake_quant_weight_ref`.

    Args:
        weight: `[N, K]` floating point, any device.
        low_logit: `[N, G]` floating point, G = K / group_size or 1: sigmoid(logit) of the group's minimum is kept. None
            keeps all of it.
        high_logit: the same for the maximum.
        num_bits: 2 to 8.
        group_size: columns that share a scale, a divisor of K; None for the whole row.
        symmetric: no zero point if true.
        scale_dtype: dtype that must hold the scale exactly: float32, float16 or bfloat16.
        column_scale: `[K]` floating point, or None.
        row_divisor: `[N]` floating point, or None.
        left: `[N, r]` floating point, or None; comes with `right`.
        right: `[r, K]` floating point, or None.
        out_dtype: float32, float16 or bfloat16: of the result, and of the gradient that comes back.

    Returns:
        `[N, K]` in `out_dtype`.

    Raises:
        ValueError: a shape, the group size or the number of bits does not fit.
        TypeError: a dtype is not of the ones named.
        BackendUnavailableError: the backend chosen by name cannot take this tensor.
    """
    check_weight(weight, low_logit, high_logit, num_bits, group_size, scale_dtype)
    transform = check_transform(weight, column_scale, row_divisor, left, right)
    if out_dtype not in SCALE_DTYPES:
        raise TypeError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")
    backend = backend_for(weight)
    fake: Tensor
    if backend.fake_quant_edited_weight is not None:
        grid = {"num_bits": num_bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
        fake = EditedFakeQuantFunction.apply(weight, low_logit, high_logit, *transform, grid, out_dtype, backend)
        return fake
    fake = FakeQuantWeightFunction.apply(
        transformed_weight(weight, transform),
        low_logit,
        high_logit,
        num_bits,
        group_size,
        symmetric,
        scale_dtype,
        backend,
    )
    return fake.to(out_dtype)


def quantize_weight(
    weight: Tensor,
    low_logit: Tensor | None = None,
    high_logit: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the integer codes of a weight, their scales and zero points.

    Arguments and errors are those of `fake_quant_weight`. Runs once per checkpoint, so it is the reference on every
    backend.

    Returns:
        `[N, K]` int8 codes, `[N, G]` float32 scales that `scale_dtype` holds exactly, and `[N, G]` int8 zero points, or
        None if symmetric.
    """
    check_weight(weight, low_logit, high_logit, num_bits, group_size, scale_dtype)
    return reference.quantize_weight_ref(
        weight,
        low_logit,
        high_logit,
        num_bits=num_bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )


def dequantize_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the weight behind codes: `(codes - zero_point) * scale`, computed in float32.

    Args:
        codes: `[N, K]` int8.
        scale: `[N, G]` float32; G divides K.
        zero_point: `[N, G]` int8 or None.
        out_dtype: dtype of the result.

    Returns:
        `[N, K]` in `out_dtype`.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: the codes or zero points are not int8.
    """
    _check_codes(codes)
    if scale.dim() != 2 or scale.shape[0] != codes.shape[0] or scale.shape[1] == 0 or codes.shape[1] % scale.shape[1]:
        raise ValueError(
            f"scale must be [N, G] with G a divisor of K, got {tuple(scale.shape)} for codes {tuple(codes.shape)}"
        )
    if zero_point is not None and zero_point.dtype != torch.int8:
        raise TypeError(f"zero_point must be int8, got {zero_point.dtype}")
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(f"zero_point and scale disagree: {tuple(zero_point.shape)} vs {tuple(scale.shape)}")
    return reference.dequantize_weight_ref(codes, scale.float(), zero_point, out_dtype=out_dtype)


def quantize_per_token(x: Tensor, *, num_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantize each token symmetrically: `scale = max|x| / ((2**num_bits - 1) / 2)`.

    Args:
        x: `[..., K]` floating point, K > 0; computed in float32. No gradient.
        num_bits: 2 to 8.

    Returns:
        `[..., K]` int8 codes and `[..., 1]` float32 scales.

    Raises:
        ValueError: the number of bits or the shape does not fit.
        TypeError: x is not floating point.
        BackendUnavailableError: the backend chosen by name cannot take this tensor.
    """
    check_activation(x, num_bits)
    run = _quantize_per_token_op if torch.compiler.is_compiling() else _quantize_per_token
    codes, scale = run(x, num_bits)
    return codes, scale


def _quantize_per_token(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return backend_for(x).quantize_per_token(x, num_bits)


def empty_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return tensors of the shape and dtype of a token's codes and scales, for the tracing of opaque operators."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_quantize_per_token_op = opaque(_quantize_per_token, lambda x, _: empty_codes(x))


def fake_quant_per_token(x: Tensor, *, num_bits: int = 8) -> Tensor:
    """Quantize each token and back, like the checkpoint format's runtime does; the gradient passes straight through.

    Arguments and errors are those of `quantize_per_token`.

    Returns:
        `[..., K]` in x's dtype.
    """
    check_activation(x, num_bits)
    fake: Tensor = FakeQuantPerTokenFunction.apply(x, num_bits, backend_for(x))
    return fake


def pack_codes(codes: Tensor, num_bits: int, dim: int = 1) -> Tensor:
    """Pack codes into 32-bit words, lowest bits first, as `packing.py` describes.

    Args:
        codes: `[R, C]` int8 in [-2**(num_bits - 1), 2**(num_bits - 1) - 1].
        num_bits: 4 or 8.
        dim: the dimension that shrinks: 1 for weights, 0 for zero points.

    Returns:
        int32, `[R, ceil(C * num_bits / 32)]` for dim 1 and `[ceil(R * num_bits / 32), C]` for dim 0.

    Raises:
        ValueError: the number of bits, the dimension or a code is out of range.
        TypeError: the codes are not int8.
    """
    _check_packing(num_bits, dim)
    _check_codes(codes)
    if num_bits < 8 and codes.numel():
        low, high = (int(end) for end in torch.aminmax(codes))
        qmin, qmax = reference.code_range(num_bits)
        if low < qmin or high > qmax:
            raise ValueError(f"{num_bits}-bit codes lie in [{qmin}, {qmax}], got [{low}, {high}]")
    return backend_for(codes).pack_codes(codes, num_bits, dim)


def unpack_codes(packed: Tensor, num_bits: int, shape: tuple[int, int], dim: int = 1) -> Tensor:
    """Return the codes that `pack_codes` packed.

    Args:
        packed: int32, as `pack_codes` returns it.
        num_bits: 4 or 8.
        shape: `(R, C)` of the codes.
        dim: the dimension that was packed.

    Returns:
        `[R, C]` int8.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: the words are not int32.
    """
    _check_packing(num_bits, dim)
    rows, columns = shape
    expected = (rows, packed_length(columns, num_bits)) if dim == 1 else (packed_length(rows, num_bits), columns)
    if packed.dtype != torch.int32:
        raise TypeError(f"packed must be int32, got {packed.dtype}")
    if tuple(packed.shape) != expected:
        raise ValueError(f"packed must be {expected} for codes {(rows, columns)}, got {tuple(packed.shape)}")
    return backend_for(packed).unpack_codes(packed, num_bits, (rows, columns), dim)


def pack_int4(codes: Tensor, dim: int = 1) -> Tensor:
    """Pack 4-bit codes, eight to a word: `pack_codes` with `num_bits=4`."""
    return pack_codes(codes, 4, dim)


def unpack_int4(packed: Tensor, shape: tuple[int, int], dim: int = 1) -> Tensor:
    """Return the codes that `pack_int4` packed."""
    return unpack_codes(packed, 4, shape, dim)


def check_weight(
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    num_bits: int,
    group_size: int | None,
    scale_dtype: torch.dtype,
) -> None:
    """Raise ValueError or TypeError where a weight and its grid do not fit."""
    _check_bits(num_bits)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be [N, K] and not empty, got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"scale_dtype must be float32, float16 or bfloat16, got {scale_dtype}")
    rows, columns = weight.shape
    if group_size is not None and (group_size < 1 or columns % group_size):
        raise ValueError(f"group_size must divide K, got {group_size} for K = {columns}")
    expected = (rows, columns // (group_size or columns))
    for name, logit in (("low_logit", low_logit), ("high_logit", high_logit)):
        if logit is not None and tuple(logit.shape) != expected:
            raise ValueError(
                f"{name} must be {expected} for weight {(rows, columns)} and {group_size=}, got {tuple(logit.shape)}"
            )


def check_transform(
    weight: Tensor,
    column_scale: Tensor | None,
    row_divisor: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
) -> WeightTransform:
    """Return what changes a weight, or raise ValueError or TypeError where it does not fit."""
    rows, columns = weight.shape
    if (left is None) != (right is None):
        raise ValueError("left and right come together, got one of them")
    rank = -1 if left is None else left.shape[-1]
    shapes = {
        "column_scale": (column_scale, (columns,)),
        "row_divisor": (row_divisor, (rows,)),
        "left": (left, (rows, rank)),
        "right": (right, (rank, columns)),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected or tensor.numel() == 0:
            raise ValueError(f"{name} must be {expected} for weight {(rows, columns)}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    return WeightTransform(column_scale, row_divisor, left, right)


def check_activation(x: Tensor, num_bits: int) -> None:
    """Raise ValueError or TypeError where tokens cannot be quantized."""
    _check_bits(num_bits)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., K] with K > 0, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")


def _check_bits(num_bits: int) -> None:
    if not 2 <= num_bits <= 8:
        raise ValueError(f"num_bits must be 2 to 8, got {num_bits}")


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes must be [R, C], got {tuple(codes.shape)}")


def _check_packing(num_bits: int, dim: int) -> None:
    if num_bits not in PACKABLE_BITS:
        raise ValueError(f"num_bits must be one of {PACKABLE_BITS} to be packed, got {num_bits}")
    if dim not in (0, 1):
        raise ValueError(f"dim must be 0 or 1, got {dim}")
