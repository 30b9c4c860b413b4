"""One HTTP request and its jobs: pieces come over from the engine's thread, and a client that leaves ends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from starlette.requests import Request

from qrealign.serve.engine import Engine, QueueFullError, UnavailableError
from qrealign.serve.jobs import Failure, Job, Piece
from qrealign.serve.replies import ApiError

_STATUS = {Failure.TIMED_OUT: 504, Failure.STOPPED: 503, Failure.BROKEN: 500, Failure.CANCELLED: 499}


class Publisher:
    """Carries pieces from the engine's thread into the event loop that serves requests."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self) -> None:
        """Publish into the loop that runs now."""
        self._loop = asyncio.get_running_loop()

    def __call__(self, pieces: Sequence[tuple[Job, Piece]]) -> None:
        """Hand over the pieces of a step: one wake-up of the loop, however many there are."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for these
                self._loop.call_soon_threadsafe(_spread, pieces)


def _spread(pieces: Sequence[tuple[Job, Piece]]) -> None:
    for job, piece in pieces:
        job.listener(piece)


class Exchange:
    """The jobs of one request. Make it, add the jobs, `submit`, read `batches`, `close`.

    Args:
        engine: runs the jobs.
        request: whose connection is watched; its body was read.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None
        self.jobs: list[Job] = []

    def listen(self, index: int, piece: Piece) -> None:
        """Take a piece of job `index`, in the event loop."""
        self._queue.put_nowait((index, piece))

    def submit(self) -> None:
        """Queue the jobs, and from now on watch the connection.

        Raises:
            ApiError: they are not taken.
        """
        try:
            self._engine.submit(self.jobs)
        except QueueFullError as error:
            raise ApiError(
                429,
                f"the queue is full: try again in {error.retry_after} s",
                code="queue_full",
                retry_after=error.retry_after,
            ) from None
        except UnavailableError as error:
            raise ApiError(503, str(error), code="unavailable", retry_after=10) from None
        self._watch = asyncio.create_task(self._cancel_on_disconnect())

    async def batches(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """Yield (job, piece) pairs as they come, all that are there at once, until every job has ended.

        Raises:
            ApiError: a job failed; the others are cancelled.
        """
        left = len(self.jobs)
        while left:
            batch = [await self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            failure = next((piece.failure for _, piece in batch if piece.failure is not None), None)
            if failure is not None:
                self.close()
                raise _error_of(failure)
            yield batch
            left -= sum(piece.last for _, piece in batch)

    def close(self) -> None:
        """End what still runs; may be called again."""
        if self._watch is not None:
            self._watch.cancel()
        self._engine.cancel(self.jobs)

    async def _cancel_on_disconnect(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self.jobs)


def _error_of(failure: Failure) -> ApiError:
    """Return the refusal that tells of a failure."""
    messages = {Failure.TIMED_OUT: "the time for this request is over: ask for fewer tokens, or try again later"}
    retry_after = 10 if failure in (Failure.STOPPED, Failure.TIMED_OUT) else None
    return ApiError(
        _STATUS[failure], messages.get(failure, failure.value), code=failure.name.lower(), retry_after=retry_after
    )
