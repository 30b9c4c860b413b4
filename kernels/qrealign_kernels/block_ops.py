"""Public ops of a decoder block beside its products, for inference; checks and choice of backend as in `ops.py`.

No op has a gradient. Under torch.compile norm and gate are traced as their definitions, which the compiler fuses with
what stands around them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.backend import backend_for
from qrealign_kernels.calibration_ops import check_gate, check_norm
from qrealign_kernels.linear_ops import FLOATS
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


@torch.no_grad()
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
    mask: Tensor | None = None,
    *,
    length: int,
    scaling: float,
    advance: bool = False,
) -> Tensor:
    """Attend from one new token a row to the tokens in front of it, and store its key and value.

    Queries and keys are turned by rotary embeddings in the split-half layout, the key and the value are written to the
    row's cell of the buffers, and the token attends to itself and to the cells in front of its own that are below
    `length` and that the mask shows. A kernel reads those cells alone, however long the buffers are; where they end
    is known on the device only, so that a recorded step can be replayed for every position.

    Args:
        query: `[B, Hq, D]` float32, float16 or bfloat16, D even.
        key, value: `[B, Hk, D]`, Hk a divisor of Hq; heads of queries that stand together share one.
        cos, sin: `[B, D]` in the same dtype; rows may be one row expanded.
        keys, values: `[B or more, Hk, S, D]` in the same dtype, the last dimension contiguous; written to.
        cells: int64, `[B]` or `[1]` for all rows, each in `[0, S)`.
        mask: `[B, length]` bool, True where a cell is seen, or None for all.
        length: cells that may be read, at most S.
        scaling: of the scores, in front of the softmax.
        advance: whether `cells`, `[1]`, is moved on by one behind it.

    Returns:
        `[B, Hq, D]`.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype is not of the ones named.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    _check_attention(query, key, value, cos, sin, keys, values, cells, mask, length, advance)
    return backend_for(query).decode_attention(
        query, key, value, cos, sin, keys, values, cells, mask, length=length, scaling=scaling, advance=advance
    )


def _check_sum(x: Tensor, branch: Tensor | None, weight: Tensor, num_bits: int = 8) -> None:
    check_norm(x, weight, num_bits)
    if branch is not None and (branch.shape != x.shape or branch.dtype != x.dtype):
        raise ValueError(f"branch must be {tuple(x.shape)} {x.dtype} as x is, got {tuple(branch.shape)} {branch.dtype}")


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
    mask: Tensor | None,
    length: int,
    advance: bool,
) -> None:
    if query.dim() != 3 or key.dim() != 3 or query.shape[1] % key.shape[1] or query.shape[2] % 2:
        raise ValueError(
            f"query must be [B, Hq, D] and key [B, Hk, D], D even and Hk a divisor of Hq, got {tuple(query.shape)} "
            f"and {tuple(key.shape)}"
        )
    batch, _, size = query.shape
    wanted: dict[str, tuple[int, ...]] = {"key": (batch, key.shape[1], size), "value": (batch, key.shape[1], size)}
    wanted |= {"cos": (batch, size), "sin": (batch, size)}
    given = {"key": key, "value": value, "cos": cos, "sin": sin, "keys": keys, "values": values}
    for name, shape in wanted.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(f"{name} must be {shape} for query {tuple(query.shape)}, got {tuple(given[name].shape)}")
    for name, tensor in given.items():
        if tensor.dtype != query.dtype or query.dtype not in FLOATS:
            raise TypeError(f"query and {name} must have one floating point dtype, got {query.dtype}, {tensor.dtype}")
    if (
        keys.shape != values.shape
        or keys.dim() != 4
        or len(keys) < batch
        or (keys.shape[1], keys.shape[3]) != (key.shape[1], size)
        or not 0 <= length <= keys.shape[2]
        or keys.stride(3) != 1
    ):
        raise ValueError(
            f"keys and values must be [{batch} or more, {key.shape[1]}, {length} or more, {size}], got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if cells.dtype != torch.int64 or tuple(cells.shape) not in {(1,), (batch,)} or (advance and len(cells) != 1):
        raise ValueError(f"cells must be int64 [{batch}], or [1] to advance, got {tuple(cells.shape)} {cells.dtype}")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (batch, length)):
        raise ValueError(f"mask must be bool {(batch, length)}, got {tuple(mask.shape)} {mask.dtype}")
