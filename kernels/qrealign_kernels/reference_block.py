"""Pure-PyTorch definitions of what a decoder block does beside its products and attention: norms behind sums."""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.reference import quantize_per_token_ref
from qrealign_kernels.reference_calibration import rms_norm_ref


def add_rms_norm_ref(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return `x + branch`, or x where there is no branch, and `rms_norm_ref` of it; see `block_ops.add_rms_norm`."""
    total = x if branch is None else x + branch
    return total, rms_norm_ref(total, weight, eps, offset=offset)


def add_rms_norm_quantize_ref(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, num_bits: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of `add_rms_norm_ref` and `quantize_per_token_ref` of what it normalizes."""
    total, normed = add_rms_norm_ref(x, branch, weight, eps, offset=offset)
    return total, *quantize_per_token_ref(normed, num_bits=num_bits)


def normed_dtype(x: Tensor, weight: Tensor, offset: float) -> torch.dtype:
    """Return the dtype of `rms_norm_ref`."""
    return torch.promote_types(x.dtype, weight.dtype) if offset == 0.0 else x.dtype


def gather_rows_ref(table: Tensor, indices: Tensor) -> Tensor:
    """Return `table[indices]` on the indices' device; see `block_ops.gather_rows`."""
    return table[indices.to(table.device)].to(indices.device)
