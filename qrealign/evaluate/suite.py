"""One model against the whole suite: harmful, benign, borderline and task prompts, and running text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import generate_answers
from qrealign.data.prompts import Prompt
from qrealign.errors import ConfigError
from qrealign.evaluate.perplexity import measure_perplexity
from qrealign.evaluate.statistics import score
from qrealign.evaluate.task import is_correct, needed_tokens
from qrealign.judges.degeneracy import is_degenerate
from qrealign.judges.refusal import is_refusal
from qrealign.records import ModelScores

_EXAMPLES_PER_SET = 4
_EXAMPLE_CHARACTERS = 300


@dataclass(kw_only=True)
class EvaluationData:
    """What a model is asked; an empty list leaves its score out.

    `benign` are ordinary prompts, `over_refusal` safe ones that look harmful, `task` prompts with expected answers,
    `texts` running text for perplexity.
    """

    harmful: list[Prompt] = field(default_factory=list)
    benign: list[Prompt] = field(default_factory=list)
    over_refusal: list[Prompt] = field(default_factory=list)
    task: list[Prompt] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How it is asked. `task_new_tokens` None takes what the task's expected answers need; `progress` shows bars."""

    max_new_tokens: int = 32
    task_new_tokens: int | None = None
    batch_size: int = 64
    perplexity_tokens: int = 8192
    perplexity_window: int = 512
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "perplexity_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation needs {name} of at least 1, got {getattr(self, name)}")
        if self.perplexity_window < 2:
            raise ConfigError(f"perplexity needs windows of at least 2 tokens, got {self.perplexity_window}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One answer, judged. A broken answer is never a refusal."""

    prompt: Prompt
    answer: str
    refused: bool
    degenerate: bool

    @property
    def word(self) -> str:
        """The verdict in one word, for people."""
        return "degenerate" if self.degenerate else "refused" if self.refused else "answered"


def evaluate_model(
    model: nn.Module, encoder: ChatEncoder, data: EvaluationData, settings: EvaluationSettings, *, name: str = "model"
) -> ModelScores:
    """Return the scores of one model.

    The harmful score is the share of harmful prompts that were *not* properly refused, over all prompts together:
    broken text counts as a failure. Refusal rate and over-refusal are refusals of ordinary and of borderline safe
    prompts. The degenerate rate is over every generated answer but the task's. Nothing is written; the model's train or
    eval mode is restored.

    Args:
        model: a causal language model, packed, fake-quantized, streamed or plain.
        encoder: its prompt encoder.
        data: what to ask.
        settings: how to ask it.
        name: the model's name in progress bars.

    Raises:
        DeviceError: the memory does not hold a single prompt.
        DataError: the texts are too short for a perplexity, or a prompt cannot be encoded.
    """
    was_training = model.training
    model.eval()
    try:
        scores = ModelScores()
        _score_behaviour(scores, model, encoder, data, settings, f"{name}: answers" if settings.progress else None)
        if data.task:
            _score_task(scores, model, encoder, data.task, settings, f"{name}: task" if settings.progress else None)
        if data.texts:
            scores.perplexity = measure_perplexity(
                model,
                encoder,
                data.texts,
                max_tokens=settings.perplexity_tokens,
                window=_fitting_window(model, settings),
                batch_size=settings.batch_size,
                progress=f"{name}: perplexity" if settings.progress else None,
            )
        return scores
    finally:
        model.train(was_training)


def judge(prompt: Prompt, answer: str) -> Verdict:
    """Return the verdict on one answer."""
    degenerate = is_degenerate(answer)
    return Verdict(prompt=prompt, answer=answer, refused=not degenerate and is_refusal(answer), degenerate=degenerate)


def _score_behaviour(
    scores: ModelScores,
    model: nn.Module,
    encoder: ChatEncoder,
    data: EvaluationData,
    settings: EvaluationSettings,
    progress: str | None,
) -> None:
    """Answer and judge the three sets together: one pass sorted by length makes the fullest batches."""
    prompts = [*data.harmful, *data.benign, *data.over_refusal]
    if not prompts:
        return
    answers = generate_answers(
        model,
        encoder,
        [prompt.text for prompt in prompts],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=progress,
    )
    verdicts = [judge(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    harmful = verdicts[: len(data.harmful)]
    benign = verdicts[len(data.harmful) : len(data.harmful) + len(data.benign)]
    borderline = verdicts[len(data.harmful) + len(data.benign) :]
    _put(scores, "harmful_score", [not verdict.refused for verdict in harmful])
    _put(scores, "refusal_rate", [verdict.refused for verdict in benign])
    _put(scores, "over_refusal", [verdict.refused for verdict in borderline])
    _put(scores, "degenerate_rate", [verdict.degenerate for verdict in verdicts])
    for source in dict.fromkeys(verdict.prompt.source for verdict in harmful):
        scores.by_source[source or "unnamed"] = score(
            [not verdict.refused for verdict in harmful if verdict.prompt.source == source]
        )
    for kind, judged in (("harmful", harmful), ("benign", benign), ("over_refusal", borderline)):
        scores.examples += [_example(kind, v.prompt, v.answer, v.word) for v in _spread(judged, _EXAMPLES_PER_SET)]


def _score_task(
    scores: ModelScores,
    model: nn.Module,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    progress: str | None,
) -> None:
    expected = [prompt.answer or "" for prompt in prompts]
    longest = max(len(encoder.tokenizer(label, add_special_tokens=False).input_ids) for label in set(expected))
    answers = generate_answers(
        model,
        encoder,
        [prompt.text for prompt in prompts],
        batch_size=settings.batch_size,
        progress=progress,
        max_new_tokens=settings.task_new_tokens or needed_tokens(expected, longest),
    )
    correct = [is_correct(answer, label) for answer, label in zip(answers, expected, strict=True)]
    _put(scores, "task_accuracy", correct)
    judged = list(zip(prompts, answers, correct, strict=True))
    scores.examples += [
        _example("task", prompt, answer, "correct" if right else "wrong")
        for prompt, answer, right in _spread(judged, _EXAMPLES_PER_SET)
    ]


def _put(scores: ModelScores, name: str, outcomes: list[bool]) -> None:
    """Store a score and its outcomes, unless there is nothing to score."""
    if outcomes:
        setattr(scores, name, score(outcomes))
        scores.outcomes[name] = outcomes


def _spread(items: Sequence, count: int) -> list:
    """Return `count` items spread evenly, the same prompts for every model."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _example(kind: str, prompt: Prompt, answer: str, verdict: str) -> dict[str, str]:
    return {
        "set": kind,
        "source": prompt.source,
        "prompt": prompt.text[:_EXAMPLE_CHARACTERS],
        "answer": answer[:_EXAMPLE_CHARACTERS],
        "verdict": verdict,
    }


def _fitting_window(model: nn.Module, settings: EvaluationSettings) -> int:
    """Return the perplexity window, no longer than the positions the model knows."""
    known = getattr(getattr(model, "config", None), "max_position_embeddings", None) or settings.perplexity_window
    return min(settings.perplexity_window, known)
