"""Backend choice: automatic falls back, explicit succeeds or says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qrealign_kernels as kernels
from qrealign_kernels import backend, cpu, native, triton_common
from qrealign_kernels.interface import REFERENCE

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter that can import the kernels; return what it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_automatic_choice_falls_back_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "UNAVAILABLE_REASON", "left out for this test")
    with kernels.use_backend(None):
        assert backend.backend_for(torch.zeros(1)) is REFERENCE
        assert backend.backend_for(torch.zeros(1, device="meta")) is REFERENCE
    with pytest.raises(kernels.BackendUnavailableError, match="'cpu' was asked for but is not usable: left out for"):
        kernels.use_backend("cpu")


def test_automatic_choice_takes_the_extension_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "UNAVAILABLE_REASON", None)
    with kernels.use_backend(None):
        assert backend.backend_for(torch.zeros(1)) is cpu.BACKEND


def test_explicit_triton_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_common, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kernels.BackendUnavailableError, match="torch sees no CUDA device"):
        kernels.use_backend("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with (
        kernels.use_backend("triton"),
        pytest.raises(kernels.BackendUnavailableError, match="a tensor is on the CPU"),
    ):
        kernels.fake_quant_per_token(torch.zeros(1, 4))


def test_explicit_cpu_refuses_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "UNAVAILABLE_REASON", None)
    with kernels.use_backend("cpu"), pytest.raises(kernels.BackendUnavailableError, match="a tensor is on meta"):
        kernels.fake_quant_per_token(torch.zeros(1, 4, device="meta"))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(
        kernels.BackendUnavailableError, match="unknown backend 'cuda': use one of triton, cpu, reference"
    ):
        kernels.use_backend("cuda")


def test_choice_ends_with_its_context() -> None:
    with kernels.use_backend("reference"):
        with kernels.use_backend(None):
            assert backend._requested is None
        assert backend._requested == "reference"


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_common.unavailable_reason() == "the package triton is not installed"


def test_package_works_without_triton_and_without_the_extension() -> None:
    code = """
import sys
sys.modules["triton"] = None
sys.modules["qrealign_kernels._C"] = None
import torch, qrealign_kernels
weight = torch.ones(2, 4)
print(qrealign_kernels.fake_quant_weight(weight, num_bits=8).shape, qrealign_kernels.build_info()["cpu_isa"])
"""
    assert run_python(code) == "torch.Size([2, 4]) none"


def test_environment_chooses_the_first_backend() -> None:
    code = "from qrealign_kernels import backend; print(backend._requested)"
    assert run_python(code, QREALIGN_BACKEND="reference") == "reference"


def test_unknown_backend_in_the_environment_fails_at_the_first_op() -> None:
    code = """
import torch, qrealign_kernels
try:
    qrealign_kernels.fake_quant_per_token(torch.ones(1, 4))
except qrealign_kernels.BackendUnavailableError as error:
    print(error)
"""
    assert run_python(code, QREALIGN_BACKEND="fast") == (
        "unknown backend 'fast': use one of triton, cpu, reference (chosen by use_backend or QREALIGN_BACKEND)"
    )


def test_extension_that_is_missing_or_broken_keeps_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    monkeypatch.setattr(native, "BUILD_NOTE", note)
    assert native.load_extension("_absent") == (
        None,
        "qrealign_kernels._absent is not built (no build was attempted)",
    )
    note.write_text("_C: built\n_absent: left out: no compiler\n")
    assert native.load_extension("_absent")[1] == "qrealign_kernels._absent is not built (left out: no compiler)"

    def fail(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr("importlib.import_module", fail)
    assert native.load_extension("_C")[1] == "qrealign_kernels._C cannot be loaded: undefined symbol"


def test_build_info_refuses_a_choice_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_requested", "fast")
    with pytest.raises(kernels.BackendUnavailableError, match="unknown backend 'fast'"):
        kernels.build_info()


def test_build_info_names_every_backend() -> None:
    info = kernels.build_info()
    assert set(info) == {
        "triton",
        "cpu",
        "reference",
        "cuda_kernels",
        "cpu_isa",
        "cpu_linear_isa",
        "torch",
        "triton_version",
    }
    assert info["reference"] == "usable"


def test_version_of_an_absent_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise triton_common.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    assert triton_common.version() == "none"


@pytest.mark.parametrize(("columns", "width", "key"), [(1, 1, "128"), (129, 256, "1024"), (28672, 32768, "32768")])
def test_a_tile_holds_a_row_and_has_the_launch_of_one_no_smaller(columns: int, width: int, key: str) -> None:
    assert triton_common.tile_width(columns) == width
    assert triton_common.width_key(width) == key
