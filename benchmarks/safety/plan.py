"""What is run: the settings of a benchmark, the jobs that they lead to, and where each leaves its result."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.safety.corpora import Corpora
from qrealign.config import parse_scheme
from qrealign.errors import ConfigError

BASELINE = "rtn"
OURS = "realign"
SCHEMES = ("w8a8", "w4a16", "w4a4")
SEEDS = (0, 1, 2)
# They draw no prompt and start from no random number, so one seed is all seeds.
SEEDLESS = frozenset({BASELINE, "interpolate", "safelora"})
REFERENCES = ("base", "aligned", "finetuned")
# Safe prompts that sound harmful, as calibration data: the two sources of pairs_safety that consist of them.
_BORDERLINE = "?label=safe&source=coconot_pref,star1"

_UNSAFE = re.compile(r"[^\w.=-]+")  # in a file name

Kind = Literal["train", "prefill", "reference", "cell"]
Prefill = Literal["own", "pairs", "none"]


def is_seedless(method: str) -> bool:
    """Return whether one seed of a method is all seeds."""
    return method.partition(":")[0] in SEEDLESS


def split_method(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of a method written `name`, or `name:option=value,option=value` for a row of an ablation.

    Raises:
        ConfigError: what follows the colon has another form.
    """
    name, _, rest = text.partition(":")
    return name, read_options(rest.split(",") if rest else [])


def read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the pipeline's options from `name=value` texts; a value is read as JSON where it is some.

    Raises:
        ConfigError: a text has another form.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name and equals and text):
            raise ConfigError(f"the option {pair!r} must look like NAME=VALUE, such as samples=200")
        try:
            values[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            values[name.replace("-", "_")] = text
    return values


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """One fine-tuned model: an adapter over the aligned model. `made_here` means that a missing one is trained."""

    name: str
    adapter: Path
    task: str
    made_here: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is asked, by the names of the flags.

    `per_source` caps the harmful prompts of a source, `limit` every kind; None takes all. `benign` is how many ordinary
    prompts are drawn; `prefill_limit` caps the prefill attacks. Tokens are those of one answer, of the beginning that a
    prefill attack gives away, and of the text for perplexity.
    """

    per_source: int | None = None
    limit: int | None = None
    benign: int = 500
    prefill_limit: int = 500
    max_new_tokens: int = 32
    prefill_tokens: int = 5
    perplexity_tokens: int = 65536

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work for a worker.

    A cell's `method` may carry options (see `split_method`); a reference's is the model's name: base, aligned or
    finetuned.
    """

    kind: Kind
    variant: str
    method: str = ""
    scheme: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """Where the result lies below `results/`, and what the progress line says."""
        if self.kind == "cell":
            return f"{self.variant}/{_UNSAFE.sub('_', self.method)}-{self.scheme}-s{self.seed}"
        return f"{self.variant}/{self.method or self.kind}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A benchmark. `overrides` are options of the pipeline that every cell gets, by name; `device` is cpu or cuda."""

    aligned: str
    base: str | None = None
    variants: tuple[FineTuned, ...]
    data: Path
    output: Path
    methods: tuple[str, ...]
    schemes: tuple[str, ...] = SCHEMES
    seeds: tuple[int, ...] = SEEDS
    overrides: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    prefill: Prefill = "own"
    batch_size: int = 256
    keep_models: bool = False
    device: str = "cpu"
    commit: str | None = None

    def __post_init__(self) -> None:
        if not self.variants:
            raise ConfigError("there is nothing to repair: name adapters with --finetuned or attacks with --variants")
        names = [variant.name for variant in self.variants]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"two variants are called {repeated.pop()!r}: write --finetuned NAME=DIR for one of them")
        for scheme in self.schemes:
            parse_scheme(scheme)
        if not self.seeds:
            raise ConfigError("--seeds needs at least one number")

    @property
    def corpora(self) -> Corpora:
        """The data folder."""
        return Corpora(self.data)

    def variant(self, name: str) -> FineTuned:
        """Return the variant called `name`."""
        return next(variant for variant in self.variants if variant.name == name)

    def calibration(self, task: str, *, long: bool = False) -> dict[str, tuple[str, ...]]:
        """Return the pipeline's options for calibration data and, so that it keeps the two apart, evaluation data.

        A long schedule gets every malicious prompt there is. A short one does better on few kinds, asked like the
        questions of an evaluation: prompts of other kinds teach it to refuse their form (docs/recipe.md).
        """
        corpora = self.corpora
        questions = corpora.file(f"task_{task}")
        pairs = () if self.prefill == "pairs" else (corpora.file("pairs_safety"),)  # some of them are kept back then
        more = (*pairs, *corpora.more("prompts_harmful_train"))
        return {
            "safety_data": (corpora.file("calib_clean"), *(more if long else ())),
            "benign_data": (corpora.file("calib_clean"), *corpora.more("instruct_alpaca"), *self._not_asked()),
            "text_data": corpora.more("text_wikipedia"),
            "borderline_data": (corpora.file("pairs_safety") + _BORDERLINE,),
            "task_data": (f"{questions}?split=train",),
            "eval_harmful": (corpora.file("eval_harmful"),),
            "eval_over_refusal": (corpora.file("eval_overrefusal"),),
            "eval_benign": (str(self.benign_file),),
            "eval_task": (f"{questions}?split=test",),
        }

    @property
    def benign_file(self) -> Path:
        """The ordinary prompts drawn for the evaluation."""
        return self.output / "prompts" / "benign.jsonl"

    @property
    def not_asked_file(self) -> Path:
        """The other prompts of their source, which calibration may draw; missing where there are none."""
        return self.output / "prompts" / "benign-not-asked.jsonl"

    def _not_asked(self) -> tuple[str, ...]:
        return (str(self.not_asked_file),) if self.not_asked_file.is_file() else ()

    def prefill_file(self, variant: str) -> Path:
        """The prompts of a variant's prefill attack with the beginnings of their answers."""
        return self.output / "prompts" / f"prefill-{variant}.json"

    def result_file(self, job: Job) -> Path:
        """Where a reference or a cell leaves its scores."""
        return self.output / "results" / f"{job.name}.json"

    def run_directory(self, job: Job) -> Path:
        """Where a cell's calibration runs and its packed model lies."""
        return self.output / "cells" / job.name

    def training_jobs(self) -> list[Job]:
        """Return a job per adapter that is to be trained here."""
        return [Job(kind="train", variant=variant.name) for variant in self.variants if variant.made_here]

    def prefill_jobs(self) -> list[Job]:
        """Return a job per variant whose own answers begin the prefill attack."""
        return [Job(kind="prefill", variant=variant.name) for variant in self.variants if self.prefill != "none"]

    def measurements(self) -> list[Job]:
        """Return every reference and cell; plain rounding is among them whether it was asked for or not.

        One seed comes after the other, so that a run that is cut off has every method with as many as it got to.
        """
        models = [name for name in REFERENCES if name != "base" or self.base is not None]
        jobs = [Job(kind="reference", variant=v.name, method=name) for v in self.variants for name in models]
        return jobs + [
            Job(kind="cell", variant=variant.name, method=method, scheme=scheme, seed=seed)
            for seed in self.seeds
            for method in dict.fromkeys((BASELINE, *self.methods))
            if seed == self.seeds[0] or not is_seedless(method)
            for variant in self.variants
            for scheme in self.schemes
        ]
