"""Time of GPU work: of calls captured in a CUDA graph, without the host's share, or issued by Python, with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

CACHE_BYTES = 256 * 2**20  # several times the largest L2 cache, 60 MB on an H200


def rotations(bytes_of_one: int) -> int:
    """Return how many sets of inputs of this size keep a loop over them out of the L2 cache; tiny ones may stay in."""
    return min(64, max(2, -(-CACHE_BYTES // max(1, bytes_of_one))))


def graph_seconds(calls: Sequence[Callable[[], object]], *, repeats: int = 15) -> float:
    """Return the median seconds of one call, over replays of a graph that makes all calls one after the other.

    Args:
        calls: the same work on different inputs, `rotations` of them; they must neither wait for the device nor
            need gradients of each other.
        repeats: replays that are timed, after two that are not.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and fills the allocator
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for index in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return median(times) / len(calls)


def eager_seconds(calls: Sequence[Callable[[], object]], *, repeats: int = 5) -> float:
    """Return the median seconds of one call when Python issues all of them, one after the other, without waiting."""
    for call in calls:
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times) / len(calls)


def copy_bandwidth(num_bytes: int = 2**30) -> float:
    """Return bytes a second of a copy on the device, read and written ones together."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    return 2 * num_bytes / graph_seconds([copy])
