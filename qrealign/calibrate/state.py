"""Progress on disk: one safetensors file that is whole or absent, with what is not a tensor as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qrealign.errors import ResumeError
from qrealign.files import write_tensors


def save_progress(path: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able mapping, atomically."""
    write_tensors(path, tensors, {"extra": json.dumps(extra)})


def load_progress(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return what `save_progress` wrote, or None where nothing was.

    Raises:
        ResumeError: the file cannot be read.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return tensors, json.loads(file.metadata()["extra"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"the saved progress {path} cannot be read ({error}): run again with --fresh") from error
