"""Continuous batching: one thread owns the model; jobs join and leave its batch between two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from qrealign.errors import QrealignError
from qrealign.serve.jobs import Failure, Finish, Job, Piece
from qrealign.serve.metrics import ServerMetrics
from qrealign.serve.runner import Runner
from qrealign.serve.sampling import Choice, choose

logger = logging.getLogger(__name__)

Publish = Callable[[Sequence[tuple[Job, Piece]]], None]

_FAILURES_IN_A_ROW = 3  # after so many failed steps the device is taken for lost
_FIRST_GUESS_S = 2.0  # how long a job holds its slot, before one has ended


class QueueFullError(QrealignError):
    """No place is free in the queue; `retry_after` is a guess in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class UnavailableError(QrealignError):
    """The engine takes no jobs: it is shutting down, or its device is lost."""


class Load(NamedTuple):
    """How busy the engine is: sequences in slots, sequences waiting, slots."""

    running: int
    waiting: int
    slots: int


class Engine:
    """Runs jobs until each has ended; a job that is cancelled or out of time leaves before the next step.

    The rows of the runner are kept in this order: those that decode, those whose prompt is being read, free ones. So a
    decode step runs on the first rows, wherever jobs end.

    Args:
        runner: the model.
        stop_ids: tokens that end an answer.
        max_queue: most jobs that wait for a slot.
        publish: gets the pieces of a step, on the engine's thread.
        metrics: is told what happens.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        stop_ids: Collection[int],
        max_queue: int,
        publish: Publish,
        metrics: ServerMetrics,
    ) -> None:
        self._runner = runner
        self._stop_ids = frozenset(stop_ids)
        self._max_queue = max_queue
        self._publish = publish
        self._metrics = metrics
        self._waiting: deque[Job] = deque()
        self._rows: list[Job] = []  # rows 0 to _decoding - 1 decode, the others read their prompts
        self._decoding = 0
        self._pieces: list[tuple[Job, Piece]] = []
        self._wake = threading.Condition()
        self._refusal: str | None = None
        self._stopping = False
        self._failures = 0
        self._mean_seconds = _FIRST_GUESS_S
        # The number of threads that torch computes on is set per thread.
        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, args=(threads,), name="qrealign-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue some jobs, all or none.

        Raises:
            QueueFullError: there is no place for them.
            UnavailableError: no job is taken any more.
        """
        with self._wake:
            if self._refusal is not None:
                raise UnavailableError(self._refusal)
            free = self._runner.slots - len(self._rows)
            if len(self._waiting) + len(jobs) > self._max_queue + free:
                raise QueueFullError(self._retry_after())
            self._waiting.extend(jobs)
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Let jobs end before the next step; those that have ended do not mind."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def load(self) -> Load:
        """Return how busy the engine is now."""
        with self._wake:
            return Load(running=len(self._rows), waiting=len(self._waiting), slots=self._runner.slots)

    @property
    def refusal(self) -> str | None:
        """Why no job is taken, or None."""
        return self._refusal

    def drain(self) -> None:
        """Take no more jobs; those that were taken go on."""
        self._refusal = self._refusal or Failure.STOPPED.value

    def stop(self) -> None:
        """End every job that is left, and the thread once its step is done."""
        self.drain()
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread to end."""
        self._thread.join(timeout)

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._runner.bind_thread()
        while not self._stopping:
            try:
                if self._admit():
                    self._read_prompts()
                    self._deliver()  # first tokens do not wait for the others' next ones
                    self._step()
                    self._failures = 0
            except Exception as error:  # of a kernel, or out of memory: the jobs are lost, the server is not
                self._recover(error)
            self._deliver()
        self._end_all(Failure.STOPPED)
        self._deliver()

    def _admit(self) -> bool:
        """Drop jobs that are over, wait for work, give free rows to waiting jobs; return False at the end."""
        while True:
            with self._wake:
                if self._stopping:
                    return False
                self._drop_ended()
                while self._waiting and len(self._rows) < self._runner.slots:
                    self._rows.append(self._waiting.popleft())
                if self._rows:
                    return True
                if not self._pieces:
                    self._wake.wait()
            self._deliver()

    def _drop_ended(self) -> None:
        """End jobs that were cancelled or whose time is up, wherever they are."""
        now = time.monotonic()
        for job in [job for job in (*self._rows, *self._waiting) if job.cancelled or now > job.deadline]:
            failure = Failure.CANCELLED if job.cancelled else Failure.TIMED_OUT
            if job in self._waiting:
                self._waiting.remove(job)
                self._close(job, Piece(failure=failure))
            else:
                self._leave(job, Piece(failure=failure))

    def _read_prompts(self) -> None:
        """Read prompts, oldest first, up to the budget; those that are whole get their first token."""
        rows: list[int] = []
        width = 0
        for row in range(self._decoding, len(self._rows)):
            wanted = max(width, min(self._rows[row].unread, self._runner.prompt_tokens))
            if rows and self._runner.padded_tokens(len(rows) + 1, wanted) > self._runner.prompt_tokens:
                break
            rows.append(row)
            width = wanted
        if not rows:
            return
        jobs = [self._rows[row] for row in rows]
        starts = [job.read for job in jobs]
        chunks = [job.prompt[start : start + width] for job, start in zip(jobs, starts, strict=True)]
        logits = self._runner.prefill(rows, chunks, starts)
        for job, chunk in zip(jobs, chunks, strict=True):
            job.read += len(chunk)
        self._metrics.read(sum(map(len, chunks)))
        whole = [index for index, job in enumerate(jobs) if not job.unread]
        for index in whole:
            row = self._rows.index(jobs[index])
            if row != self._decoding:
                self._swap(row, self._decoding)
            self._decoding += 1
        if whole:
            self._take([jobs[index] for index in whole], logits[whole])

    def _step(self) -> None:
        """Draw one more token for every row that decodes."""
        jobs = self._rows[: self._decoding]
        if not jobs:
            return
        logits = self._runner.decode([job.last_token for job in jobs], [job.read for job in jobs])
        for job in jobs:
            job.read += 1
        self._take(jobs, logits)

    def _take(self, jobs: Sequence[Job], logits: torch.Tensor) -> None:
        """Draw the next token of jobs and pass on what it completes."""
        choices = choose(logits, [job.sampling for job in jobs], [job.numbers.random() for job in jobs])
        now = time.monotonic()
        for job, choice in zip(jobs, choices, strict=True):
            self._metrics.generated(now - job.created if job.generated == 0 else None, now - job.last_time)
            job.generated, job.last_token, job.last_time = job.generated + 1, choice.token_id, now
            self._advance(job, choice)

    def _advance(self, job: Job, choice: Choice) -> None:
        if not choice.finite:
            self._leave(job, Piece(failure=Failure.BROKEN))
            return
        if choice.token_id in self._stop_ids and not job.sampling.ignore_eos:
            self._finish(job, job.answer.finish(), "stop")
            return
        piece, stopped = job.answer.push(choice)
        if stopped:
            self._finish(job, piece, "stop")
        elif job.generated >= job.sampling.max_tokens:
            rest = job.answer.finish()
            self._finish(job, Piece(text=piece.text + rest.text, tokens=(*piece.tokens, *rest.tokens)), "length")
        elif piece.text or piece.tokens:
            self._pieces.append((job, piece))

    def _finish(self, job: Job, piece: Piece, finish: Finish) -> None:
        self._leave(job, Piece(text=piece.text, tokens=piece.tokens, finish=finish))

    def _leave(self, job: Job, piece: Piece) -> None:
        """Free the row of a job and close the gaps that it leaves."""
        row = self._rows.index(job)
        if piece.failure is not None:  # nobody looked at the numbers it holds, or they are none
            self._runner.cache.clear_row(row)
        if row < self._decoding:
            self._decoding -= 1
            self._move(self._decoding, row)
            row = self._decoding
        self._move(len(self._rows) - 1, row)
        self._rows.pop()
        self._mean_seconds += 0.1 * (time.monotonic() - job.created - self._mean_seconds)
        self._close(job, piece)

    def _close(self, job: Job, piece: Piece) -> None:
        self._metrics.ended(piece.failure.name.lower() if piece.failure else str(piece.finish))
        self._pieces.append((job, piece))

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._runner.cache.copy_row(source, target, self._rows[source].read)
            self._rows[target] = self._rows[source]

    def _swap(self, one: int, other: int) -> None:
        self._runner.cache.swap_rows(one, other, max(self._rows[one].read, self._rows[other].read))
        self._rows[one], self._rows[other] = self._rows[other], self._rows[one]

    def _recover(self, error: Exception) -> None:
        """Fail the jobs of a step that failed; give up when steps keep failing."""
        logger.error("a step failed: %s: %s", type(error).__name__, error)
        self._failures += 1
        self._fail_rows()
        if self._failures >= _FAILURES_IN_A_ROW:
            self._refusal = f"the model failed {_FAILURES_IN_A_ROW} times in a row: restart the server"
            self._end_all(Failure.BROKEN)

    def _fail_rows(self) -> None:
        rows, self._rows, self._decoding = self._rows, [], 0
        for job in rows:
            self._close(job, Piece(failure=Failure.BROKEN))

    def _end_all(self, failure: Failure) -> None:
        with self._wake:
            jobs = [*self._rows, *self._waiting]
            self._rows, self._decoding = [], 0
            self._waiting.clear()
        for job in jobs:
            self._close(job, Piece(failure=failure))

    def _deliver(self) -> None:
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._publish(pieces)

    def _retry_after(self) -> int:
        """Guess the seconds until a place is free: jobs end one after the other, `slots` at a time."""
        return min(max(round(self._mean_seconds / self._runner.slots), 1), 60)
