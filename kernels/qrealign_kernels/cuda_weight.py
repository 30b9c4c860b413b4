"""Rounded weight rows and their gradients by the CUDA extension, where its launch table says that it beats Triton.

It takes what block-wise calibration of 8-bit weights asks for: bfloat16 weights whose rows are one scale group each,
symmetric codes and scales of bfloat16, without an edit. Keys of the launch tables `cuda_round_rows` and
`cuda_row_gradients` are those of Triton's row tiles (`triton_common.KEY_WIDTHS`); a choice gives VECTORS, the loads of
8 columns that a thread makes of a row, and BLOCKS, how many run on a multiprocessor at once. Everything else, and a GPU
class without an entry, goes to Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qrealign_kernels import cuda, launches
from qrealign_kernels.reference import MIN_SCALE, code_range
from qrealign_kernels.reference_calibration import WeightGradients, WeightTransform
from qrealign_kernels.triton_common import as_float, on_device_of, tile_width, width_key

VECTOR = 8  # columns of one load: 16 bytes
_PER_VECTOR = 512 * VECTOR  # columns of which each thread of the largest block has one load
_MOST_VECTORS = {"cuda_round_rows": 4, "cuda_row_gradients": 2}


def round_rows(
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    transform: WeightTransform,
    *,
    keep: bool,
    **grid: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Compute `reference_calibration.fake_quant_edited_weight_ref` in bfloat16, or return None and leave it to Triton.

    Returns:
        The rounded weight `[N, K]` and, where asked to `keep` them for the backward, the rows' extremes, `[2, N, 1]`
        float32.
    """
    launch = _launch("cuda_round_rows", weight, transform, grid)
    if launch is None:
        return None
    out = torch.empty_like(weight)
    extremes = weight.new_empty(2, weight.shape[0], 1, dtype=torch.float32) if keep else None
    _round(weight, low_logit, high_logit, transform, (out, None, None, extremes), launch, grid)
    return out, extremes


def encode_rows(
    weight: Tensor, low_logit: Tensor | None, high_logit: Tensor | None, transform: WeightTransform, **grid: Any
) -> tuple[Tensor, Tensor] | None:
    """Return codes `[N, K]` int8 and scales `[N, 1]` of `reference_calibration.encode_weight_ref`, or None."""
    launch = _launch("cuda_round_rows", weight, transform, grid)
    if launch is None:
        return None
    codes = torch.empty_like(weight, dtype=torch.int8)
    scale = weight.new_empty(weight.shape[0], 1, dtype=torch.float32)
    _round(weight, low_logit, high_logit, transform, (None, codes, scale, None), launch, grid)
    return codes, scale


def row_gradients(
    grad: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    transform: WeightTransform,
    extremes: Tensor,
    **grid: Any,
) -> WeightGradients | None:
    """Return the gradients of the logits, the column scale and the row divisor, or None and leave them to Triton.

    Without a column scale, Triton's kernel has no more to do than this one.

    Args:
        grad: `[N, K]`, gradient of the rounded weight.
        weight: `[N, K]`.
        low_logit: `[N, 1]` floating point, or None.
        high_logit: the same of the upper bound.
        transform: with a column scale and without an edit.
        extremes: `[2, N, 1]` float32, what the forward kept.
        grid: the grid's arguments of `fake_quant_edited_weight_ref`.
    """
    launch = _launch("cuda_row_gradients", weight, transform, grid)
    if launch is None or transform.column_scale is None or grad.dtype != torch.bfloat16:
        return None
    grad = grad.contiguous()
    rows, columns = weight.shape
    multiprocessors = _multiprocessors(weight.device)
    given = (low_logit, high_logit, transform.column_scale, transform.row_divisor)
    inputs = [None if tensor is None else as_float(tensor) for tensor in given]
    sizes = ((rows, 1), (rows, 1), (columns,), (rows,))
    results = [
        None if tensor is None else weight.new_empty(size, dtype=torch.float32)
        for tensor, size in zip(given, sizes, strict=True)
    ]
    partial = weight.new_empty(launch[1] * multiprocessors, columns, dtype=torch.float32)
    with on_device_of(weight):
        cuda.extension().row_gradients(
            *_addresses(grad, weight, extremes, *inputs),
            *_codes(grid),
            *_addresses(*results, partial),
            *(rows, columns, *launch, multiprocessors, cuda.stream_of(weight.device)),
        )
    names = ("low_logit", "high_logit", "column_scale", "row_divisor")
    return WeightGradients(
        **{
            name: None if result is None or tensor is None else result.to(tensor.dtype)
            for name, result, tensor in zip(names, results, given, strict=True)
        }
    )


def _round(
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    transform: WeightTransform,
    results: tuple[Tensor | None, ...],
    launch: tuple[int, int],
    grid: dict[str, Any],
) -> None:
    """Fill rounded weights, codes, scales and extremes, of which those that are None are not wanted."""
    given = (low_logit, high_logit, transform.column_scale, transform.row_divisor)
    inputs = [None if tensor is None else as_float(tensor) for tensor in given]
    with on_device_of(weight):
        cuda.extension().round_rows(
            *_addresses(weight, *inputs),
            *_codes(grid),
            *_addresses(*results),
            *(*weight.shape, *launch, _multiprocessors(weight.device), cuda.stream_of(weight.device)),
        )


def _launch(kernel: str, weight: Tensor, transform: WeightTransform, grid: dict[str, Any]) -> tuple[int, int] | None:
    """Return VECTORS and BLOCKS for a weight, or None where the kernels do not take it or are not the fastest."""
    columns = weight.shape[1]
    if not cuda.serves(weight) or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return None
    if columns % VECTOR or columns > _PER_VECTOR * _MOST_VECTORS[kernel] or weight.data_ptr() % 16:
        return None
    if (
        transform.left is not None
        or grid["group_size"] not in (None, columns)
        or not grid["symmetric"]
        or grid["scale_dtype"] != torch.bfloat16
    ):
        return None
    choice = launches.find(kernel, width_key(tile_width(columns)), weight.device)
    if choice is None:
        return None
    return min(max(choice["VECTORS"], -(-columns // _PER_VECTOR)), _MOST_VECTORS[kernel]), choice["BLOCKS"]


def _codes(grid: dict[str, Any]) -> tuple[int, int, float]:
    return (*code_range(grid["num_bits"]), MIN_SCALE)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
