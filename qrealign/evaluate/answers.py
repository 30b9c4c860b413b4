"""Asks a model everything that it answers in words, and keeps what it said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import Sampling, generate_ids
from qrealign.data.prompts import Prompt
from qrealign.evaluate.book import AnswerBook, key_of
from qrealign.evaluate.plan import BEHAVIOURS, EvaluationData, EvaluationSettings
from qrealign.evaluate.prefill import opening_of
from qrealign.evaluate.task import needed_tokens


@dataclass(kw_only=True)
class Answers:
    """What a model said: suite -> one list of answers per seed, in prompt order.

    `begun` holds the beginnings that prefill answers were given, as text; those answers are the continuations alone.
    """

    by_suite: dict[str, list[list[str]]] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One sequence of ids that the model goes on from; its last `len(begun)` ids are an answer's beginning."""

    text: str
    ids: tuple[int, ...]
    begun: tuple[int, ...] = ()


def collect_answers(
    model: nn.Module,
    encoder: ChatEncoder,
    data: EvaluationData,
    settings: EvaluationSettings,
    book: AnswerBook,
    *,
    name: str = "model",
) -> Answers:
    """Ask every prompt of `data` once per seed; what `book` knows is not asked again.

    The suites of behaviour go through together: one pass sorted by length makes the fullest batches. The task's prompts
    follow, because their answers are shorter or longer.

    Raises:
        DeviceError: the memory does not hold a single prompt.
        DataError: a prompt cannot be encoded.
    """
    questions = {suite: _plain(encoder, getattr(data, suite)) for suite in BEHAVIOURS if getattr(data, suite)}
    if data.prefill:
        questions["prefill"] = _begun(encoder, data.prefill, settings.prefill_tokens)
    answers = Answers(begun=[encoder.decode(question.begun) for question in questions.get("prefill", [])])
    task = _plain(encoder, data.task)
    for number, sampling in enumerate(settings.samplings()):
        label = name if sampling is None else f"{name}, seed {number}"
        flat = [question for suite in questions.values() for question in suite]
        said = iter(_ask(model, encoder, flat, settings.max_new_tokens, sampling, settings, book, f"{label}: answers"))
        for suite, asked in questions.items():
            answers.by_suite.setdefault(suite, []).append([next(said) for _ in asked])
        if task:
            length = settings.task_new_tokens or _task_tokens(encoder, data.task)
            said_task = _ask(model, encoder, task, length, sampling, settings, book, f"{label}: task")
            answers.by_suite.setdefault("task", []).append(said_task)
    return answers


def _plain(encoder: ChatEncoder, prompts: Sequence[Prompt]) -> list[_Question]:
    texts = [prompt.text for prompt in prompts]
    return [_Question(text=text, ids=tuple(ids)) for text, ids in zip(texts, encoder.encode_many(texts), strict=True)]


def _begun(encoder: ChatEncoder, prompts: Sequence[Prompt], most: int) -> list[_Question]:
    """Return prompts with the first `most` tokens of their answers; a prompt that leaves these no room is cut."""
    openings = [opening_of(prompt) for prompt in prompts]
    encoded = encoder.encode_many([prompt.text for prompt in prompts], openings, answer_tokens=most)
    return [
        _Question(text=prompt.text, ids=tuple(ids), begun=tuple(encoder.answer_ids(opening, most)))
        for prompt, ids, opening in zip(prompts, encoded, openings, strict=True)
    ]


def _ask(
    model: nn.Module,
    encoder: ChatEncoder,
    questions: Sequence[_Question],
    max_new_tokens: int,
    sampling: Sampling | None,
    settings: EvaluationSettings,
    book: AnswerBook,
    label: str,
) -> list[str]:
    """Return the answers, from the book where it has them; the book is saved while the model answers."""
    keys = [key_of(question.ids, max_new_tokens, sampling) for question in questions]
    known = [book.get("answers", key) for key in keys]
    open_ones = {
        question.ids: (key, question)
        for question, key, value in zip(questions, keys, known, strict=True)
        if value is None
    }
    told: dict[str, str] = {}

    def keep(batch: Sequence[tuple[int, ...]], continued: Sequence[list[int]]) -> None:
        for ids, new in zip(batch, continued, strict=True):
            key, question = open_ones[ids]
            told[key] = encoder.decode_behind(question.begun, new) if question.begun else encoder.decode(new)
            book.put("answers", key, told[key], question.text)
        book.save()

    if open_ones:
        generate_ids(
            model,
            encoder,
            list(open_ones),
            max_new_tokens=max_new_tokens,
            batch_size=settings.batch_size,
            progress=label if settings.progress else None,
            sampling=sampling,
            on_batch=keep,
        )
        book.save(now=True)
    return [told[key] if value is None else value for key, value in zip(keys, known, strict=True)]


def _task_tokens(encoder: ChatEncoder, prompts: Sequence[Prompt]) -> int:
    """Return how long the task's answers may get."""
    expected = [prompt.answer or "" for prompt in prompts]
    longest = max(len(encoder.tokenizer(label, add_special_tokens=False).input_ids) for label in set(expected))
    return needed_tokens(expected, longest)
