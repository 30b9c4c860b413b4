"""Chooses who computes an op: the Triton kernels, the compiled CPU code, or the reference."""

from __future__ import annotations

import os
from types import TracebackType

import torch
from torch import Tensor

from qrealign_kernels import cpu, cpu_linear, cuda, triton_common
from qrealign_kernels.interface import REFERENCE, Backend, BackendUnavailableError

BACKENDS = ("triton", "cpu", "reference")
_CHOSEN = "(chosen by use_backend or QREALIGN_BACKEND)"


class BackendChoice:
    """What `use_backend` returns: leaving it as a context restores the choice before it."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous


_requested: str | None = os.environ.get("QREALIGN_BACKEND") or None
_LOADED: dict[str, Backend] = {"reference": REFERENCE, "cpu": cpu.BACKEND}


def use_backend(name: str | None) -> BackendChoice:
    """Choose the backend of all following ops, until changed or, in a `with` statement, until its end.

    Args:
        name: "triton", "cpu", "reference", or None to choose by the tensors' device. The environment variable
            QREALIGN_BACKEND gives the first choice.

    Raises:
        BackendUnavailableError: there is no such backend, or it cannot run on this machine.
    """
    global _requested
    if name is not None:
        _require(name)
    choice = BackendChoice(_requested)
    _requested = name
    return choice


def unavailable_reason(name: str) -> str | None:
    """Return why a backend cannot run on this machine, or None if it can."""
    if name == "triton":
        return triton_common.unavailable_reason()
    return cpu.UNAVAILABLE_REASON if name == "cpu" else None


def backend_for(tensor: Tensor) -> Backend:
    """Return the backend that computes ops on this tensor.

    Raises:
        BackendUnavailableError: a backend was chosen by name and cannot take this tensor.
    """
    if _requested is None:
        return _load(_preferred(tensor))
    _require(_requested)
    on_cpu = tensor.device.type == "cpu"
    if _requested == "cpu" and not on_cpu:
        raise BackendUnavailableError(f"backend 'cpu' was asked for, but a tensor is on {tensor.device} {_CHOSEN}")
    if _requested == "triton" and on_cpu and not triton_common.interpreting():
        raise BackendUnavailableError(
            f"backend 'triton' was asked for, but a tensor is on the CPU and TRITON_INTERPRET is not 1 {_CHOSEN}"
        )
    return _load(_requested)


def _preferred(tensor: Tensor) -> str:
    """Return the fastest backend for a tensor; Triton's interpreter counts as none."""
    if tensor.device.type == "cpu":
        return "reference" if cpu.UNAVAILABLE_REASON else "cpu"
    on_gpu = tensor.device.type == "cuda" and not triton_common.interpreting()
    return "triton" if on_gpu and triton_common.unavailable_reason() is None else "reference"


def _require(name: str) -> None:
    if name not in BACKENDS:
        raise BackendUnavailableError(f"unknown backend {name!r}: use one of {', '.join(BACKENDS)} {_CHOSEN}")
    if (reason := unavailable_reason(name)) is not None:
        raise BackendUnavailableError(f"backend {name!r} was asked for but is not usable: {reason} {_CHOSEN}")


def _load(name: str) -> Backend:
    if name == "triton" and name not in _LOADED:
        from qrealign_kernels import triton_backend

        _LOADED[name] = triton_backend.BACKEND
    return _LOADED[name]


def build_info() -> dict[str, str]:
    """Return what this machine can use: "usable" or the reason why not, instruction sets and versions.

    "cuda_kernels" is the extension that serves the backend "triton" where its launch tables say so.

    Raises:
        BackendUnavailableError: QREALIGN_BACKEND or QREALIGN_CPU_ISA names what this machine does not have.
    """
    if _requested is not None:
        _require(_requested)
    info = {name: unavailable_reason(name) or "usable" for name in BACKENDS}
    return info | {
        "cuda_kernels": cuda.unavailable_reason() or "usable",
        "cpu_isa": cpu.isa(),
        "cpu_linear_isa": cpu_linear.isa(),
        "torch": torch.__version__,
        "triton_version": triton_common.version(),
    }
