"""What `doctor` says of a machine."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

import qrealign_kernels
from qrealign import doctor, run
from qrealign.status import BAD_INPUT
from qrealign_kernels import cpu_linear, launches


def test_doctor_prints_why_kernels_are_not_usable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = qrealign_kernels.build_info() | {"cuda_kernels": "qrealign_kernels._C_cuda is not built (no toolkit)"}
    monkeypatch.setattr(qrealign_kernels, "build_info", lambda: info)
    assert run.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "versions",
        "devices",
        "kernels",
        "instruction sets",
    ]
    assert "  cuda extension  qrealign_kernels._C_cuda is not built (no toolkit)" in lines
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in lines)


def test_doctor_says_in_a_sentence_that_an_instruction_set_is_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if cpu_linear.UNAVAILABLE_REASON is not None:
        pytest.skip(cpu_linear.UNAVAILABLE_REASON)
    monkeypatch.setattr(cpu_linear, "ISA", "mmx")
    assert run.main(["doctor"]) == BAD_INPUT
    assert capsys.readouterr().err.startswith("error: QREALIGN_CPU_ISA=mmx: the instruction set mmx is unknown")


def test_doctor_names_the_class_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="A GPU", total_memory=24 * 2**30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(launches, "gpu_class", lambda index: "default")
    assert "  cuda:0  A GPU, 24 GiB, compute capability 8.9, launch table 'default'" in doctor.report().splitlines()


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert "  accelerate          not installed" in doctor.report().splitlines()
