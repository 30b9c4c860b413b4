"""Work recorded once as a CUDA graph and replayed, so that a step costs one launch; off a GPU it is simply called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all recordings on a device: the next one finds the memory and the handles of the last."""
    return torch.cuda.Stream(device)


class Recorded:
    """Calls `work` again and again; on a GPU its kernels are recorded by `record` and replayed from then on.

    `work` takes everything it reads from tensors that keep their addresses, and leaves its results in such tensors; it
    reads nothing back to the host. What it allocates lives in memory of the recording's own, so a replay allocates
    nothing.
    """

    def __init__(self, work: Callable[[], object], device: torch.device) -> None:
        self.work, self.device = work, device
        self._graph: torch.cuda.CUDAGraph | None = None

    def record(self) -> None:
        """Run `work` once, which compiles kernels and makes handles, then record it; the recording computes nothing.

        Without a GPU nothing happens.
        """
        if self.device.type != "cuda":
            return
        self.close()  # an earlier recording's memory is used again
        stream, present = _recording_stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            self.work()
        present.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads read the next block and write the last one meanwhile; by default their calls end a recording.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.work()
        self._graph = graph

    def close(self) -> None:
        """Give the recording and its memory back. NCCL waits for recordings of its exchanges before it ends."""
        self._graph = None

    def __call__(self) -> None:
        if self._graph is None:
            self.work()
        else:
            self._graph.replay()
