"""Loads the compiled extension `_C` if there is one and keeps the reason if there is none."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

# Written by setup.py, also where no extension could be built.
BUILD_NOTE = Path(__file__).with_name("_build_note.txt")


def load_extension(name: str = "_C") -> tuple[ModuleType | None, str | None]:
    """Return the extension module and None, or None and the reason it cannot be loaded."""
    try:
        return importlib.import_module(f"qrealign_kernels.{name}"), None
    except ModuleNotFoundError:
        return None, f"qrealign_kernels.{name} is not built ({read_build_note()})"
    except ImportError as error:
        return None, f"qrealign_kernels.{name} cannot be loaded: {error}"


def read_build_note() -> str:
    """Return what the installer noted about the build of the extension."""
    try:
        return BUILD_NOTE.read_text(encoding="utf-8").strip()
    except OSError:
        return "no build was attempted"
