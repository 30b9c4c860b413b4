"""The ops on the compiled extension: tensors are laid out here and cross as addresses and sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from qrealign_kernels import cpu_linear, native
from qrealign_kernels.interface import REFERENCE
from qrealign_kernels.packing import packed_length
from qrealign_kernels.reference import GradientSums

_module, UNAVAILABLE_REASON = native.load_extension()
_C: Any = _module
_SCALE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def isa() -> str:
    """Return the instruction set that the extension uses on this machine, or "none" without the extension."""
    return "none" if _C is None else str(_C.isa())


def _float_rows(tensor: Tensor) -> Tensor:
    """Return contiguous float32, the tensor itself where it is."""
    return tensor.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def fake_quant_weight(
    rows: Tensor,
    low_share: Tensor | None,
    high_share: Tensor | None,
    *,
    num_bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.fake_quant_weight_rows`."""
    rows = _float_rows(rows)
    count, columns = rows.shape
    low_share, high_share = (None if share is None else _float_rows(share) for share in (low_share, high_share))
    fake, block = torch.empty_like(rows), rows.new_zeros(7, count, 1)
    _C.fake_quant_weight(
        rows.data_ptr(),
        _address(low_share),
        _address(high_share),
        fake.data_ptr(),
        block.data_ptr(),
        count,
        columns,
        num_bits,
        symmetric,
        _SCALE_KINDS[scale_dtype],
        torch.get_num_threads(),
    )
    return fake, block


def weight_gradient_sums(
    grad: Tensor, rows: Tensor, fake: None, block: Tensor, *, num_bits: int, symmetric: bool
) -> GradientSums:
    """Compute `reference.weight_gradient_sums`; the forward's result is not needed."""
    grad, rows, block = _float_rows(grad), _float_rows(rows), block.contiguous()
    sums = rows.new_empty(3, rows.shape[0], 1)
    _C.weight_gradient_sums(
        grad.data_ptr(),
        rows.data_ptr(),
        block.data_ptr(),
        sums.data_ptr(),
        *rows.shape,
        num_bits,
        symmetric,
        torch.get_num_threads(),
    )
    return GradientSums(*sums)


def weight_gradient_rows(grad: Tensor, rows: Tensor, block: Tensor, at_minimum: Tensor, at_maximum: Tensor) -> Tensor:
    """Compute `reference.weight_gradient_rows`."""
    grad, rows, block, at_minimum, at_maximum = map(_float_rows, (grad, rows, block, at_minimum, at_maximum))
    result = torch.empty_like(rows)
    _C.weight_gradient_rows(
        grad.data_ptr(),
        rows.data_ptr(),
        block.data_ptr(),
        at_minimum.data_ptr(),
        at_maximum.data_ptr(),
        result.data_ptr(),
        *rows.shape,
        torch.get_num_threads(),
    )
    return result


def fake_quant_per_token(x: Tensor, num_bits: int) -> Tensor:
    """Compute `reference.fake_quant_per_token_rows`."""
    values = _float_rows(x)
    fake = torch.empty_like(values)
    _C.fake_quant_per_token(
        values.data_ptr(), fake.data_ptr(), *_token_shape(values), num_bits, torch.get_num_threads()
    )
    return fake.to(x.dtype)


def quantize_per_token(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Compute `reference.quantize_per_token_rows`."""
    values = _float_rows(x)
    codes, scale = torch.empty_like(values, dtype=torch.int8), values.new_empty(*values.shape[:-1], 1)
    _C.quantize_per_token(
        values.data_ptr(), codes.data_ptr(), scale.data_ptr(), *_token_shape(values), num_bits, torch.get_num_threads()
    )
    return codes, scale


def _token_shape(x: Tensor) -> tuple[int, int]:
    """Return the number of tokens and their width."""
    return x.numel() // x.shape[-1], x.shape[-1]


def pack_codes(codes: Tensor, num_bits: int, dim: int) -> Tensor:
    """Compute `packing.pack_codes_ref`."""
    if dim == 0:
        return pack_codes(codes.t(), num_bits, 1).t().contiguous()
    codes = codes.contiguous()
    packed = torch.empty(codes.shape[0], packed_length(codes.shape[1], num_bits), dtype=torch.int32)
    _C.pack_codes(codes.data_ptr(), packed.data_ptr(), *codes.shape, num_bits, torch.get_num_threads())
    return packed


def unpack_codes(packed: Tensor, num_bits: int, shape: tuple[int, int], dim: int) -> Tensor:
    """Compute `packing.unpack_codes_ref`."""
    if dim == 0:
        return unpack_codes(packed.t(), num_bits, (shape[1], shape[0]), 1).t().contiguous()
    packed = packed.contiguous()
    codes = torch.empty(shape, dtype=torch.int8)
    _C.unpack_codes(packed.data_ptr(), codes.data_ptr(), *shape, num_bits, torch.get_num_threads())
    return codes


BACKEND = dataclasses.replace(
    REFERENCE,
    fake_quant_weight=fake_quant_weight,
    weight_gradient_sums=weight_gradient_sums,
    weight_gradient_rows=weight_gradient_rows,
    fake_quant_per_token=fake_quant_per_token,
    quantize_per_token=quantize_per_token,
    pack_codes=pack_codes,
    unpack_codes=unpack_codes,
    repack_weight=cpu_linear.repack_weight,
    packed_linear=cpu_linear.packed_linear,
    keeps_fake=False,
)
