"""Which numbers a setting may be: one range per field, in tables beside the settings that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qrealign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers from `least` to `most`, without `least` itself where it has to be `above` it; never NaN.

    Every range ends, so that no product of two settings leaves what a float can hold.
    """

    least: int = 0
    most: int = 10**9
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        return f"{'above' if self.above else 'at least'} {self.least:,} and at most {self.most:,}"


COUNT = Range(least=1)
SHARE = Range(most=1)
AMOUNT = Range()  # weights, rates and ratios of which 0 means "not at all"
POSITIVE = Range(above=True)
SEED = Range(most=2**32 - 1)  # what every library that is seeded takes


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Refuse the first value outside its range.

    Raises:
        ConfigError: a sentence that begins with the name, so that a caller can put its flag in front.
    """
    for name, allowed in ranges.items():
        if values[name] not in allowed:
            raise ConfigError(f"{name} must be {allowed}, not {values[name]}")
