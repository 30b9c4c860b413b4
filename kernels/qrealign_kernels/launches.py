"""Launch choices of the Triton kernels: one committed table per GPU class, made by `benchmarks/tune.py`.

A table is `launch_tables/<class>.json`: kernel name -> key -> tile sizes, warps and stages. A kernel's own module says
what its keys mean. Where a table lacks a key, the key without its last "-suffix" answers, in the end the key "default";
where a GPU has no table, or its table lacks the kernel, that of the class "default". Nothing is read, and no device
asked, before the first launch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

TABLES = Path(__file__).with_name("launch_tables")
DEFAULT = "default"
SHORT = 8192  # weights of more rows, or of longer ones, may have keys of their own

Choice = dict[str, int]
Table = dict[str, dict[str, Choice]]

_forced: dict[str, Choice | None] = {}


def by_shape(key: str, rows: int, columns: int) -> str:
    """Return the key of a product's launch for a weight `[rows, columns]`: "-wide" or "-long" may stand behind it."""
    return f"{key}-wide" if rows > SHORT else f"{key}-long" if columns > SHORT else key


@cache
def gpu_class(device_index: int) -> str:
    """Return the class whose table serves a CUDA device: "sm90", or "default" for a GPU without a table."""
    major, minor = torch.cuda.get_device_capability(device_index)
    name = f"sm{major}{minor}"
    return name if (TABLES / f"{name}.json").is_file() else DEFAULT


@cache
def table(name: str) -> Table:
    """Return the committed table of a GPU class."""
    found: Table = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
    return found


def choice(kernel: str, key: str, device: torch.device | None = None) -> Choice:
    """Return the launch of `kernel` for `key` on a device; on the CPU (the interpreter) the default class's.

    Raises:
        KeyError: no table knows the kernel; every kernel has a "default" entry in the class "default".
    """
    if (found := find(kernel, key, device)) is not None:
        return found
    raise KeyError(f"no launch table has a choice for {kernel}")


def find(kernel: str, key: str, device: torch.device | None = None) -> Choice | None:
    """Return what `choice` returns, or None where no table knows the kernel: it is used only where it was tuned."""
    if kernel in _forced:
        return _forced[kernel]
    index = None if device is None or device.type != "cuda" else device.index
    if device is not None and device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    for name in (DEFAULT if index is None else gpu_class(index), DEFAULT):
        entries = table(name).get(kernel, {})
        if (found := _entry(entries, key)) is not None:
            return found
    return None


def _entry(entries: dict[str, Choice], key: str) -> Choice | None:
    """Return the entry of a key, of the key without what follows its last dash, ..., or the default entry."""
    while key not in entries:
        if "-" not in key:
            return entries.get(DEFAULT)
        key = key.rpartition("-")[0]
    return entries[key]


@contextlib.contextmanager
def forced(kernel: str, launch: Choice | None) -> Iterator[None]:
    """Let every launch of `kernel` in the block use this choice, or none as if no table knew the kernel: what a tuner
    tries. Not for concurrent threads.
    """
    before = dict(_forced)
    _forced[kernel] = launch
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
