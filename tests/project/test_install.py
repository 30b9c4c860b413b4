"""The wheel: what it installs, and that a compiler is a bonus."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTE = "qrealign_kernels/_build_note.txt"


def build_wheel(folder: Path, **environment: str) -> tuple[list[str], str]:
    """Build a wheel from a copy of the sources; return the names it holds and its note about the extension."""
    source, out = folder / "source", folder / "wheels"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_note.txt")
    for name in ("qrealign", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(out), str(source)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return wheel.namelist(), wheel.read(NOTE).decode() if NOTE in wheel.namelist() else ""


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """Build a wheel where every compilation fails."""
    return build_wheel(tmp_path_factory.mktemp("wheel"), CC="/bin/false", CXX="/bin/false", CUDA_HOME="/absent")


def test_wheel_installs_exactly_two_packages(without_compiler: tuple[list[str], str]) -> None:
    names, _ = without_compiler
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"qrealign", "qrealign_kernels"}


def test_wheel_holds_every_module_and_data_file(without_compiler: tuple[list[str], str]) -> None:
    names, _ = without_compiler
    data = (".py", ".pyi", ".typed", ".safetensors", ".json", ".jsonl", ".gz", ".jinja", ".html", ".css", ".js")
    expected = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "qrealign"), (ROOT / "kernels", "qrealign_kernels"))
        for path in (base / package).rglob("*")
        if path.name.endswith(data)
    }
    assert expected <= set(names), sorted(expected - set(names))


def test_failing_compiler_costs_the_extension_and_leaves_a_note(without_compiler: tuple[list[str], str]) -> None:
    names, note = without_compiler
    assert not any(name.endswith(".so") for name in names)
    cpu, cuda = note.splitlines()
    assert cpu.startswith("_C: left out: ")
    assert "false" in cpu
    assert cuda.startswith("_C_cuda: left out: no GPU that it is for is here")


def test_extension_that_is_insisted_on_fails_without_a_compiler(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="/bin/false"):
        build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false", QREALIGN_BUILD="cpu")


def test_kernels_that_are_insisted_on_fail_without_a_toolkit(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no CUDA toolkit"):
        build_wheel(tmp_path, CUDA_HOME="/absent", QREALIGN_BUILD="cuda")


def test_unknown_build_mode_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="QREALIGN_BUILD must be off, cpu, cuda or auto, got 'maybe'"):
        build_wheel(tmp_path, QREALIGN_BUILD="maybe")
