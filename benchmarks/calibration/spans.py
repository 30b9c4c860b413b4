"""Where a run's time and memory go: seconds and peaks of named functions of the pipeline, each less those inside it.

The pipeline knows nothing of this: the functions are wrapped from outside, before it starts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from qrealign.resources import host_bytes

SAMPLE_SECONDS = 0.01
REST = "other"  # what no span covers: imports, checks, reports


@dataclass(frozen=True)
class Target:
    """A function to be measured: its span's name, and where it is looked up, as `module:attribute.path`.

    Inside an `atomic` one nothing else is counted: loading that overlaps with steps is part of the steps. Of a
    generator, the time to each of its values counts.
    """

    span: str
    place: str
    atomic: bool = False


TARGETS = (
    Target("probe", "qrealign.pipeline.main:run_probe_stage"),
    Target("teach", "qrealign.pipeline.main:run_teaching"),
    Target("load", "qrealign.pipeline.student:Student.__init__"),
    Target("load", "qrealign.models.source:ModelSource.load_block"),
    Target("load", "qrealign.models.source:ModelSource.load_blocks"),
    Target("load", "qrealign.models.source:ModelSource.load_outer"),
    Target("capture", "qrealign.pipeline.calibrating:capture_block_inputs"),
    Target("capture", "qrealign.calibrate.blockwise:BlockwiseCalibrator._advance", atomic=True),
    Target("steps", "qrealign.calibrate.endtoend:EndToEndCalibrator.run", atomic=True),
    Target("steps", "qrealign.calibrate.blockwise:BlockwiseCalibrator._train", atomic=True),
    Target("pack", "qrealign.pipeline.student:Student.freeze"),
    Target("pack", "qrealign.calibrate.blockwise:freeze_block"),
    Target("save", "qrealign.pack.writer:CheckpointWriter.add_block"),
    Target("save", "qrealign.calibrate.handover:HandOver.wait"),
    Target("save", "qrealign.pack.writer:CheckpointWriter.add_outer"),
    Target("save", "qrealign.pack.writer:CheckpointWriter.finish"),
    Target("save", "qrealign.pipeline.main:verify_checkpoint"),
)
ORDER = (*dict.fromkeys(target.span for target in TARGETS), REST)


@dataclass(kw_only=True)
class Span:
    """What one span has cost: seconds, and peaks in bytes (see `Spans`)."""

    seconds: float = 0.0
    peak_device_bytes: int = 0
    peak_reserved_bytes: int = 0
    peak_host_bytes: int = 0


@dataclass
class Spans:
    """Attributes the main thread's time to the innermost span that is open.

    Device peaks are torch's: bytes in live tensors, and bytes taken from the driver. Host peaks are this process's
    memory that no file backs (`qrealign.resources`).
    """

    found: dict[str, Span] = field(default_factory=lambda: {REST: Span()})
    _open: list[str] = field(default_factory=lambda: [REST])
    _sealed: bool = False
    _last: float = field(default_factory=time.perf_counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watching(self) -> Iterator[Spans]:
        """Sample the host's memory inside the block, and close the last span at its end."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._account()
            self._stop.set()
            thread.join()

    @contextmanager
    def span(self, name: str, *, atomic: bool = False) -> Iterator[None]:
        """Count the block as `name`, unless an atomic span or another thread runs it."""
        if self._sealed or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._account()
        self.found.setdefault(name, Span())
        self._open.append(name)
        self._sealed = atomic
        try:
            yield
        finally:
            self._account()
            self._open.pop()
            self._sealed = False

    def _account(self) -> None:
        """Give the time since the last change, and the peaks in it, to the span that was open."""
        span = self.found[self._open[-1]]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            span.peak_device_bytes = max(span.peak_device_bytes, torch.cuda.max_memory_allocated())
            span.peak_reserved_bytes = max(span.peak_reserved_bytes, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        span.seconds += now - self._last
        self._last = now

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            span = self.found[self._open[-1]]
            span.peak_host_bytes = max(span.peak_host_bytes, host_bytes())


def instrument(spans: Spans, targets: Sequence[Target] = TARGETS) -> None:
    """Wrap every target, for the rest of the process.

    Raises:
        AttributeError: the pipeline has no such function any more: the table above must follow it.
    """
    for target in targets:
        owner, name, function = find_function(target.place)
        setattr(owner, name, _wrapped(function, spans, target))


def observe(place: str, after: Callable[..., None]) -> None:
    """Call `after(*arguments)` behind every call of the function at `place`, for the rest of the process."""
    owner, name, function = find_function(place)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, wrapper)


def find_function(place: str) -> tuple[Any, str, Callable[..., Any]]:
    """Return the object that holds a function, the function's name there, and the function."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)


def _wrapped(function: Callable[..., Any], spans: Spans, target: Target) -> Callable[..., Any]:
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            values, done = function(*args, **kwargs), object()
            try:
                while True:
                    with spans.span(target.span, atomic=target.atomic):
                        value = next(values, done)
                    if value is done:
                        return
                    yield value
            finally:
                values.close()

        return generate

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with spans.span(target.span, atomic=target.atomic):
            return function(*args, **kwargs)

    return wrapper
