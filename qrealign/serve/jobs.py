"""What the server generates: one job per answer, and the pieces in which its text comes back."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qrealign.serve.sampling import Choice, SamplingSettings
from qrealign.serve.text import Decode, StopFinder, TextStream

Finish = Literal["stop", "length"]


class Failure(enum.Enum):
    """Why a job ended without an answer."""

    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"
    STOPPED = "the server is shutting down"
    BROKEN = "the model failed"


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """A token of an answer, its log-probability, the likeliest alternatives, and where in the text it begins."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The next part of an answer; the last one carries `finish` or `failure`.

    Attributes:
        text: whole characters, possibly none.
        tokens: those that the text came from, where they were asked for.
        finish: "stop" (the model's end or a stop string) or "length".
        failure: why no more comes.
    """

    text: str = ""
    tokens: tuple[TokenScore, ...] = ()
    finish: Finish | None = None
    failure: Failure | None = None

    @property
    def last(self) -> bool:
        """Whether the answer ends here."""
        return self.finish is not None or self.failure is not None


class Answer:
    """The text of one answer as it grows: characters made whole, stop strings found, log-probabilities kept in step.

    Args:
        decode: ids -> text.
        stops: strings that end the answer.
        behind: ids that the text continues.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], behind: Sequence[int] = ()) -> None:
        self._stream = TextStream(decode, behind)
        self._finder = StopFinder(stops)
        self._decoded = 0  # characters that came out of the stream
        self._shown = 0  # characters that were passed on
        self._waiting: list[TokenScore] = []  # tokens whose text was not passed on yet

    def push(self, choice: Choice) -> tuple[Piece, bool]:
        """Take a token; return what may be shown, and whether a stop string ended the answer."""
        if choice.logprob is not None:
            self._waiting.append(
                TokenScore(token_id=choice.token_id, logprob=choice.logprob, top=choice.top, offset=self._decoded)
            )
        new = self._stream.push(choice.token_id)
        self._decoded += len(new)
        text, stopped = self._finder.push(new)
        return self._piece(text), stopped

    def finish(self) -> Piece:
        """Return what was held back."""
        new = self._stream.flush()
        self._decoded += len(new)
        text, stopped = self._finder.push(new)
        piece = self._piece(text if stopped else text + self._finder.flush())
        return piece if stopped else Piece(text=piece.text, tokens=(*piece.tokens, *self._waiting))

    def _piece(self, text: str) -> Piece:
        self._shown += len(text)
        ready = [token for token in self._waiting if token.offset < self._shown]
        self._waiting = self._waiting[len(ready) :]
        return Piece(text=text, tokens=tuple(ready))


@dataclass(eq=False, kw_only=True)
class Job:
    """One answer to generate.

    Attributes:
        prompt: its ids, at least one.
        sampling: how tokens are drawn.
        answer: turns ids into text.
        listener: gets every piece, called by whoever the engine publishes through.
        deadline: on the clock of `time.monotonic`.
        generated: tokens drawn so far.
        cancelled: set by anyone; the slot is free before the next step.
    """

    prompt: Sequence[int]
    sampling: SamplingSettings
    answer: Answer
    listener: Callable[[Piece], None]
    deadline: float = float("inf")
    created: float = field(default_factory=time.monotonic)
    generated: int = 0
    cancelled: bool = False
    # What the engine keeps of it while it runs.
    read: int = 0  # tokens that its row holds
    last_token: int = 0
    last_time: float = 0.0

    def __post_init__(self) -> None:
        self.numbers = self.sampling.numbers()

    @property
    def unread(self) -> int:
        """Tokens of the prompt that were not read yet."""
        return max(len(self.prompt) - self.read, 0)
