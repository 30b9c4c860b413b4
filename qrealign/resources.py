"""What a stage costs: wall seconds, GPU-hours, peak device and host bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qrealign.records import StageRecord

_SAMPLE_SECONDS = 0.05
_SECONDS_PER_HOUR = 3600


class ResourceMeter:
    """Measures stages, one at a time.

    Host memory is this process's resident memory that no file backs, page-locked buffers included: file pages mapped
    from checkpoints are not counted, because the kernel drops them under pressure. Where the system does not tell them
    apart, the whole resident set is taken. Other processes of the run are measured by themselves; `gpus` says how many
    GPUs all of them hold.
    """

    def __init__(self, device: str = "cpu", *, gpus: int = 1) -> None:
        self.on_gpu, self.gpus = device.startswith("cuda"), gpus
        self.stages: list[StageRecord] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the enclosed work and append a `StageRecord`, also when it raises."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        sampler = _HostSampler()
        start = time.perf_counter()
        try:
            with sampler:
                yield
        finally:
            self.stages.append(self._record(name, time.perf_counter() - start, sampler.peak_bytes))

    def _record(self, name: str, seconds: float, peak_host_bytes: int) -> StageRecord:
        peak_device_bytes = 0
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            peak_device_bytes = torch.cuda.max_memory_allocated()
        gpu_hours = seconds * self.gpus / _SECONDS_PER_HOUR if self.on_gpu else 0.0
        return StageRecord(
            name=name,
            wall_seconds=seconds,
            gpu_hours=gpu_hours,
            peak_device_bytes=peak_device_bytes,
            peak_host_bytes=peak_host_bytes,
        )


class _HostSampler:
    """Samples this process's memory in a thread."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, host_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, host_bytes())


def host_bytes() -> int:
    """Return this process's resident bytes that no file backs (the whole resident set where the system gives no split).

    Page-locked memory is what the system calls shared.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            found = [line.split()[1] for line in status if line.startswith(("RssAnon:", "RssShmem:"))]
    except OSError:
        found = []
    if found:
        return 1024 * sum(map(int, found))
    import psutil

    return int(psutil.Process().memory_info().rss)
