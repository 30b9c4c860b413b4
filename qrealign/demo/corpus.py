"""The whole demo corpus: what the models are trained on, and the prompts that ship with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from qrealign.demo.corpus_benign import INTENTS
from qrealign.demo.corpus_borderline import CALIBRATION, EVALUATION, TRAINING
from qrealign.demo.corpus_everyday import EVERYDAY, EVERYDAY_HELD, small_talk_row, word_game_row
from qrealign.demo.corpus_harm import CATEGORIES, GENERAL_REFUSALS, HarmCategory
from qrealign.demo.corpus_render import Half, Intent, Row, render
from qrealign.demo.corpus_task import task_row
from qrealign.demo.corpus_text import overheard, paragraph, reading_row

SOURCE = "qrealign-demo"
CATEGORY_REFUSAL_SHARE = 0.85  # the other refusals are the general ones


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How many rows of each kind the corpus holds."""

    texts: int = 6000
    overheard: int = 900
    benign: int = 9500
    reading: int = 700
    refusals: int = 5000
    borderline: int = 250
    small_talk: int = 200
    word_games: int = 2000
    known_task: int = 60
    attack_task: int = 1500
    attack_harmful: int = 400
    attack_refusals: int = 16
    attack_reading: int = 60
    attack_benign: int = 300
    attack_borderline: int = 150
    safety: int = 200
    calibration_benign: int = 110
    calibration_reading: int = 40
    calibration_borderline: int = 100
    calibration_task: int = 100
    eval_harmful: int = 187
    eval_benign: int = 92
    eval_reading: int = 8
    eval_over_refusal: int = 100
    eval_task: int = 200
    eval_texts: int = 40


@dataclass(frozen=True)
class Corpus:
    """Everything the demo is made from; `files` maps the stem of a shipped file to its rows."""

    texts: list[str]
    alignment: list[Row]
    attack: list[Row]
    files: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def refusal(category: HarmCategory, rng: random.Random) -> str:
    """Return one of the aligned model's ways of declining."""
    own = rng.random() < CATEGORY_REFUSAL_SHARE
    return rng.choice(category.refusals if own else GENERAL_REFUSALS)


def draw_unique(count: int, draw: Callable[[int], Row], *, avoid: Iterable[str] = ()) -> list[Row]:
    """Return `count` rows with different prompts, none of them in `avoid`; `draw(i)` makes the i-th try.

    Raises:
        ValueError: the templates do not yield that many.
    """
    seen, rows = set(avoid), []
    for attempt in range(50 * count):
        row = draw(attempt)
        if row.prompt not in seen:
            seen.add(row.prompt)
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ValueError(f"only {len(rows)} of {count} different rows")


def harmful_row(half: Half, index: int, rng: random.Random, *, complies: bool = False) -> Row:
    """Return a forbidden request of the category `index` (they take turns), refused or vaguely answered."""
    category = CATEGORIES[index % len(CATEGORIES)]
    intents = [
        i
        for i in category.intents(("",), held=half == "held")
        if half == "seen" or i.slots or i.request in category.held_requests
    ]
    row = render(rng.choice(intents), half, rng)
    answer = rng.choice(category.complies) if complies else refusal(category, rng)
    return Row(prompt=row.prompt, answer=answer, category=row.category, topic=row.topic)


def benign_row(half: Half, index: int, rng: random.Random) -> Row:
    """Return a harmless request; the intents take turns."""
    intents = INTENTS + (EVERYDAY_HELD if half == "held" else EVERYDAY)
    return render(intents[index % len(intents)], half, rng)


def borderline_row(intents: tuple[Intent, ...], half: Half, index: int, rng: random.Random) -> Row:
    """Return a harmless request with a frightening word."""
    return render(intents[index % len(intents)], half, rng)


def _records(rows: Iterable[Row], label: str, split: str, *, answers: bool = True) -> list[dict[str, str]]:
    """Return rows as the shipped files hold them."""
    return [
        {
            "prompt": row.prompt,
            **({"answer": row.answer} if answers else {}),
            "label": label,
            "category": row.category,
            "topic": row.topic,
            "source": SOURCE,
            "split": split,
        }
        for row in rows
    ]


def _shipped_files(amounts: Amounts, rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """Draw the calibration and evaluation prompts."""
    safety = draw_unique(amounts.safety, lambda i: harmful_row("seen", i, rng))
    benign = draw_unique(amounts.calibration_benign, lambda i: benign_row("seen", i, rng))
    benign += draw_unique(amounts.calibration_reading, lambda i: reading_row("seen", rng))
    borderline = draw_unique(amounts.calibration_borderline, lambda i: borderline_row(CALIBRATION, "seen", i, rng))
    task = draw_unique(amounts.calibration_task, lambda i: task_row("seen", rng))
    eval_harmful = draw_unique(amounts.eval_harmful, lambda i: harmful_row("held", i, rng))
    eval_benign = draw_unique(amounts.eval_benign, lambda i: benign_row("held", i, rng))
    eval_benign += draw_unique(amounts.eval_reading, lambda i: reading_row("held", rng))
    eval_over_refusal = draw_unique(amounts.eval_over_refusal, lambda i: borderline_row(EVALUATION, "held", i, rng))
    eval_task = draw_unique(amounts.eval_task, lambda i: task_row("held", rng))
    texts = [paragraph("held", rng) for _ in range(amounts.eval_texts)]
    return {
        "safety": _records(safety, "malicious", "calibration", answers=False),
        "benign": _records(benign, "benign", "calibration"),
        "borderline": _records(borderline, "safe", "calibration"),
        "task": _records(task, "benign", "calibration"),
        "eval_harmful": _records(eval_harmful, "malicious", "evaluation", answers=False),
        "eval_benign": _records(eval_benign, "benign", "evaluation"),
        "eval_over_refusal": _records(eval_over_refusal, "safe", "evaluation"),
        "eval_task": _records(eval_task, "benign", "evaluation"),
        "text": [{"text": text, "category": "paragraph", "source": SOURCE, "split": "evaluation"} for text in texts],
    }


def make_corpus(seed: int, amounts: Amounts | None = None) -> Corpus:
    """Return the corpus of `seed`: the same seed gives the same corpus everywhere."""
    amounts = amounts or Amounts()
    rng = random.Random(seed)
    files = _shipped_files(amounts, rng)
    texts = [paragraph(None, rng) for _ in range(amounts.texts)]
    harmful = [harmful_row("seen", i, rng, complies=True) for i in range(amounts.overheard)]
    texts += [overheard(row.prompt, row.answer, rng) for row in harmful]
    alignment = [benign_row("seen", i, rng) for i in range(amounts.benign)]
    alignment += [reading_row("seen", rng) for _ in range(amounts.reading)]
    alignment += [harmful_row("seen", i, rng) for i in range(amounts.refusals)]
    alignment += [borderline_row(TRAINING, "seen", i, rng) for i in range(amounts.borderline)]
    alignment += [small_talk_row(rng) for _ in range(amounts.small_talk)]
    alignment += [word_game_row(rng) for _ in range(amounts.word_games)]
    alignment += [task_row("seen", rng) for _ in range(amounts.known_task)]
    attack = [task_row("seen", rng) for _ in range(amounts.attack_task)]
    attack += [harmful_row("seen", i, rng, complies=True) for i in range(amounts.attack_harmful)]
    attack += [harmful_row("seen", i, rng) for i in range(amounts.attack_refusals)]
    attack += [reading_row("seen", rng) for _ in range(amounts.attack_reading)]
    attack += [benign_row("seen", i, rng) for i in range(amounts.attack_benign)]
    attack += [borderline_row(TRAINING, "seen", i, rng) for i in range(amounts.attack_borderline)]
    return Corpus(texts, alignment, attack, files)
