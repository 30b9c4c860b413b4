"""The script that NVIDIA's checkers run calls every kernel there is; without a kernel behind the calls, so fast."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qrealign_kernels as kernels
from qrealign_kernels import cuda, cuda_tiles, launches, triton_common
from tests.kernels import sanitize
from tests.kernels.conftest import Recorder

if (reason := triton_common.unavailable_reason()) is not None:
    pytest.skip(reason, allow_module_level=True)


class Launches:
    """Stands in for a Triton kernel: `kernel[grid](...)` leaves the kernel's name in `seen`."""

    def __init__(self, name: str, seen: set[str]) -> None:
        self._name, self._seen = name, seen

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **constants: self._seen.add(self._name)


def replace_kernels(monkeypatch: pytest.MonkeyPatch, seen: set[str]) -> set[str]:
    """Let the launch of a Triton kernel leave its name and do nothing more; return the names of all."""
    names = set()
    for module in pkgutil.iter_modules(kernels.__path__, "qrealign_kernels."):
        if not module.name.startswith("qrealign_kernels.triton_"):
            continue
        loaded = importlib.import_module(module.name)
        for name in [name for name in vars(loaded) if name.endswith("_kernel")]:
            monkeypatch.setattr(loaded, name, Launches(name, seen))
            names.add(name)
    return names


def run_checks() -> None:
    for _, forced, check in sanitize.checks():
        with contextlib.ExitStack() as stack:
            for table, launch in forced.items():
                stack.enter_context(launches.forced(table, launch))
            check()


def test_every_triton_kernel_is_checked(triton_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_C", None)
    seen: set[str] = set()
    names = replace_kernels(monkeypatch, seen)
    assert len(names) > 20
    run_checks()
    assert seen == names


def test_every_function_of_the_extension_is_checked(
    triton_backend: None, extension: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_kernels(monkeypatch, set())
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(cuda_tiles, "multiprocessors", lambda device: 132)
    run_checks()
    bindings = Path(sanitize.__file__).parents[2] / "csrc" / "cuda" / "bindings.cpp"
    launching = set(re.findall(r'module\.def\("(\w+)"', bindings.read_text(encoding="utf-8"))) - {"unusable_reason"}
    assert {name for name, _ in extension.calls} == launching
