"""Operands of the quantized linear products: activations as codes and scales, weights in the layout a kernel reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

CODES = "codes"  # the layout that every backend reads: int8 codes as `quantize_weight` returns them, row by row


class QuantizedActivations(NamedTuple):
    """Tokens as symmetric integer codes: what `quantize_per_token` returns, with the dtype the tokens had.

    codes: `[..., K]` int8. scale: `[..., 1]` float32, activation units per code. dtype: of products by default.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedWeight:
    """A quantized weight in the layout that one backend's `packed_linear` reads; made by `repack_weight`.

    Callers read `shape`, `num_bits`, `activation_bits`, `group_size` and `device`; the tensors belong to the backend.
    They are constants: a kernel may read them before the kernel in front of it has ended.

    Attributes:
        data: the codes, arranged as `layout` says.
        scale: `[N, G]` floating point, weight units per code, in any dtype that holds it exactly.
        zero_point: `[N, G]` int8, or None for symmetric weights.
        shape: `(N, K)` of the weight.
        num_bits: 4 or 8.
        activation_bits: bits of the codes that activations are rounded to, None to leave them in floating point.
        layout: name of the arrangement; `CODES` is `[N, K]` int8 and is read by every backend.
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, int]
    num_bits: int
    activation_bits: int | None
    layout: str

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale, None for whole rows."""
        return None if self.groups == 1 else self.shape[1] // self.groups

    @property
    def groups(self) -> int:
        """Scales of a row: G."""
        return self.scale.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.data.device

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.data, self.scale, self.zero_point) if tensor is not None)

    def rows(self, first: int, last: int) -> PackedWeight:
        """Return rows `first` to `last - 1` as views.

        Raises:
            ValueError: the layout does not keep a row's codes together.
        """
        if len(self.data) != self.shape[0]:
            raise ValueError(f"rows of a weight in layout {self.layout!r} do not lie apart: repack the rows' codes")
        zero_point = None if self.zero_point is None else self.zero_point[first:last]
        data, scale = self.data[first:last], self.scale[first:last]
        return replace(self, data=data, scale=scale, zero_point=zero_point, shape=(len(data), self.shape[1]))

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the weight on another device; only a layout that is read there computes there."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), zero_point=zero_point)
