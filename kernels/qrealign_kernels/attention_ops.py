"""Public ops of attention over a cache of fixed size, for inference; checks and choice of backend as in `ops.py`.

Both store the new tokens' keys and values first and attend to what was stored: in the model's dtype, or as int8 codes
with a scale for every token and head (`quantize_per_token` of a head). No op has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrealign_kernels.backend import backend_for
from qrealign_kernels.linear_ops import FLOATS
from qrealign_kernels.reference_attention import CachePlace, TokenStates


@torch.no_grad()
def decode_attention(states: TokenStates, place: CachePlace, mask: Tensor | None = None, *, scaling: float) -> Tensor:
    """Attend from one new token a row to the tokens in front of it, and store its key and value.

    Queries and keys are turned by rotary embeddings, the key and the value are written to the row's cell of the
    buffers, and the token attends to itself and to the cells in front of its own that are below `place.length` and
    that the mask shows. A kernel reads those cells alone, however long the buffers are; where they end is known on the
    device only, so that a recorded step can be replayed for every position.

    Args:
        states: of one token a row, `[B, ...]`.
        place: in the first B rows of a cache, with cells `[B]`, or `[1]` for all rows; its buffers are written to.
        mask: `[B, length]` bool, True where a cell is seen, or None for all.
        scaling: of the scores, in front of the softmax.

    Returns:
        `[B, Hq, D]` in the states' dtype.

    Raises:
        ValueError: a shape does not fit, or rows are named.
        TypeError: a dtype is not of the ones named.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    if states.query.dim() != 3 or states.key.dim() != 3:
        raise ValueError(f"query and key must be [B, heads, D], got {_shapes(states.query, states.key)}")
    if place.rows is not None:
        raise ValueError("one token a row goes to the first rows of a cache: rows are for prompt_attention")
    _check(states, place, mask)
    return backend_for(states.query).decode_attention(states, place, mask, scaling)


@torch.no_grad()
def prompt_attention(states: TokenStates, place: CachePlace, mask: Tensor | None = None, *, scaling: float) -> Tensor:
    """Attend from some new tokens of every row to those in front of them and to themselves, and store them.

    As `decode_attention`, for a prompt or a piece of one. A token sees the cells below `place.length` that are not
    behind its own and that the mask shows; one that sees none, such as padding, gets zeros.

    Args:
        states: of T tokens a row, `[B, T, ...]`.
        place: in any rows of a cache, with cells `[B, T]`, or `[1]`, the first token's in every row, with the others
            behind; its buffers are written to.
        mask: `[B, T, length]` bool, True where a cell is seen, or None for all; rows may be one row expanded.
        scaling: of the scores, in front of the softmax.

    Returns:
        `[B, T, Hq, D]` in the states' dtype.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype is not of the ones named.
        BackendUnavailableError: the backend chosen by name cannot take these tensors.
    """
    if states.query.dim() != 4 or states.key.dim() != 4:
        raise ValueError(f"query and key must be [B, T, heads, D], got {_shapes(states.query, states.key)}")
    _check(states, place, mask)
    return backend_for(states.query).prompt_attention(states, place, mask, scaling)


def _check(states: TokenStates, place: CachePlace, mask: Tensor | None) -> None:
    _check_states(states)
    _check_buffers(states, place)
    front = tuple(states.query.shape[:-2])  # [B] or [B, T]
    _check_cells(place, front)
    shape = (*front, place.length)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape):
        raise ValueError(f"mask must be bool {shape}, got {tuple(mask.shape)} {mask.dtype}")


def _check_states(states: TokenStates) -> None:
    query, key = states.query, states.key
    heads, size = query.shape[-2:]
    if heads % key.shape[-2] or size % 2:
        raise ValueError(
            f"query must be [..., Hq, D] and key [..., Hk, D], D even and Hk a divisor of Hq, got {_shapes(query, key)}"
        )
    front = tuple(query.shape[:-2])
    of_keys, of_turns = (*front, key.shape[-2], size), (*front, size)
    wanted = {"key": of_keys, "value": of_keys, "cos": of_turns, "sin": of_turns}
    for name, shape in wanted.items():
        tensor: Tensor = getattr(states, name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} for query {tuple(query.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or query.dtype not in FLOATS:
            raise TypeError(f"query and {name} must have one floating point dtype, got {query.dtype}, {tensor.dtype}")


def _check_buffers(states: TokenStates, place: CachePlace) -> None:
    keys, values = place.keys, place.values
    rows = len(states.query) if place.rows is None else 0
    heads, size = states.key.shape[-2:]
    if (
        keys.shape != values.shape
        or keys.dim() != 4
        or len(keys) < rows
        or (keys.shape[1], keys.shape[3]) != (heads, size)
        or not 0 <= place.length <= keys.shape[2]
        or keys.stride(3) != 1
        or values.stride(3) != 1
    ):
        raise ValueError(
            f"keys and values must be [{rows} or more, {heads}, {place.length} or more, {size}], got "
            f"{_shapes(keys, values)}"
        )
    coded = place.key_scale is not None
    dtype = torch.int8 if coded else states.query.dtype
    for name, buffer in (("keys", keys), ("values", values)):
        if buffer.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} {'with' if coded else 'without'} scales, got {buffer.dtype}")
    if coded != (place.value_scale is not None):
        raise ValueError("key_scale and value_scale are given together or not at all")
    for name, scale in (("key_scale", place.key_scale), ("value_scale", place.value_scale)):
        if scale is not None and (
            scale.dtype != torch.float32 or scale.shape != keys.shape[:3] or not scale.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous float32 {tuple(keys.shape[:3])}, got {tuple(scale.shape)} {scale.dtype}"
            )


def _check_cells(place: CachePlace, front: tuple[int, ...]) -> None:
    cells, rows = place.cells, place.rows
    shape = tuple(cells.shape)
    if cells.dtype != torch.int64 or shape not in {(1,), front} or (place.advance and shape != (1,)):
        raise ValueError(f"cells must be int64 {front}, or (1,) to advance, got {shape} {cells.dtype}")
    if rows is not None and (rows.dtype != torch.int64 or tuple(rows.shape) != front[:1]):
        raise ValueError(f"rows must be int64 {front[:1]}, got {tuple(rows.shape)} {rows.dtype}")


def _shapes(one: Tensor, other: Tensor) -> str:
    return f"{tuple(one.shape)} and {tuple(other.shape)}"
