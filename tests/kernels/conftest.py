"""Runs op tests once per backend of this machine, on the device that the backend is for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import backend, cuda, launches

STREAM = 7
LAUNCHES = {  # of the CUDA extension's kernels in the tests that record them
    "cuda_int4": {"WARPS": 8, "ROW_TILES": 1, "STAGES": 2},
    "cuda_int8": {"WARPS": 8, "ROW_TILES": 1, "STAGES": 2},
    "cuda_int4_tile": {"TOKENS": 128, "ROWS": 64, "CLUSTER": 2, "SPLIT": 0},
}


class Recorder:
    """Stands in for the CUDA extension and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, arguments))


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Let tensors of the CPU count as a GPU's, and record what would be launched there."""
    recorder = Recorder()
    monkeypatch.setattr(cuda, "_C", recorder)
    monkeypatch.setattr(cuda, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    with contextlib.ExitStack() as stack:
        for kernel, launch in LAUNCHES.items():
            stack.enter_context(launches.forced(kernel, launch))
        yield recorder


@contextlib.contextmanager
def chosen(name: str) -> Iterator[str]:
    """Choose a backend and, for Triton on a GPU, make new tensors there."""
    if (reason := backend.unavailable_reason(name)) is not None:
        pytest.skip(f"{name}: {reason}")
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    with kernels.use_backend(name), torch.device(device):
        yield name


@pytest.fixture(params=backend.BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test once with each backend."""
    with chosen(request.param) as name:
        yield name


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """Choose the Triton kernels alone."""
    with chosen("triton"):
        yield


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what is allocated with NaN, or 85 in integers: what a kernel leaves out stays visible."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 85)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
