"""Public ops of attention over a cache of fixed size, for inference; checks and choice of backend as in `ops.py`.

Both store the new tokens' keys and values first and attend to what was stored: in the model's dtype, or as int8 codes
with a scale for every token and head (`quantize_per_token` of a head). No op has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.backend import backend_for
from qrealign_kernels.linear_ops import FLOATS


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
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
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
        keys, values: `[B or more, Hk, S, D]` in the same dtype or int8, the last dimension contiguous; written to.
        cells: int64, `[B]` or `[1]` for all rows, each in `[0, S)`.
        mask: `[B, length]` bool, True where a cell is seen, or None for all.
        key_scale, value_scale: `[B or more, Hk, S]` float32, contiguous, where the buffers hold int8 codes, else None;
            written to.
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
    if query.dim() != 3 or key.dim() != 3:
        raise ValueError(f"query and key must be [B, heads, D], got {tuple(query.shape)} and {tuple(key.shape)}")
    _check_states(query, key, value, cos, sin)
    _check_buffers(query, key, keys, values, key_scale, value_scale, length, len(query))
    if cells.dtype != torch.int64 or tuple(cells.shape) not in {(1,), (len(query),)} or (advance and len(cells) != 1):
        raise ValueError(
            f"cells must be int64 [{len(query)}], or [1] to advance, got {tuple(cells.shape)} {cells.dtype}"
        )
    _check_mask(mask, (len(query), length))
    return backend_for(query).decode_attention(
        query, key, value, cos, sin, keys, values, cells, mask, key_scale, value_scale,
        length=length, scaling=scaling, advance=advance,
    )  # fmt: skip


@torch.no_grad()
def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
    mask: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    length: int,
    scaling: float,
    advance: bool = False,
) -> Tensor:
    """Attend from some new tokens of every row to those in front of them and to themselves, and store them.

    As `decode_attention`, for a prompt or a piece of one. A token sees the cells below `length` that are not behind its
    own and that the mask shows; one that sees none, such as padding, gets zeros.

    Args:
        query: `[B, T, Hq, D]` float32, float16 or bfloat16, D even.
        key, value: `[B, T, Hk, D]`, Hk a divisor of Hq.
        cos, sin: `[B, T, D]` in the same dtype; rows may be one row expanded.
        keys, values, key_scale, value_scale: as in `decode_attention`.
        cells: int64, `[B, T]`, each in `[0, S)`; or `[1]`, the first token's cell in every row, with the others behind.
        mask: `[B, T, length]` bool, True where a cell is seen, or None for all; rows may be one row expanded.
        rows: `[B]` int64, rows of the buffers, all different; None for the first ones.
        length: cells that may be read, at most S.
        scaling: of the scores, in front of the softmax.
        advance: whether `cells`, `[1]`, is moved on by T behind it.

    Returns:
        `[B, T, Hq, D]`.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype is not of the ones named.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(f"query and key must be [B, T, heads, D], got {tuple(query.shape)} and {tuple(key.shape)}")
    _check_states(query, key, value, cos, sin)
    batch, tokens = query.shape[:2]
    _check_buffers(query, key, keys, values, key_scale, value_scale, length, batch if rows is None else 0)
    if cells.dtype != torch.int64 or tuple(cells.shape) not in {(1,), (batch, tokens)} or (advance and cells.dim() > 1):
        raise ValueError(
            f"cells must be int64 {(batch, tokens)}, or [1] to advance, got {tuple(cells.shape)} {cells.dtype}"
        )
    if rows is not None and (rows.dtype != torch.int64 or tuple(rows.shape) != (batch,)):
        raise ValueError(f"rows must be int64 [{batch}], got {tuple(rows.shape)} {rows.dtype}")
    _check_mask(mask, (batch, tokens, length))
    return backend_for(query).prompt_attention(
        query, key, value, cos, sin, keys, values, cells, mask, key_scale, value_scale, rows,
        length=length, scaling=scaling, advance=advance,
    )  # fmt: skip


def _check_states(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> None:
    heads, size = query.shape[-2:]
    if heads % key.shape[-2] or size % 2:
        raise ValueError(
            f"query must be [..., Hq, D] and key [..., Hk, D], D even and Hk a divisor of Hq, got {tuple(query.shape)} "
            f"and {tuple(key.shape)}"
        )
    front = tuple(query.shape[:-2])
    wanted = dict.fromkeys(("key", "value"), (*front, key.shape[-2], size)) | dict.fromkeys(
        ("cos", "sin"), (*front, size)
    )
    for name, tensor in (("key", key), ("value", value), ("cos", cos), ("sin", sin)):
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{name} must be {wanted[name]} for query {tuple(query.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or query.dtype not in FLOATS:
            raise TypeError(f"query and {name} must have one floating point dtype, got {query.dtype}, {tensor.dtype}")


def _check_buffers(
    query: Tensor,
    key: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    length: int,
    rows: int,
) -> None:
    heads, size = key.shape[-2], query.shape[-1]
    if (
        keys.shape != values.shape
        or keys.dim() != 4
        or len(keys) < rows
        or (keys.shape[1], keys.shape[3]) != (heads, size)
        or not 0 <= length <= keys.shape[2]
        or keys.stride(3) != 1
        or values.stride(3) != 1
    ):
        raise ValueError(
            f"keys and values must be [{rows} or more, {heads}, {length} or more, {size}], got {tuple(keys.shape)} and "
            f"{tuple(values.shape)}"
        )
    dtype = query.dtype if key_scale is None else torch.int8
    for name, buffer in (("keys", keys), ("values", values)):
        if buffer.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} {'without' if key_scale is None else 'with'} scales, "
                            f"got {buffer.dtype}")  # fmt: skip
    if (key_scale is None) != (value_scale is None):
        raise ValueError("key_scale and value_scale are given together or not at all")
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scale is not None and (
            scale.dtype != torch.float32 or scale.shape != keys.shape[:3] or not scale.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous float32 {tuple(keys.shape[:3])}, got {tuple(scale.shape)} {scale.dtype}"
            )


def _check_mask(mask: Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape):
        raise ValueError(f"mask must be bool {shape}, got {tuple(mask.shape)} {mask.dtype}")
