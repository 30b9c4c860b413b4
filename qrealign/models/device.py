"""Where a model runs, in which dtype, and whether it fits there."""

from __future__ import annotations

from typing import Literal

import torch

from qrealign.errors import AbsentDeviceError

MemoryMode = Literal["auto", "resident", "low", "streamed"]
MEMORY_MODES = ("auto", "resident", "low", "streamed")
RESIDENT_SHARE = 0.6  # of the free memory: what weights may take, the rest is for activations


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; auto takes a GPU where there is one.

    Raises:
        AbsentDeviceError: the device is unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise AbsentDeviceError(f"--device {name!r} is no device: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise AbsentDeviceError(
            f"--device {name} was asked for, but this machine shows torch {torch.cuda.device_count()} GPUs: "
            "use --device cpu, or install a CUDA build of torch and its driver"
        )
    if device.type not in ("cpu", "cuda"):
        raise AbsentDeviceError(f"--device {name} is not supported: use cpu or cuda")
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on a GPU and float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def available_host_bytes() -> int:
    """Return the host memory that is available to new allocations."""
    import psutil

    return int(psutil.virtual_memory().available)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on the device, or available on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_host_bytes()
