"""What the Triton kernels share on the host: availability and launch choices. Imports no triton."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

_TILE_ELEMENTS = 2048
_ROWS_PER_PROGRAM = 32


class Launch(NamedTuple):
    """Tile of a program and its warps: `BLOCK_R` rows by `BLOCK_C` columns at a time."""

    block_r: int
    block_c: int
    num_warps: int


def launch_for(columns: int) -> Launch:
    """Return the tile for rows of this width: short rows share a program, long ones are walked in steps."""
    block_c = min(1 << (columns - 1).bit_length(), _TILE_ELEMENTS)
    return Launch(min(_TILE_ELEMENTS // block_c, _ROWS_PER_PROGRAM), block_c, 8 if block_c == _TILE_ELEMENTS else 4)


def interpreting() -> bool:
    """Tell whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason() -> str | None:
    """Return why the Triton kernels cannot run here, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def version() -> str:
    """Return the version of the installed triton, or "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which kernels start on the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
