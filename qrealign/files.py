"""Files that are either whole or absent: everything is written aside, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qrealign.errors import QrealignError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` when the block ends without an error.

    Works for files and for folders (an existing folder at `path` is replaced). A full disk becomes a `QrealignError`.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with explain_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(aside)
            yield aside
            move_into_place(aside, path)
    finally:
        remove(aside)


def move_into_place(new: Path, path: Path) -> None:
    """Rename `new` onto `path`. A folder there is renamed aside first and removed last, so it is never half gone."""
    old = path.with_name(f".{path.name}.replaced")
    if path.is_dir():
        remove(old)  # left by a process that was killed
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    remove(old)


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk while `path` is written into a `QrealignError`.

    The safetensors library raises an error class of its own, which carries the system's error number in its text only.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = re.search(r"(?:os error|code:) (\d+)\b", str(error)) if isinstance(error, SafetensorError) else None
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number not in _DISK_FULL:
            raise
        raise QrealignError(
            f"the disk is full while writing {path}: free some space and run the same command again"
        ) from error


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file written by this project."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically. Tensors are made contiguous and moved to the host."""
    from safetensors.torch import save_file

    with write_aside(path) as aside:
        aside.touch()
        mode = aside.stat().st_mode
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside, dict(metadata or {})
        )
        aside.chmod(mode)  # the library lets nobody but the owner read: a server often runs as somebody else


def sha256_of_text(*parts: str) -> str:
    """Return the hex SHA-256 of several strings, separated so that boundaries count."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
