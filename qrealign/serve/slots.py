"""Keys and values of many running sequences in one fixed buffer, and the attention masks that go with it.

Each sequence owns a row (a slot) and fills it from the left, so rows stand at different lengths and none is padded. A
forward pass writes its tokens into cells that the caller names and reads a rectangle of the buffer; what another
sequence, or an earlier owner of the row, left there is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from qrealign.deploy.cache import CachePlace, check_cache_bits, decode_states, encode_states
from qrealign.errors import UnsupportedArchitectureError

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the tokens of one forward pass go, and what they may read.

    Attributes:
        rows: `[B]` int64, the slots.
        cells: `[B, Q]` int64, the cell of its row that each token is written to.
        length: cells that are read, from the left.
        first_rows: the rows are exactly 0 to B - 1, so that they are read where they lie instead of being copied.
    """

    rows: Tensor
    cells: Tensor
    length: int
    first_rows: bool


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, `[slots, heads, capacity + 1, head size]`; the last cell takes padding tokens."""

    is_sliding = False  # a sliding window is the mask's matter here: every layer keeps all cells
    supports_early_init = False

    def __init__(self, slots: int, capacity: int, bits: int | None) -> None:
        super().__init__()
        self._shape = (slots, capacity + 1)
        self._bits = bits
        self.place: Place | None = None
        self.key_scale: Tensor | None = None
        self.value_scale: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffer, as zeros: a masked cell still counts with a weight of 0, and 0 times NaN is NaN."""
        slots, cells = self._shape
        shape = (slots, key_states.shape[1], cells)
        coded = None if self._bits is None else torch.int8
        self.keys, self.values = (
            states.new_zeros(*shape, states.shape[3], dtype=coded) for states in (key_states, value_states)
        )
        if coded:
            self.key_scale, self.value_scale = (key_states.new_zeros(shape, dtype=torch.float32) for _ in range(2))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, heads, Q, head size]` into the cells of the place; return what may be read, `length` cells."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        keys = self._write_and_read(self.keys, self.key_scale, key_states)
        return keys, self._write_and_read(self.values, self.value_scale, value_states)

    def _write_and_read(self, buffer: Tensor, scale: Tensor | None, states: Tensor) -> Tensor:
        place = self.place
        assert place is not None
        rows, states = place.rows[:, None], states.transpose(1, 2)
        if scale is None:
            buffer[rows, :, place.cells] = states.to(buffer.dtype)
        else:
            buffer[rows, :, place.cells], scale[rows, :, place.cells] = encode_states(states)
        own = slice(len(place.rows)) if place.first_rows else place.rows
        found = buffer[own, :, : place.length]
        return found if scale is None else decode_states(found, scale[own, :, : place.length], states.dtype)

    def cache_place(self) -> CachePlace | None:
        """Return where the new tokens go; None where no place was named."""
        place = self.place
        if place is None:
            return None
        assert self.keys is not None and self.values is not None
        return CachePlace(
            self.keys,
            self.values,
            cells=place.cells,
            length=place.length,
            key_scale=self.key_scale,
            value_scale=self.value_scale,
            rows=None if place.first_rows else place.rows,
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many cells are read, and where they begin."""
        return (query_length if self.place is None else self.place.length), 0

    def get_seq_length(self) -> int:
        """Return 0: rows have lengths of their own, and positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Return the cells of a row."""
        return self._shape[1] - 1


class SlotCache(Cache):
    """The buffer of all layers; allocated by the first forward pass.

    Args:
        layers: of the model.
        slots: rows, the most sequences at once.
        capacity: cells of a row, the most tokens of a sequence.
        bits: 8 for int8 codes, None for the model's dtype.

    Raises:
        ConfigError: no cache has codes of that width.
    """

    def __init__(self, layers: int, slots: int, capacity: int, bits: int | None = None) -> None:
        check_cache_bits(bits)
        self.slots, self.capacity = slots, capacity
        self._slot_layers = [SlotLayer(slots, capacity, bits) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))

    def aim(self, place: Place) -> None:
        """Set where the next forward pass writes and reads."""
        for layer in self._slot_layers:
            layer.place = place

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` cells of a row to another."""
        for buffer in self._buffers():
            buffer[target, :, :length] = buffer[source, :, :length]

    def swap_rows(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` cells of two rows."""
        for buffer in self._buffers():
            kept = buffer[one, :, :length].clone()
            buffer[one, :, :length] = buffer[other, :, :length]
            buffer[other, :, :length] = kept

    def clear_row(self, row: int) -> None:
        """Zero a row, whose next owner must not meet numbers that are not finite."""
        for buffer in self._buffers():
            buffer[row].zero_()

    def _buffers(self) -> list[Tensor]:
        """Return all that has a row for each slot, the cells in dimension 2."""
        buffers = [
            buffer
            for layer in self._slot_layers
            for buffer in (layer.keys, layer.values, layer.key_scale, layer.value_scale)
        ]
        return [buffer for buffer in buffers if buffer is not None]


class MaskMaker:
    """Builds attention masks for rows that stand at different positions.

    Args:
        config: the model's text configuration.
        dtype: of the additive mask that eager attention takes; other attention takes booleans.

    Raises:
        UnsupportedArchitectureError: a layer attends in a way that no mask over a row can say.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self._window = getattr(config, "sliding_window", None)
        self._additive = dtype if getattr(config, "_attn_implementation", None) == "eager" else None
        kinds = getattr(config, "layer_types", None)
        self._by_kind = kinds is not None and len(set(kinds)) > 1
        self._kinds: Sequence[str] = sorted(set(kinds or [_FULL if self._window is None else _SLIDING]))
        if unknown := set(self._kinds) - {_FULL, _SLIDING}:
            raise UnsupportedArchitectureError(
                f"model type {config.model_type!r} has layers of the kind {', '.join(sorted(unknown))}, which "
                "the server cannot batch: serve it with another server"
            )

    def make(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Return `[B, 1, Q, length]` for queries at `positions` `[B, Q]`, by kind of layer where the kinds differ."""
        columns = torch.arange(length, device=positions.device)
        own = positions[:, None, :, None]  # [B, 1, Q, 1]
        seen = columns <= own
        masks = {
            kind: self._finish(seen if kind == _FULL or self._window is None else seen & (columns > own - self._window))
            for kind in self._kinds
        }
        return masks if self._by_kind else masks[self._kinds[0]]

    def _finish(self, mask: Tensor) -> Tensor:
        if self._additive is None:
            return mask
        least = torch.finfo(self._additive).min
        return torch.zeros(mask.shape, dtype=self._additive, device=mask.device).masked_fill_(~mask, least)
