"""A kernel that `benchmarks.tune` can tune; the modules in `PARTS` list them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qrealign_kernels.launches import Choice

# Each has TUNABLES, a tuple of `Tunable`.
PARTS = (
    "benchmarks.tunables.calibration",
    "benchmarks.tunables.products",
    "benchmarks.tunables.decode",
    "benchmarks.tunables.blocks",
)

Calls = list[Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """A kernel to tune.

    Attributes:
        name: the kernel's name in the launch tables.
        keys: key -> the arguments of `make_calls`, such as a layer's shape.
        candidates: returns the launch choices to try for a key.
        make_calls: makes inputs on the present GPU, `benchmarks.timing.rotations` sets of them, and returns the calls
            that launch the kernel on each; the choice is forced from outside.
        optional: without an entry the work goes elsewhere, which an entry has to beat.
    """

    name: str
    keys: Mapping[str, tuple[Any, ...]]
    candidates: Callable[[str], list[Choice]]
    make_calls: Callable[..., Calls]
    optional: bool = False


def all_tunables() -> dict[str, Tunable]:
    """Return every tunable by name."""
    found = [tunable for part in PARTS for tunable in importlib.import_module(part).TUNABLES]
    return {tunable.name: tunable for tunable in found}
