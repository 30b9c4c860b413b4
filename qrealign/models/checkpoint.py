"""Weight files of a folder: what they hold, checked without reading it, and single tensors on demand."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrealign.errors import CheckpointFormatError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
_SAMPLE_BYTES = 1024
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
INTEGER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its file, dtype (safetensors name), shape and the byte range of its data in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file; header and length are checked, no data is read.

    Raises:
        CheckpointFormatError: the file is missing, truncated, longer than its header says, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(_HEADER_LIMIT_BYTES, size):
                raise CheckpointFormatError(
                    f"{file} is truncated or no safetensors file ({size} bytes): download or copy it again"
                )
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointFormatError(
            f"{file} is missing, though the folder's index names it: download or copy it again"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise CheckpointFormatError(f"{file} has a corrupted header: download or copy it again") from None
    try:
        tensors = {
            name: _tensor_info(file, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointFormatError(f"{file} has a corrupted header: download or copy it again") from None
    end = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if size != end:
        what = "truncated" if size < end else "longer than its header says"
        raise CheckpointFormatError(f"{file} is {what} ({size} bytes, {end} expected): download or copy it again")
    return tensors


def _tensor_info(file: Path, entry: dict[str, Any], data_start: int) -> TensorInfo:
    """Parse one header entry; a ValueError or KeyError means that it is corrupted."""
    shape, (start, stop) = tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
    count = 1
    for extent in shape:
        count *= extent
    bits = _BITS.get(entry["dtype"])
    if not 0 <= start <= stop or (bits is not None and count * bits // 8 != stop - start):
        raise ValueError(entry)
    return TensorInfo(file, str(entry["dtype"]), shape, data_start + start, data_start + stop)


class WeightFiles:
    """Safetensors files as one collection of named tensors.

    Raises:
        CheckpointFormatError: a file is missing or damaged.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            self.tensors.update(read_header(file))
        self._checked: set[str] = set()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read(self, names: Iterable[str], *, check: bool = True) -> dict[str, Tensor]:
        """Return CPU tensors by name, in their stored dtype.

        Each file is opened for this call alone, so that its mapped pages go back to the system with the tensors.
        Without `check` no data is touched; `check_finite` may look at it where it has gone.

        Raises:
            CheckpointFormatError: a tensor holds infinities or NaN (looked for when it is read for the first time).
        """
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        result = {}
        for file, stored in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in stored:
                    result[name] = opened.get_tensor(name)
                    if check:
                        self.check_finite({name: result[name]})
        return result

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors, by their stored names and on any device, that hold infinities or NaN; each is looked at once.

        Raises:
            CheckpointFormatError: one does.
        """
        new = {n: t for n, t in tensors.items() if n not in self._checked and t.is_floating_point()}
        self._checked.update(tensors)
        if not new:
            return
        # A sum is NaN or infinite when an element is; float32 sums of finite weights stay far from overflow.
        sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in new.values()])
        for name, total in zip(new, sums.tolist(), strict=True):
            if not math.isfinite(total):
                raise CheckpointFormatError(
                    f"{self.tensors[name].file}: tensor {name} holds NaN or infinite values, so the model is broken"
                )

    def fingerprint(self) -> str:
        """Return a SHA-256 over names, sizes, headers and two samples of every tensor: fast on any size."""
        digest = hashlib.sha256()
        for file in self.files:
            tensors = {name: tensor for name, tensor in self.tensors.items() if tensor.file == file}
            with file.open("rb") as stream:
                for name, tensor in sorted(tensors.items()):
                    digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
                    for start in (tensor.start, (tensor.start + tensor.stop) // 2):
                        stream.seek(start)
                        digest.update(stream.read(min(_SAMPLE_BYTES, tensor.stop - start)))
        return digest.hexdigest()


def find_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the model in `folder`: indexed shards, a single file, or all there are.

    Raises:
        CheckpointFormatError: there is none, or only a pickle checkpoint, which is refused.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
            names = set()
        if not names or not all(name and isinstance(name, str) for name in names):
            raise CheckpointFormatError(f"{index} is corrupted: download or copy it again")
        return [folder / name for name in sorted(names)]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    files = [
        file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(("adapter", "consolidated"))
    ]
    if files:
        return files
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointFormatError(
            f"{folder} holds pickle weights only ({pickles[0]}), which can run code when read and are refused: "
            "load the model where "
            "you trust it and save it again with model.save_pretrained(folder), which writes safetensors"
        )
    raise CheckpointFormatError(
        f"{folder} holds no weights: a model folder needs model.safetensors, or shards and {INDEX_NAME}"
    )
