"""What follows a block, done beside the training of the next one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class HandOver:
    """Runs work on a GPU's results in a thread and stream of its own, one piece at a time; on a CPU it runs at once.

    Use it as a context manager: leaving it without an error waits for the last piece.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hand-over")
        self._last: Future[None] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, work: Callable[[], None]) -> None:
        """Wait for the piece before, and start the next. What that raised is raised here."""
        self.wait()
        if self._stream is None:
            work()
            return
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        self._last = self._thread.submit(self._run, work, ready)

    def wait(self) -> None:
        """Return when everything submitted is done."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _run(self, work: Callable[[], None], ready: torch.cuda.Event) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            work()
            self._stream.synchronize()

    def __enter__(self) -> HandOver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()
