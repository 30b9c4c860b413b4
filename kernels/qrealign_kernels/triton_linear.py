"""The quantized linear products on Triton kernels: which kernel for how many tokens, and its launch.

Keys of the launch tables are the number of tokens rounded up to a power of two, "m2" to "m8192"; for one token K so
rounded, "k4096", and "k4096-codes" where the token comes rounded; behind it what `launches.by_shape` adds. The entry
"linear_routes" gives the tokens up to which the kernels for few tokens are used: INT8_FEW and INT4_FEW, by the weight's
bits. Behind that, integers are multiplied in tiles, and floating point tokens by the library, with a dequantized copy
of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qrealign_kernels import (
    cuda,
    cuda_tiles,
    launches,
    layouts,
    reference_linear,
    triton_decode,
    triton_few,
    triton_tiles,
)
from qrealign_kernels.layouts import BLOCK, PLANE, PLANES4, ROWS8
from qrealign_kernels.quantized import PackedWeight, QuantizedActivations
from qrealign_kernels.reference import ZERO_SCALE_REPLACEMENT, code_range
from qrealign_kernels.triton_activations import quantize_per_token
from qrealign_kernels.triton_common import on_device_of
from qrealign_kernels.triton_overlap import overlap

DENSE_BYTES = 64 * 2**20  # most of a weight that is dequantized at a time: a 7B model's largest takes 180 MB
_ROWS = 256  # such a part holds a multiple of these, a whole number of the library's tiles
_HALVES = (torch.float16, torch.bfloat16)


def repack_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, num_bits: int, activation_bits: int | None
) -> PackedWeight:
    """Compute `reference_linear.repack_weight_ref` in the layout of the kernels, where they know the weight's form."""
    groups = scale.shape[1]
    width = codes.shape[1] // groups
    whole_groups = groups == 1 or width % (4 * PLANE) == 0 or (activation_bits is None and width in (PLANE, 2 * PLANE))
    if num_bits == 8 and groups == 1 and zero_point is None:
        layout, data = ROWS8, layouts.to_rows8(codes)
    elif num_bits == 4 and whole_groups:
        layout, data = PLANES4, layouts.to_planes4(codes)
    else:
        return reference_linear.repack_weight_ref(
            codes, scale, zero_point, num_bits=num_bits, activation_bits=activation_bits
        )
    return PackedWeight(
        data=data,
        scale=layouts.narrowest_scale(scale),
        zero_point=None if zero_point is None else zero_point.contiguous(),
        shape=(codes.shape[0], codes.shape[1]),
        num_bits=num_bits,
        activation_bits=activation_bits,
        layout=layout,
    )


def packed_linear(
    x: Tensor | QuantizedActivations, weight: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Compute `reference_linear.packed_linear_ref`."""
    tokens = x.codes if isinstance(x, QuantizedActivations) else x
    out = torch.empty(tokens.shape[0], weight.shape[0], dtype=out_dtype, device=tokens.device)
    if tokens.shape[0] == 0:
        return out
    with on_device_of(tokens):
        if (done := cuda.packed_linear(x, weight, bias, out)) is not None:
            return done
        if weight.activation_bits is None:
            assert isinstance(x, Tensor)
            return _float_product(x.contiguous(), weight, bias, out)
        return _integer_product(x, weight, bias, out)


def _integer_product(
    x: Tensor | QuantizedActivations, weight: PackedWeight, bias: Tensor | None, out: Tensor
) -> Tensor:
    tokens, routes = out.shape[0], launches.choice("linear_routes", launches.DEFAULT, out.device)
    if tokens == 1:
        return _launch_gemv(x, weight, bias, out)
    bits = weight.activation_bits or 8
    codes, scale = quantize_per_token(x, bits) if isinstance(x, Tensor) else (x.codes.contiguous(), x.scale)
    if weight.layout == ROWS8:
        if tokens <= routes["INT8_FEW"]:
            return _launch_int8_few(layouts.pad_columns(codes, layouts.ALIGNMENT), scale, weight, bias, out)
        return _launch_int8_tile(codes, scale, weight.data, weight.scale, None, bias, out)
    if tokens <= routes["INT4_FEW"]:
        return _launch_int4_few(codes, scale, weight, bias, out)
    # The zero point is subtracted while unpacking: 4-bit differences fit eight bits.
    return _launch_int8_tile(codes, scale, _unpack4(weight, torch.int8), weight.scale, None, bias, out)


def _float_product(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    tokens, routes = out.shape[0], launches.choice("linear_routes", launches.DEFAULT, out.device)
    if (
        done := cuda_tiles.packed_linear(x, weight, bias, out, launches.by_shape(_key(tokens), *weight.shape))
    ) is not None:
        return done
    if weight.layout == PLANES4 and tokens == 1:
        return _launch_gemv(x, weight, bias, out)
    if x.dtype in _HALVES and weight.layout == ROWS8 and tokens <= routes["INT8_FEW"]:
        return _launch_int8_few(x, None, weight, bias, out)
    if x.dtype in _HALVES and weight.layout == PLANES4 and tokens <= routes["INT4_FEW"]:
        return _launch_int4_few(x, None, weight, bias, out)
    return _dense_product(x, weight, bias, out)


def _dense_product(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """Let the library multiply, with a copy of the weight in x's dtype, of at most DENSE_BYTES at a time."""
    rows, columns = weight.shape
    parts = triton.cdiv(rows * columns * x.element_size(), DENSE_BYTES)
    step = triton.cdiv(triton.cdiv(rows, parts), _ROWS) * _ROWS
    for first in range(0, rows, step):
        part = weight if step >= rows else weight.rows(first, min(first + step, rows))
        if part.layout == PLANES4:
            dense = _unpack4(part, x.dtype)
        else:
            dense = _scale8(part.data[:, :columns], part.scale, None, x.dtype)
        target = out[:, first : first + step]
        if x.dtype == out.dtype:
            torch.mm(x, dense.T, out=target)
        else:
            target.copy_(torch.mm(x, dense.T))
        del dense  # before the next one is made
    return out if bias is None else out.add_(bias)


def int8_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Compute `reference_linear.int8_matmul_ref`."""
    if w_scale.shape[1] > 1 and w_codes.shape[1] // w_scale.shape[1] % PLANE:
        return reference_linear.int8_matmul_ref(
            x_codes, x_scale, w_codes, w_scale, zero_point, bias, out_dtype=out_dtype
        )
    out = torch.empty(x_codes.shape[0], w_codes.shape[0], dtype=out_dtype, device=x_codes.device)
    if x_codes.shape[0] == 0:
        return out
    with on_device_of(x_codes):
        return _launch_int8_tile(x_codes.contiguous(), x_scale, w_codes.contiguous(), w_scale, zero_point, bias, out)


def int8_matmul_dx(grad: Tensor, w_codes: Tensor, w_scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Compute `reference_linear.int8_matmul_dx_ref`: the library multiplies a copy of the weight in grad's dtype.

    A kernel that widens the codes in registers is slower: the tensor cores want them from shared memory, to which they
    then travel twice.
    """
    with on_device_of(grad):
        return torch.mm(grad, _scale8(w_codes, w_scale, zero_point, grad.dtype))


def _key(tokens: int) -> str:
    return f"m{triton.next_power_of_2(min(tokens, 8192))}"


def few_tokens(key: str) -> dict[str, int]:
    """Return what a key of the tables of kernels for few tokens stands for: all tokens are one tile."""
    return {"BLOCK_M": 16 if key == launches.DEFAULT else max(8, int(key.partition("-")[0][1:]))}


def _choice(kernel: str, key: str, out: Tensor, columns: int) -> launches.Choice:
    """Return the launch of a kernel that computes `out` by rows of so many columns."""
    return launches.choice(kernel, launches.by_shape(key, out.shape[1], columns), out.device)


def _group(weight: PackedWeight) -> int:
    """Return the group size as the kernels take it: 0 for whole rows."""
    return weight.group_size or 0


def _launch_gemv(x: Tensor | QuantizedActivations, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """Multiply one token, rounding it inside the kernel where the weight wants codes."""
    (rows, columns), integer = weight.shape, weight.activation_bits is not None
    tokens, x_scale = (x, x) if isinstance(x, Tensor) else (x.codes, x.scale)
    fixed = tokens.dtype in _HALVES and _group(weight) % (BLOCK // 2) == 0
    name = "int4_gemv" if integer else "int4_fixed_gemv" if fixed else "int4_float_gemv"
    name = "int8_gemv" if weight.layout == ROWS8 else name
    rounded = integer and not isinstance(x, Tensor)
    choice = _choice(name, f"k{triton.next_power_of_2(columns)}{'-codes' if rounded else ''}", out, columns)
    qmin, qmax = code_range(weight.activation_bits or 8)
    per_word = 4 if weight.layout == ROWS8 else 8
    words = weight.data.view(torch.int32)
    constants: dict[str, Any] = {
        "K": columns,
        "KP": words.shape[1] * per_word,
        "HAS_BIAS": bias is not None,
    }
    if integer:
        constants |= {"QUANTIZE": isinstance(x, Tensor), "QMIN": qmin, "QMAX": qmax}
        constants |= {"ZERO_SCALE": ZERO_SCALE_REPLACEMENT}
    pointers = [tokens.contiguous(), *([x_scale] if integer else []), words, weight.scale]
    if weight.layout == PLANES4:
        pointers.append(words if weight.zero_point is None else weight.zero_point)
        constants |= {"G": weight.groups, "GROUP": _group(weight), "HAS_ZERO": weight.zero_point is not None}
    kernel = getattr(triton_decode, f"_{name}_fwd_kernel")
    grid = (triton.cdiv(rows, choice["BLOCK_N"]),)
    kernel[grid](*pointers, out if bias is None else bias, out, rows, **constants, **choice, **overlap(out.device))
    return out


def _launch_int8_few(
    x: Tensor, x_scale: Tensor | None, weight: PackedWeight, bias: Tensor | None, out: Tensor
) -> Tensor:
    tokens, columns = x.shape
    choice = _choice("int8_few", _key(tokens), out, columns) | few_tokens(_key(tokens))
    grid = (triton.cdiv(out.shape[1], choice["BLOCK_N"]),)
    triton_few._int8_few_fwd_kernel[grid](
        x,
        x if x_scale is None else x_scale,
        weight.data,
        weight.scale,
        out if bias is None else bias,
        out,
        tokens,
        out.shape[1],
        columns,
        weight.data.shape[1],
        INTEGER=x_scale is not None,
        HAS_BIAS=bias is not None,
        EVEN=columns % (choice["SPLIT"] * choice["BLOCK_K"]) == 0,
        **choice,
        **overlap(out.device),
    )
    return out


def _launch_int4_few(
    x: Tensor, x_scale: Tensor | None, weight: PackedWeight, bias: Tensor | None, out: Tensor
) -> Tensor:
    tokens, columns = x.shape
    kernel = "int4_few" if x_scale is None else "int4_int_few"
    choice = _choice(kernel, _key(tokens), out, columns) | few_tokens(_key(tokens))
    grid = (triton.cdiv(out.shape[1], choice["BLOCK_N"]),)
    triton_few._int4_few_fwd_kernel[grid](
        x,
        x if x_scale is None else x_scale,
        weight.data,
        weight.scale,
        x if weight.zero_point is None else weight.zero_point,
        out if bias is None else bias,
        out,
        tokens,
        out.shape[1],
        columns,
        weight.data.shape[1] * 8,
        weight.groups,
        INTEGER=x_scale is not None,
        GROUP=_group(weight),
        HAS_ZERO=weight.zero_point is not None,
        HAS_BIAS=bias is not None,
        EVEN=columns % (choice["SPLIT"] * BLOCK) == 0,
        **choice,
        **overlap(out.device),
    )
    return out


def _launch_int8_tile(
    codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Multiply codes by `[N, KW]` int8, KW >= K, whose scales are `[N, G]` of any strides."""
    tokens, columns = codes.shape
    groups = w_scale.shape[1]
    group = 0 if groups == 1 else columns // groups
    name = "int8_tile" if group == 0 else "int8_group_tile"
    choice = dict(_choice(name, _key(tokens), out, columns))
    if group % choice["BLOCK_K"]:
        choice["BLOCK_K"] = group & -group  # the largest power of two in it
    grid = (triton.cdiv(tokens, choice["BLOCK_M"]) * triton.cdiv(out.shape[1], choice["BLOCK_N"]),)
    triton_tiles._int8_tile_fwd_kernel[grid](
        codes,
        x_scale,
        w_codes,
        w_scale,
        codes if zero_point is None else zero_point,
        out if bias is None else bias,
        out,
        tokens,
        out.shape[1],
        columns,
        w_codes.stride(0),
        *w_scale.stride(),
        *((0, 0) if zero_point is None else zero_point.stride()),
        GROUP=group,
        HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None,
        EVEN=columns % choice["BLOCK_K"] == 0,
        **choice,
        **overlap(out.device),
    )
    return out


def _unpack4(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight in a floating point dtype, or its codes less the zero point as int8."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    choice = launches.choice("unpack4", launches.DEFAULT, weight.device)
    blocks = weight.data.shape[1] // PLANE
    triton_tiles._unpack4_kernel[(triton.cdiv(rows, choice["BLOCK_R"]), triton.cdiv(blocks, choice["BLOCK_C"]))](
        weight.data,
        weight.scale,
        out if weight.zero_point is None else weight.zero_point,
        out,
        rows,
        columns,
        weight.data.shape[1] * 8,
        weight.groups,
        GROUP=_group(weight),
        HAS_ZERO=weight.zero_point is not None,
        SCALED=dtype != torch.int8,
        **choice,
    )
    return out


def _scale8(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the weight behind int8 codes `[N, K]`, whose scales are `[N, G]` of any strides."""
    rows, columns = codes.shape
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    choice = launches.choice("scale8", launches.DEFAULT, codes.device)
    triton_tiles._scale8_kernel[(triton.cdiv(rows, choice["BLOCK_R"]), triton.cdiv(columns, choice["BLOCK_C"]))](
        codes,
        scale,
        codes if zero_point is None else zero_point,
        out,
        rows,
        columns,
        codes.stride(0),
        *scale.stride(),
        *((0, 0) if zero_point is None else zero_point.stride()),
        GROUP=0 if scale.shape[1] == 1 else columns // scale.shape[1],
        HAS_ZERO=zero_point is not None,
        **choice,
    )
    return out
