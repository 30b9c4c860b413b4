"""A server over a tiny random model, in a thread of the test process, and an engine without HTTP."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from qrealign.data.encode import ChatEncoder
from qrealign.serve.app import Server, build_app
from qrealign.serve.engine import Engine
from qrealign.serve.jobs import Answer, Job, Piece
from qrealign.serve.loading import ServedModel
from qrealign.serve.metrics import ServerMetrics
from qrealign.serve.options import ServeOptions
from qrealign.serve.replies import Verdict
from qrealign.serve.runner import Runner
from qrealign.serve.sampling import SamplingSettings
from qrealign.serve.server import DrainingServer
from tests.helpers import CHAT_TEMPLATE, TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

# One client for all tests: each makes a TLS context, which takes longer than a request.
http = httpx.Client(timeout=20, trust_env=False)
EOS = 2
LENGTH = 160


def served_model(
    model_type: str = "llama", *, chat_template: str | None = CHAT_TEMPLATE, max_length: int = LENGTH
) -> ServedModel:
    """Return a tiny random model that answers any text with random bytes and never ends by itself."""
    model = tiny_model(model_type, vocab_size=TOKENIZER_VOCAB)
    return ServedModel(
        name="tiny",
        model=model,
        encoder=ChatEncoder(tiny_tokenizer(chat_template), max_length=max_length),
        stop_ids=frozenset({EOS}),
        scheme="float32",
        verdict=Verdict(passed=True, headline="harmful score 90.0 % → 1.0 %", reasons=["Harmful score 1.0 %: fine."]),
    )


@dataclass
class Running:
    """A server that listens."""

    url: str
    server: Server
    listening: DrainingServer
    thread: threading.Thread

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Wait until no slot is taken and nothing waits."""
        deadline = time.monotonic() + seconds
        while (load := self.server.engine.load()).running + load.waiting:
            assert time.monotonic() < deadline, f"still busy: {load}"
            time.sleep(0.01)


@contextmanager
def serving(served: ServedModel | None = None, *, slots: int = 4, **options: Any) -> Iterator[Running]:
    """Run a server on a free port until the block ends."""
    served = served or served_model()
    settings = ServeOptions(model="tiny", **options)
    app = build_app(served, Runner(served.model, slots=slots, max_length=served.encoder.max_length), settings)
    config = uvicorn.Config(
        app, port=0, lifespan="on", log_level="error", timeout_graceful_shutdown=2, server_header=False
    )
    server = DrainingServer(config, app.state.server.engine, settings.grace, ready=lambda: None)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", app.state.server, server, thread)
    finally:
        server.should_exit = True
        thread.join()


class Desk:
    """An engine without HTTP: hand in jobs, read their answers.

    Args:
        runner: the model's slots, or anything that acts like them.
    """

    def __init__(self, runner: Any, *, decode: Callable[[Any], str], max_queue: int = 64) -> None:
        self._decode = decode
        self.engine = Engine(
            runner,
            stop_ids={EOS},
            max_queue=max_queue,
            publish=lambda pieces: [job.listener(piece) for job, piece in pieces] and None,
            metrics=ServerMetrics("tiny"),
        )
        self.engine.start()

    def job(
        self, prompt: list[int], *, deadline: float = float("inf"), **sampling: Any
    ) -> tuple[Job, queue.Queue[Piece]]:
        """Return a job and the queue that its pieces come to."""
        pieces: queue.Queue[Piece] = queue.Queue()
        settings = SamplingSettings(**{"temperature": 0.0, "ignore_eos": True, **sampling})
        answer = Answer(self._decode, settings.stops)
        return Job(prompt=prompt, sampling=settings, answer=answer, listener=pieces.put, deadline=deadline), pieces

    def ask(self, *asked: tuple[list[int], dict[str, Any]]) -> list[list[Piece]]:
        """Return the pieces of each (prompt, sampling), all asked at once."""
        jobs = [self.job(prompt, **sampling) for prompt, sampling in asked]
        self.engine.submit([job for job, _ in jobs])
        return [read_all(pieces) for _, pieces in jobs]

    def close(self) -> None:
        """End the engine."""
        self.engine.stop()
        self.engine.join()


def read_all(pieces: queue.Queue[Piece]) -> list[Piece]:
    """Return the pieces of a job, up to the last."""
    found = [pieces.get(timeout=20)]
    while not found[-1].last:
        found.append(pieces.get(timeout=20))
    return found


def text_of(pieces: list[Piece]) -> str:
    """Return the text of a job."""
    return "".join(piece.text for piece in pieces)
