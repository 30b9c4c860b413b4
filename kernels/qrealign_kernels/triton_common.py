"""What the Triton kernels share on the host: availability and tile widths. Imports no triton."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor


def tile_width(columns: int, largest: int) -> int:
    """Return the columns of a tile: the power of two that holds a row, or the largest allowed."""
    return min(1 << (columns - 1).bit_length(), largest)


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
