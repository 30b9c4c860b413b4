"""What a packed checkpoint will weigh, and whether the disk has room for it."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qrealign.config import QuantScheme
from qrealign.errors import QrealignError
from qrealign.pack.format import INT_FORMAT, storage_format

if TYPE_CHECKING:
    from qrealign.models.source import ModelSource

_GIB = 2**30
_SPARE_BYTES = 64 * 2**20  # tokenizer, indices, report, and what others write meanwhile
_SHAPE_BYTES = 16


def packed_linear_bytes(shape: tuple[int, int], scheme: QuantScheme, float_bytes: int) -> int:
    """Return the bytes of one quantized linear `[N, K]`, its bias aside; a float takes `float_bytes`."""
    rows, columns = shape
    bits, group_size = scheme.weights.num_bits, scheme.weights.group_size
    groups = columns // group_size if group_size else 1
    scales = rows * groups * float_bytes
    if storage_format(scheme) == INT_FORMAT:
        return rows * columns + scales
    zero_points = 0 if scheme.weights.symmetric else 4 * math.ceil(rows * bits / 32) * groups
    return 4 * rows * math.ceil(columns * bits / 32) + scales + zero_points + _SHAPE_BYTES


def estimate_packed_bytes(source: ModelSource, scheme: QuantScheme) -> int:
    """Return the bytes of the packed weights: the source's, with every quantized linear at its packed size."""
    float_bytes = source.storage_dtype.itemsize
    total = source.total_bytes
    for shape in source.linear_shapes().values():
        total += packed_linear_bytes(shape, scheme, float_bytes) - shape[0] * shape[1] * float_bytes
    return max(total, 0)


def existing_ancestor(path: Path) -> Path:
    """Return `path`, or the nearest file or folder above it that exists and can be seen."""
    path = path.absolute()
    while not os.path.exists(path):  # unlike Path.exists, false below a folder that may not be entered
        path = path.parent
    return path


def require_free_disk(directory: Path, needed_bytes: int) -> int:
    """Return the free bytes of the disk that `directory` is or will be on.

    Raises:
        QrealignError: they are fewer than `needed_bytes` and a little to spare.
    """
    free = shutil.disk_usage(existing_ancestor(directory)).free
    if free < needed_bytes + _SPARE_BYTES:
        raise QrealignError(
            f"the disk of {directory} has {free / _GIB:.1f} GiB free and {needed_bytes / _GIB:.1f} GiB are needed: "
            "free some space or choose another --output"
        )
    return free
