"""Runs op tests once per backend of this machine, on the device that the backend is for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import backend


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
