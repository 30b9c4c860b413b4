"""Processes that take jobs from one list: torch is imported once in each, and one that dies costs its job alone."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Generic, TypeVar

from qrealign.errors import QrealignError

JobT = TypeVar("JobT")
_STOP_SECONDS = 10


@dataclass(frozen=True)
class Done(Generic[JobT]):
    """A job that has ended; `error` is one sentence where it failed."""

    job: JobT
    error: str | None


class Workers(Generic[JobT]):
    """Worker processes, to be used in a `with` block; each starts with its first job and lives until the end.

    Args:
        work: called as `work(job, device)` in a worker; it and the jobs must be picklable. What it prints goes into
            the worker's log.
        devices: the device of each worker: cpu or cuda:N. A worker on a GPU sees that one alone, as `cuda`.
        threads: processor threads of each worker.
        logs: folder of the logs.
    """

    def __init__(self, work: Callable[[JobT, str], None], devices: Sequence[str], *, threads: int, logs: Path) -> None:
        self._work = work
        self._threads = threads
        self._logs = logs
        self._devices = list(devices)
        self._running: dict[int, tuple[BaseProcess, Connection]] = {}

    def __enter__(self) -> Workers[JobT]:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process, pipe in self._running.values():
            if kind is None:
                with suppress(OSError):  # it may have died since its last job
                    pipe.send(None)
            else:
                process.terminate()
        for process, pipe in self._running.values():
            process.join(_STOP_SECONDS)
            pipe.close()

    def run(self, jobs: Sequence[JobT]) -> Iterator[Done[JobT]]:
        """Yield every job as it ends; the caller may stop early, which leaves the rest undone."""
        waiting = deque(jobs)
        busy: dict[Connection, tuple[int, JobT]] = {}
        idle = deque(range(len(self._devices)))
        while waiting or busy:
            while waiting and idle:
                number, job = idle.popleft(), waiting.popleft()
                pipe = self._pipe_of(number)
                with suppress(OSError):  # of a worker that has died already; its answer says so
                    pipe.send(job)
                busy[pipe] = (number, job)
            for ready in connection.wait(list(busy)):
                assert isinstance(ready, Connection)
                number, job = busy.pop(ready)
                idle.append(number)
                yield Done(job, self._answer(number, ready))

    def _pipe_of(self, number: int) -> Connection:
        """Return the pipe to a worker, which is started where there is none, or none any more."""
        if number not in self._running or not self._running[number][0].is_alive():
            context = get_context("spawn")  # a forked child cannot use CUDA
            ours, theirs = context.Pipe()
            device = self._devices[number]
            process = context.Process(
                target=_serve,
                args=(theirs, self._work, device.partition(":")[0], self._logs / f"worker-{number}.log"),
                daemon=True,
            )
            with _environment(_variables(device, self._threads)):
                process.start()
            theirs.close()
            self._running[number] = process, ours
        return self._running[number][1]

    def _answer(self, number: int, pipe: Connection) -> str | None:
        """Return what a worker says of its job; one that has died is forgotten, so that another takes its place."""
        try:
            return pipe.recv()
        except (EOFError, OSError):  # the latter where it has died before it read its job
            process, _ = self._running.pop(number)
            process.join()
            log = self._logs / f"worker-{number}.log"
            return f"the worker process ended with exit code {process.exitcode} (memory?): see {log}"


def _variables(device: str, threads: int) -> dict[str, str]:
    """Return the environment of a worker; it must stand before torch is imported there."""
    found = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if device.startswith("cuda"):
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = int(device.partition(":")[2] or 0)
        found["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    return found


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a process that is started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, work: Callable[[JobT, str], None], device: str, log: Path) -> None:
    """Do jobs until None comes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    with open(log, "a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job is None:
            return
        pipe.send(attempt(work, job, device))


def attempt(work: Callable[[JobT, str], None], job: JobT, device: str) -> str | None:
    """Do one job; return None, or one sentence on why it failed."""
    try:
        work(job, device)
    except QrealignError as error:
        return str(error)
    except Exception as error:  # whatever it is, the other jobs go on; the log has the whole story
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None
