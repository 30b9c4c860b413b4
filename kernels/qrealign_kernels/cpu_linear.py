"""Packed linear products on the compiled extension: int8 and int4 weights, repacked once into blocks of 16 rows.

Layout `BLOCKS16`, uint8, flat: `[ceil(N / 16)][G][quads][16][4]`, the order in which csrc/cpu reads it. A byte is an
8-bit code, or two 4-bit codes plus 8 (the earlier one in the low half); each group is padded by zero codes to whole
tiles. Behind the 8-bit codes of a block's group stand their sums as int32 `[16]`. Scales and zero points keep the shape
`[N, G]` but lie in memory as `[G][N, padded to 16]`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from qrealign_kernels import native
from qrealign_kernels.interface import BackendUnavailableError
from qrealign_kernels.quantized import PackedWeight, QuantizedActivations

_module, UNAVAILABLE_REASON = native.load_extension()
_C: Any = _module

BLOCKS16 = "blocks16"
BLOCK_ROWS = 16
# Columns that a group is padded to: of AMX's tiles for 8-bit codes, of one 32-bit lane for 4-bit codes.
GROUP_MULTIPLE = {8: 64, 4: 8}
# What the tokens of an integer product are: codes, or floats of a dtype that is rounded inside it.
_CODES = 0
_ROUNDED = {torch.float32: 1, torch.bfloat16: 2}
# "scalar", "avx2", "avx512vnni" or "amx"; "" is the fastest that the processor has. All give the same bits.
ISA = os.environ.get("QREALIGN_CPU_ISA", "")


def isa() -> str:
    """Return the instruction set of the products on this machine, or "none" without the extension.

    Raises:
        BackendUnavailableError: QREALIGN_CPU_ISA names one that this machine does not have.
    """
    if _C is None:
        return "none"
    try:
        return str(_C.linear_isa(ISA))
    except (TypeError, ValueError) as error:  # the former of bytes that are no text
        raise BackendUnavailableError(
            f"QREALIGN_CPU_ISA={ISA}: {error}; unset it, or name scalar, avx2, avx512vnni or amx"
        ) from error


def repack_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, num_bits: int, activation_bits: int | None
) -> PackedWeight:
    """Compute `reference_linear.repack_weight_ref` in layout `BLOCKS16`."""
    rows, columns = codes.shape
    groups = scale.shape[1]
    grouped = _pad(codes.reshape(rows, groups, -1), GROUP_MULTIPLE[num_bits])
    if num_bits == 4:
        nibbles = (grouped + 8).view(torch.uint8)
        blocks = _interleave(nibbles[..., 0::2] | nibbles[..., 1::2] << 4)
    else:
        sums = grouped.sum(dim=-1, keepdim=True, dtype=torch.int32).view(torch.uint8)  # [N, G, 4]
        blocks = _interleave(torch.cat([grouped.view(torch.uint8), sums], dim=-1))
    return PackedWeight(
        data=blocks,
        scale=_by_group(scale.float()),
        zero_point=None if zero_point is None else _by_group(zero_point),
        shape=(rows, columns),
        num_bits=num_bits,
        activation_bits=activation_bits,
        layout=BLOCKS16,
    )


def _pad(grouped: Tensor, multiple: int) -> Tensor:
    """Pad rows `[N, G, columns]` to whole blocks and columns to a multiple, with zeros."""
    rows, _, columns = grouped.shape
    return torch.nn.functional.pad(grouped, (0, -columns % multiple, 0, 0, 0, -rows % BLOCK_ROWS))


def _interleave(rows: Tensor) -> Tensor:
    """Return bytes `[N, G, B]` as `[N / 16][G][B / 4][16][4]`, flat."""
    count, groups, length = rows.shape
    quads = rows.reshape(count // BLOCK_ROWS, BLOCK_ROWS, groups, length // 4, 4)
    return quads.permute(0, 2, 3, 1, 4).flatten()


def _by_group(values: Tensor) -> Tensor:
    """Return `[N, G]` whose memory is `[G][N padded to whole blocks]`: itself, where that is so."""
    if values.stride(0) == 1 and values.stride(1) == -(-len(values) // BLOCK_ROWS) * BLOCK_ROWS:
        return values
    padded = torch.nn.functional.pad(values.t(), (0, -len(values) % BLOCK_ROWS)).contiguous()
    return padded.t()[: len(values)]


def packed_linear(
    x: Tensor | QuantizedActivations, weight: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Compute `reference_linear.packed_linear_ref` for a weight in layout `BLOCKS16`.

    Args:
        x: `[M, K]` floating point, or its codes where the weight has `activation_bits`.
        weight: as `repack_weight` makes it.
        bias: `[N]` floating point, or None.
        out_dtype: dtype of the result.

    Returns:
        `[M, N]` in `out_dtype`.

    Raises:
        ValueError: the weight lies as another device's kernels read it.
        BackendUnavailableError: QREALIGN_CPU_ISA names an instruction set that this machine does not have.
    """
    if weight.layout != BLOCKS16:
        raise ValueError(f"on a CPU, weights are read in layout {BLOCKS16!r}, not {weight.layout!r}: repack them there")
    rows, columns = weight.shape
    # float16 is left to torch, which rounds as C++ would have to by hand.
    stored = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    bias = None if bias is None else bias.float().contiguous()
    # Copying a weight may have changed how these lie in memory.
    scale, zero_point = _by_group(weight.scale), None if weight.zero_point is None else _by_group(weight.zero_point)
    tokens = x.codes if isinstance(x, QuantizedActivations) else x
    out = torch.empty(tokens.shape[0], rows, dtype=stored)
    name = isa()
    rest = (
        tokens.shape[0],
        weight.data.data_ptr(),
        scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        rows,
        columns,
        weight.groups,
        _quads(weight),
        weight.num_bits,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        stored == torch.bfloat16,
        torch.get_num_threads(),
    )
    if isinstance(x, QuantizedActivations):
        codes, x_scale = x.codes.contiguous(), x.scale.contiguous()
        _C.integer_linear(name, _CODES, codes.data_ptr(), x_scale.data_ptr(), 8, *rest)
    elif weight.activation_bits is not None:
        values = (x if x.dtype in _ROUNDED else x.float()).contiguous()
        _C.integer_linear(name, _ROUNDED[values.dtype], values.data_ptr(), 0, weight.activation_bits, *rest)
    else:
        values = x.float().contiguous()
        _C.float_linear(name, values.data_ptr(), *rest)
    return out if stored == out_dtype else out.to(out_dtype)


def _quads(weight: PackedWeight) -> int:
    """Return how many runs of four bytes hold the codes of a group."""
    multiple = GROUP_MULTIPLE[weight.num_bits]
    columns = -(-weight.shape[1] // weight.groups // multiple) * multiple
    return columns * weight.num_bits // 32
