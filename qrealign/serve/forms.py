"""Pieces of answers in the two forms of OpenAI's protocol: completions and chat, whole or as parts of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel

from qrealign.serve.jobs import Finish, Piece, TokenScore
from qrealign.serve.replies import (
    Alternative,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatToken,
    Completion,
    Delta,
    TextChoice,
    TextLogprobs,
    Turn,
    Usage,
)
from qrealign.serve.text import UNFINISHED

TokenText = Callable[[int], str]


@dataclass
class Whole:
    """One answer put together."""

    text: str = ""
    tokens: list[TokenScore] = field(default_factory=list)
    finish: Finish = "stop"

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        if piece.finish is not None:
            self.finish = piece.finish


class Form(Protocol):
    """How answers are written."""

    def whole(self, answers: Sequence[Whole], usage: Usage) -> BaseModel:
        """Return the body of a response that is no stream."""
        ...

    def opening(self, count: int) -> Iterable[BaseModel]:
        """Return what a stream of `count` answers begins with."""
        ...

    def part(self, index: int, piece: Piece) -> BaseModel:
        """Return a part of a stream."""
        ...

    def usage(self, usage: Usage) -> BaseModel:
        """Return the part of a stream that tells the usage."""
        ...


class _Form:
    def __init__(self, model: str, token_text: TokenText, *, logprobs: bool) -> None:
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._token_text = token_text
        self._logprobs = logprobs

    prefix = ""


class TextForm(_Form):
    """Completions.

    Args:
        model: the served name.
        token_text: id -> text.
        logprobs: whether they are asked for.
    """

    prefix = "cmpl"

    def whole(self, answers: Sequence[Whole], usage: Usage) -> Completion:
        """Return the body of a response that is no stream."""
        choices = [self._choice(i, one.text, one.tokens, one.finish) for i, one in enumerate(answers)]
        return Completion(**self._head, choices=choices, usage=usage)

    def opening(self, count: int) -> Iterable[Completion]:
        """Return nothing: a stream of text begins with text."""
        return ()

    def part(self, index: int, piece: Piece) -> Completion:
        """Return a part of a stream."""
        choice = self._choice(index, piece.text, piece.tokens, piece.finish)
        return Completion(**self._head, choices=[choice], usage=None)

    def usage(self, usage: Usage) -> Completion:
        """Return the part of a stream that tells the usage."""
        return Completion(**self._head, choices=[], usage=usage)

    def _choice(self, index: int, text: str, tokens: Sequence[TokenScore], finish: Finish | None) -> TextChoice:
        logprobs = self._text_logprobs(tokens) if self._logprobs else None
        return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)

    def _text_logprobs(self, tokens: Sequence[TokenScore]) -> TextLogprobs:
        top: list[dict[str, float]] = []
        for token in tokens:
            named: dict[str, float] = {}
            for token_id, logprob in token.top:
                named.setdefault(self._token_text(token_id), logprob)  # parts of characters share one text
            top.append(named)
        return TextLogprobs(
            tokens=[self._token_text(token.token_id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=top if any(top) else None,
            text_offset=[token.offset for token in tokens],
        )


class ChatForm(_Form):
    """Chat; arguments as in `TextForm`."""

    prefix = "chatcmpl"

    def whole(self, answers: Sequence[Whole], usage: Usage) -> ChatCompletion:
        """Return the body of a response that is no stream."""
        choices = [
            ChatChoice(
                index=index,
                message=Turn(content=one.text),
                logprobs=self._chat_logprobs(one.tokens),
                finish_reason=one.finish,
            )
            for index, one in enumerate(answers)
        ]
        return ChatCompletion(**self._head, choices=choices, usage=usage)

    def opening(self, count: int) -> Iterable[ChatChunk]:
        """Return the parts that name the role of each turn."""
        return [self._chunk(index, Delta(role="assistant", content=""), (), None) for index in range(count)]

    def part(self, index: int, piece: Piece) -> ChatChunk:
        """Return a part of a stream."""
        return self._chunk(index, Delta(content=piece.text or None), piece.tokens, piece.finish)

    def usage(self, usage: Usage) -> ChatChunk:
        """Return the part of a stream that tells the usage."""
        return ChatChunk(**self._head, choices=[], usage=usage)

    def _chunk(self, index: int, delta: Delta, tokens: Sequence[TokenScore], finish: Finish | None) -> ChatChunk:
        logprobs = self._chat_logprobs(tokens) if tokens else None
        choice = ChatDelta(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**self._head, choices=[choice], usage=None)

    def _chat_logprobs(self, tokens: Sequence[TokenScore]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs(
            content=[
                ChatToken(
                    **self._alternative(token.token_id, token.logprob).model_dump(),
                    top_logprobs=[self._alternative(*pair) for pair in token.top],
                )
                for token in tokens
            ]
        )

    def _alternative(self, token_id: int, logprob: float) -> Alternative:
        text = self._token_text(token_id)
        return Alternative(token=text, logprob=logprob, bytes=None if UNFINISHED in text else list(text.encode()))
