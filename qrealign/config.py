"""What is quantized how: recipes for one tensor, schemes for a layer, and the presets that name them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from qrealign.errors import SchemeError

Granularity = Literal["per_channel", "per_group", "per_token"]
DEFAULT_GROUP_SIZE = 128
GROUP_SIZES = (128, 64, 32)  # the sizes that the servers' 4-bit kernels take, largest first


@dataclass(frozen=True, kw_only=True)
class QuantArgs:
    """Recipe of one tensor: `code = clamp(round(x / scale) + zero_point, qmin, qmax)`.

    `per_channel`: one scale per output row; `per_group`: one per `group_size` inputs of a row; `per_token`: dynamic,
    one per activation row.
    """

    num_bits: int
    granularity: Granularity
    symmetric: bool = True
    group_size: int | None = None

    def __post_init__(self) -> None:
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise SchemeError(f"group_size goes with per_group only, got {self.granularity=}, {self.group_size=}")

    @property
    def qmin(self) -> int:
        return -(1 << (self.num_bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.num_bits - 1)) - 1


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """Recipe of a linear layer; `activations` None keeps its input in floating point."""

    name: str
    weights: QuantArgs
    activations: QuantArgs | None

    def fit_to(self, in_features: Iterable[int]) -> QuantScheme:
        """Return this scheme with the largest group size that divides every width, per channel if none does."""
        if self.weights.granularity != "per_group":
            return self
        widths = set(in_features)
        sizes = [self.weights.group_size, *GROUP_SIZES]
        fitting = [
            size
            for size in sizes
            if size and size <= (self.weights.group_size or 0) and all(w % size == 0 for w in widths)
        ]
        if not fitting:
            return replace(self, weights=replace(self.weights, granularity="per_channel", group_size=None))
        return replace(self, weights=replace(self.weights, group_size=fitting[0]))


_NAME = re.compile(r"w(?P<weight>4|8)a(?P<act>4|8|16)(?:_g(?P<group>\d+))?(?P<channel>_channel)?(?P<asym>_asym)?")
_SUPPORTED = {("8", "8"), ("8", "16"), ("4", "16"), ("4", "8"), ("4", "4")}


def parse_scheme(name: str) -> QuantScheme:
    """Return the scheme called `name`: w8a8, w8a16, w4a16, w4a8 or w4a4, with the suffixes `_g64`, `_channel`, `_asym`.

    8-bit weights are per channel, 4-bit ones per group of 128; activations are dynamic per token. `_asym` gives 4-bit
    weights a zero point; 8-bit weights stay symmetric, because no server takes them otherwise.

    Raises:
        SchemeError: the name is none of these.
    """
    match = _NAME.fullmatch(name.lower())
    if match is None or (match["weight"], match["act"]) not in _SUPPORTED:
        raise SchemeError(
            f"unknown scheme {name!r}: use w8a8, w8a16, w4a16, w4a8 or w4a4 "
            "(4-bit ones take _g32/_g64/_g128, _channel, _asym)"
        )
    if match["weight"] == "8" and (match["asym"] or match["group"] or match["channel"]):
        raise SchemeError(
            f"scheme {name!r}: 8-bit weights are symmetric and per channel, because no server runs them otherwise"
        )
    if match["group"] and match["channel"]:
        raise SchemeError(f"scheme {name!r}: choose either groups or channels")
    grouped = match["weight"] == "4" and not match["channel"]
    group_size = int(match["group"] or DEFAULT_GROUP_SIZE) if grouped else None
    if group_size is not None and group_size not in GROUP_SIZES:
        raise SchemeError(f"scheme {name!r}: the group size must be one of {', '.join(map(str, GROUP_SIZES))}")
    weights = QuantArgs(
        num_bits=int(match["weight"]),
        granularity="per_group" if grouped else "per_channel",
        symmetric=not match["asym"],
        group_size=group_size,
    )
    activations = None if match["act"] == "16" else QuantArgs(num_bits=int(match["act"]), granularity="per_token")
    return QuantScheme(name=name.lower(), weights=weights, activations=activations)
