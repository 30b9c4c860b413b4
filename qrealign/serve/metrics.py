"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as _text
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_S = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """Counters of one server, in a registry of their own; may be used from any thread.

    Args:
        model: the name that the model is served under.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Gauge("qrealign_model_info", "The model that is served.", ["model"], registry=self.registry).labels(model).set(
            1
        )
        self._requests = Counter(
            "qrealign_http_requests", "HTTP requests by path and status.", ["path", "status"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "qrealign_http_request_seconds",
            "From the first byte of a request to the last of its response.",
            ["path"],
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self._prompt_tokens = Counter("qrealign_prompt_tokens", "Prompt tokens read.", registry=self.registry)
        self._tokens = Counter("qrealign_generated_tokens", "Tokens generated.", registry=self.registry)
        self._answers = Counter("qrealign_answers", "Answers by how they ended.", ["ended"], registry=self.registry)
        self._first_token = Histogram(
            "qrealign_first_token_seconds",
            "From the queueing of a request to its first token.",
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )
        self._next_token = Histogram(
            "qrealign_next_token_seconds", "Between two tokens of an answer.", buckets=_TOKEN_S, registry=self.registry
        )
        self._running = Gauge("qrealign_slots_running", "Slots that hold a sequence.", registry=self.registry)
        self._waiting = Gauge("qrealign_queue_length", "Sequences that wait for a slot.", registry=self.registry)
        self._slots = Gauge("qrealign_slots", "Slots that there are.", registry=self.registry)

    def watch(self, load: Callable[[], tuple[int, int, int]]) -> None:
        """Read the gauges (running, waiting, slots) from `load` whenever they are asked for."""
        for index, gauge in enumerate((self._running, self._waiting, self._slots)):
            gauge.set_function(lambda index=index: load()[index])  # type: ignore[misc]

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request; `path` is a route, so that there are few of them."""
        self._requests.labels(path, status).inc()
        self._request_seconds.labels(path).observe(seconds)

    def read(self, tokens: int) -> None:
        """Count prompt tokens."""
        self._prompt_tokens.inc(tokens)

    def generated(self, since_queued: float | None, since_last: float) -> None:
        """Count a token: the first of an answer by the seconds since it was queued, others by those since the last."""
        self._tokens.inc()
        if since_queued is None:
            self._next_token.observe(since_last)
        else:
            self._first_token.observe(since_queued)

    def ended(self, how: str) -> None:
        """Count an answer that ended by stop, length, cancelled, timed_out, stopped or broken."""
        self._answers.labels(how).inc()

    def text(self) -> bytes:
        """Return everything in the text format 0.0.4."""
        return _text(self.registry)
