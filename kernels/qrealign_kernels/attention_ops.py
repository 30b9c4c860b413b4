"""Public attention op: arguments are checked here, the backend is chosen as in `ops.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.backend import backend_for


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scaling: float
) -> Tensor:
    """Attend from one new token of every sequence to its cache: `softmax(scaling * q @ k.T) @ v` over what is visible.

    A kernel reads the visible part of the cache alone, so the time of a step follows the sequences and not the size of
    a static cache. No gradient.

    Args:
        query: `[B, H, D]` float32, float16 or bfloat16.
        key: `[B, H / n, S, D]` in query's dtype, each head serving n query heads that follow each other; any strides
            but a contiguous D.
        value: the same shape, dtype and demands.
        mask: `[B, S]` bool, True where the cache may be seen; None for all of it.
        scaling: of the scores.

    Returns:
        `[B, H, D]` in query's dtype; zeros where a sequence sees nothing. Accumulated in float32; a backend may round
        the shares to the dtype before it weighs the values.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype does not.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    if query.dim() != 3 or key.dim() != 4 or key.shape != value.shape or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query must be [B, H, D] and key and value [B, H / n, S, D], got {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    if (query.shape[0], query.shape[2]) != (key.shape[0], key.shape[3]):
        raise ValueError(f"query and key disagree on B or D: {tuple(query.shape)} vs {tuple(key.shape)}")
    if mask is not None and (mask.shape != (key.shape[0], key.shape[2]) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be {(key.shape[0], key.shape[2])} bool, got {tuple(mask.shape)} {mask.dtype}")
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"all must have one floating point dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    run = _decode_attention_op if torch.compiler.is_compiling() else _decode_attention
    return run(query, key, value, mask, scaling)


def _decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    with torch.no_grad():
        return backend_for(query).decode_attention(query, key, value, mask, scaling)


_decode_attention_op = torch.library.custom_op("qrealign::decode_attention", _decode_attention, mutates_args=())


@_decode_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return query.new_empty(query.shape)
