"""The CUDA extension replaced by one that keeps what it was called with, for machines without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qrealign_kernels import cuda

STREAM = 7


class Recorder:
    """Stands in for the extension and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, arguments))


def record_extension(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Let tensors of the CPU count as a GPU's, whose current stream is `STREAM`, and record what would be launched."""
    recorder = Recorder()
    monkeypatch.setattr(cuda, "_C", recorder)
    monkeypatch.setattr(cuda, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    return recorder
