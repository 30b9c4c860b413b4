"""What the Triton kernels share on the host: availability, tile widths, early starts. Imports no triton."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

# Keys of the launch tables of kernels whose tiles hold whole rows. The widest takes 32 registers of each of 1,024
# threads; what is wider goes another way.
KEY_WIDTHS = (128, 1024, 4096, 8192, 16384, 32768)
LARGEST_WIDTH = KEY_WIDTHS[-1]

_alone = False  # see `one_by_one`


def tile_width(columns: int) -> int:
    """Return the columns of a tile that holds a row: a power of two."""
    return 1 << (columns - 1).bit_length()


def width_key(width: int) -> str:
    """Return the key of launch tables for tiles of this width: the next of `KEY_WIDTHS`, whose tile is no smaller."""
    return str(next(key for key in KEY_WIDTHS if key >= width))


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


@functools.cache
def _starts_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def can_overlap(device: torch.device) -> bool:
    """Tell whether kernels are started before the one in front of them has ended, where the GPU can do so."""
    return not _alone and _starts_early(device)


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Let every kernel start behind the end of the one before, for a profiler: it would count waiting as work."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def version() -> str:
    """Return the version of the installed triton, or "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which kernels start on the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def as_float(tensor: Tensor) -> Tensor:
    """Return contiguous float32, the tensor itself where it is."""
    return tensor.float().contiguous()
