"""Runs op tests once per backend of this machine, on the device that the backend is for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import qrealign_kernels as kernels
from qrealign_kernels import backend


@pytest.fixture(params=backend.BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Choose a backend and, for Triton on a GPU, make new tensors there."""
    if (reason := backend.unavailable_reason(request.param)) is not None:
        pytest.skip(f"{request.param}: {reason}")
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    with kernels.use_backend(request.param), torch.device(device):
        yield request.param
