"""What this machine can do at most, measured beside the runs: memory, matrix products, and the way from the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SIZE = 8192  # of a square product; on a CPU, where a second is too long, SIZE_CPU
SIZE_CPU = 512
COPY_BYTES, COPY_BYTES_CPU = 2**31, 2**26
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates of one device: `copy` in GB/s read and written, `bf16` and `int8` in 10**12 operations a second.

    `host_copy` is the rate from page-locked host memory to the device, GB/s; 0 on a CPU.
    """

    copy: float
    bf16: float
    int8: float
    host_copy: float


# Data sheet of the GeForce RTX 4090: 1,008 GB/s; 165 TFLOP/s in bfloat16 accumulated in float32. For int8 the sheet has
# 661 TOP/s; half of it is used here, because measured int8 products reach less of their sheet than bfloat16 ones do.
# The way from the host is PCIe 4.0 x16 at what copies reach of its 32 GB/s.
RTX_4090 = Ceilings(copy=1008, bf16=165, int8=330, host_copy=25)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Return the device's rates, medians over a few rounds on random data."""
    on_gpu = device.type == "cuda"
    size, copied = (SIZE, COPY_BYTES) if on_gpu else (SIZE_CPU, COPY_BYTES_CPU)
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    codes, weights = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    operations = 2 * size**3
    host_copy = 0.0
    if on_gpu:
        pinned = torch.empty(copied // 4, dtype=torch.uint8, pin_memory=True)
        part = target[: copied // 4]
        host_copy = len(pinned) / _seconds(lambda: part.copy_(pinned, non_blocking=True), device) / 1e9
    return Ceilings(
        copy=2 * copied / _seconds(lambda: target.copy_(source), device) / 1e9,
        bf16=operations / _seconds(lambda: a @ b, device) / 1e12,
        int8=operations / _seconds(lambda: torch._int_mm(codes, weights.T), device) / 1e12,
        host_copy=host_copy,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of `work`, after one run that is not counted."""
    work()
    taken = []
    for _ in range(ROUNDS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[ROUNDS // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
