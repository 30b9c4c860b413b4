"""Loads a compiled extension, `_C` or `_C_cuda`, if there is one and keeps the reason if there is none."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

# Written by setup.py, also where no extension could be built: a line "name: what became of it" for each.
BUILD_NOTE = Path(__file__).with_name("_build_note.txt")


def load_extension(name: str = "_C") -> tuple[ModuleType | None, str | None]:
    """Return the extension module and None, or None and the reason it cannot be loaded."""
    try:
        return importlib.import_module(f"qrealign_kernels.{name}"), None
    except ModuleNotFoundError:
        return None, f"qrealign_kernels.{name} is not built ({read_build_note(name)})"
    except ImportError as error:
        return None, f"qrealign_kernels.{name} cannot be loaded: {error}"


def read_build_note(name: str) -> str:
    """Return what the installer noted about the build of an extension."""
    try:
        lines = BUILD_NOTE.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    notes = dict(line.split(": ", 1) for line in lines if ": " in line)
    return notes.get(name, "no build was attempted")
