"""Time of GPU work without the host's share: calls are captured in a CUDA graph and replayed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

CACHE_BYTES = 256 * 2**20  # several times the largest L2 cache, 60 MB on an H200


def rotations(bytes_of_one: int) -> int:
    """Return how many sets of inputs of this size keep a loop over them out of the L2 cache; tiny ones may stay in."""
    return min(64, max(2, -(-CACHE_BYTES // max(1, bytes_of_one))))


@functools.cache
def bring_clocks_up(seconds: float = 0.3) -> None:
    """Keep the GPU busy until it runs at full clocks: one that has idled answers the first calls at half of them."""
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        square @ square
        torch.cuda.synchronize()


def graph_seconds(calls: Sequence[Callable[[], object]], *, repeats: int = 15) -> float:
    """Return the median seconds of one call, over replays of a graph that makes all calls one after the other.

    Args:
        calls: the same work on different inputs, `rotations` of them; they must neither wait for the device nor
            need gradients of each other.
        repeats: replays that are timed, after two that are not.
    """
    return graph_seconds_by_turns(calls, repeats=repeats)[0]


def graph_seconds_by_turns(*works: Sequence[Callable[[], object]], repeats: int = 15) -> list[float]:
    """Return `graph_seconds` of several works whose graphs are replayed by turns.

    A GPU at its power limit lowers its clocks as it warms up; what takes turns runs at the same ones.
    """
    bring_clocks_up()
    graphs = [_captured(calls) for calls in works]
    times: list[list[float]] = [[] for _ in works]
    for index in range(repeats + 2):
        for graph, found in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if index >= 2:
                found.append(start.elapsed_time(end) / 1e3)
    return [median(found) / len(calls) for found, calls in zip(times, works, strict=True)]


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Return a graph of all calls."""
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
    return graph


def eager_seconds(call: Callable[[], object], *, repeats: int = 7) -> float:
    """Return the median seconds of a call as a program without graphs makes it, its host's share included."""
    bring_clocks_up()
    times = []
    for index in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return median(times)
