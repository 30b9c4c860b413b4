"""Public ops of a decoder block beside its products and attention, for inference; checks and backends as in `ops.py`.

No op has a gradient. Under torch.compile norm and gate are traced as their definitions, which the compiler fuses with
what stands around them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.backend import backend_for
from qrealign_kernels.calibration_ops import check_gate, check_norm
from qrealign_kernels.quantized import QuantizedActivations
from qrealign_kernels.reference_block import add_rms_norm_quantize_ref, add_rms_norm_ref, normed_dtype
from qrealign_kernels.reference_calibration import silu_mul_ref


def add_rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalize the sum as Hugging Face's RMS norms do, in one pass.

    Equal to `reference_calibration.rms_norm_ref(x + branch, ...)`, the roundings to the tensors' dtype included; only
    the mean square is summed in another order.

    Args:
        x: `[..., K]` float32, float16 or bfloat16, K > 0.
        branch: of x's shape and dtype; None where nothing is added.
        weight: `[K]` floating point.
        eps: added to the mean square.
        offset: 0 where the rounded token is multiplied by the weight (Llama, Qwen2); else added to the weight in
            float32, before the rounding (Gemma: 1).

    Returns:
        The sum in x's dtype (x itself without a branch), and the normalized sum, in the dtype of `weight * x` with
        offset 0, else in x's; both `[..., K]`.

    Raises:
        ValueError: a shape does not fit, or the branch is not as x is.
        TypeError: a tensor is not floating point.
        BackendUnavailableError: the backend chosen by name cannot take this tensor.
    """
    _check_sum(x, branch, weight)
    if torch.compiler.is_compiling():
        return add_rms_norm_ref(x, branch, weight, eps, offset=offset)
    with torch.no_grad():
        return backend_for(x).add_rms_norm(x, branch, weight, eps, offset=offset)


def add_rms_norm_quantize(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, num_bits: int = 8
) -> tuple[Tensor, QuantizedActivations]:
    """Add a branch, normalize the sum as `add_rms_norm` does, and quantize it as `rms_norm_quantize` does, in one pass.

    Args:
        num_bits: 2 to 8.

    The other arguments, and the errors, are those of `add_rms_norm`.

    Returns:
        The sum, `[..., K]` in x's dtype, and the normalized sum as codes.
    """
    _check_sum(x, branch, weight, num_bits)
    compiling = torch.compiler.is_compiling()
    run = add_rms_norm_quantize_ref if compiling else backend_for(x).add_rms_norm_quantize
    with torch.no_grad():
        total, codes, scale = run(x, branch, weight, eps, offset=offset, num_bits=num_bits)
    return total, QuantizedActivations(codes, scale, normed_dtype(x, weight, offset))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, each step rounded to the tensors' dtype, as a gated MLP computes it, in one pass.

    Args:
        gate: `[..., K]` float32, float16 or bfloat16, K > 0; rows may be strided, such as one half of a wider tensor.
        up: the same shape and dtype.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: the tensors are not floating point, or of two dtypes.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    check_gate(gate, up)
    if torch.compiler.is_compiling():
        return silu_mul_ref(gate, up)
    with torch.no_grad():
        return backend_for(gate).silu_mul(gate, up)


def gather_rows(table: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of a table at some indices, on the device of the indices, as an embedding does.

    The table may lie in the host's pinned memory: a GPU's kernel reads the rows from there, without a copy of the rest
    and without the host's help, so that it can be recorded.

    Args:
        table: `[V, H]` floating point, contiguous.
        indices: `[...]` int64, each in `[0, V)`.

    Returns:
        `[..., H]` in the table's dtype.

    Raises:
        ValueError: the table is no contiguous matrix, or lies in memory that the indices' device cannot read.
        TypeError: the indices are not int64.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    if table.dim() != 2 or not table.is_contiguous():
        raise ValueError(f"table must be a contiguous [V, H], got {tuple(table.shape)}, strides {table.stride()}")
    if table.device != indices.device and not (indices.is_cuda and table.is_pinned()):
        raise ValueError(f"table must be pinned or on {indices.device}, got one on {table.device}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    with torch.no_grad():
        return backend_for(indices).gather_rows(table, indices)


def _check_sum(x: Tensor, branch: Tensor | None, weight: Tensor, num_bits: int = 8) -> None:
    check_norm(x, weight, num_bits)
    if branch is not None and (branch.shape != x.shape or branch.dtype != x.dtype):
        raise ValueError(f"branch must be {tuple(x.shape)} {x.dtype} as x is, got {tuple(branch.shape)} {branch.dtype}")
