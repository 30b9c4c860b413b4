"""What follows a stretch of work, done beside the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class HandOver:
    """Runs work on a GPU's results in threads and streams of its own; on a CPU it runs at once.

    Use it as a context manager: leaving it without an error waits for what is left.

    Args:
        device: where the results are.
        pieces: how many are worked on at a time; with more than one they end in any order.
    """

    def __init__(self, device: torch.device, pieces: int = 1) -> None:
        self.device, self.pieces = device, pieces
        self._threads = ThreadPoolExecutor(max_workers=pieces, thread_name_prefix="hand-over")
        self._under_way: deque[Future[None]] = deque()
        self._streams = [torch.cuda.Stream(device) for _ in range(pieces if device.type == "cuda" else 0)]

    def submit(self, work: Callable[[], None]) -> list[Future[None]]:
        """Wait until fewer than `pieces` are under way, then start the next; return it, nothing where it is done.

        What an earlier one raised is raised here.
        """
        self.wait(self.pieces - 1)
        if not self._streams:
            work()
            return []
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        self._under_way.append(self._threads.submit(self._run, work, ready))
        return [self._under_way[-1]]

    def wait(self, left: int = 0) -> None:
        """Return when all that was submitted is done, but for the `left` last pieces."""
        while len(self._under_way) > left:
            self._under_way.popleft().result()

    def _run(self, work: Callable[[], None], ready: torch.cuda.Event) -> None:
        stream = self._streams.pop()
        try:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                work()
                stream.synchronize()
        finally:
            self._streams.append(stream)

    def __enter__(self) -> HandOver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._threads.shutdown()
