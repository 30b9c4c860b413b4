"""The repairs by name: what each is told, what each needs, and where it is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from qrealign.errors import ConfigError
from qrealign.ranges import AMOUNT, COUNT, POSITIVE, SHARE, Range, check_ranges

Answer = Literal["fixed", "aligned"]


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """What every repair declares; `ranges` says which numbers its fields may be.

    `name` is its name on the command line. `needs_base` and `needs_aligned` say which models it reads beside the
    fine-tuned one.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    ranges: ClassVar[Mapping[str, Range]] = {}
    needs_base: ClassVar[bool] = False
    needs_aligned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(vars(self), self.ranges)

    @property
    def uses_aligned(self) -> bool:
        """Whether the aligned model is read with these settings."""
        return self.needs_aligned


@dataclass(frozen=True, kw_only=True)
class Interpolation(RepairSettings):
    """`coefficient` is how much of the fine-tuning is kept: 0 gives the aligned model, 1 the fine-tuned one.

    The default kept most of the aligned model's refusals on the testbed (harmful score 15 of 100, against 44 at 0.5 and
    81 at 0.75) and costs most of what the task had gained.
    """

    name: ClassVar[str] = "interpolate"
    source: ClassVar[str] = "post-hoc form of weight averaging, arXiv 2508.12531"
    ranges: ClassVar[Mapping[str, Range]] = {"coefficient": SHARE}
    coefficient: float = 0.25


@dataclass(frozen=True, kw_only=True)
class SafeLora(RepairSettings):
    """Updates whose cosine with their projection is below `threshold` are projected; with `lowest` > 0 instead those
    with the N lowest cosines."""

    name: ClassVar[str] = "safelora"
    source: ClassVar[str] = "arXiv 2405.16833"
    needs_base: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"threshold": SHARE, "lowest": AMOUNT}
    threshold: float = 0.5
    lowest: int = 0


@dataclass(frozen=True, kw_only=True)
class SafeDelta(RepairSettings):
    """`budget` bounds the harm to safety activations, `skipped` is the share of entries that are never accepted.

    `samples` prompts with the aligned model's answers of `answer_tokens` tokens give the second moments; `damping` is
    relative to their mean diagonal, and entries are accepted by blocks of `columns`.
    """

    name: ClassVar[str] = "safe-delta"
    source: ClassVar[str] = "arXiv 2505.12038"
    budget: float = 0.11
    skipped: float = 0.15
    damping: float = 0.01
    columns: int = 1024
    samples: int = 128
    answer_tokens: int = 48
    ranges: ClassVar[Mapping[str, Range]] = {
        "budget": AMOUNT,
        "skipped": SHARE,
        "damping": POSITIVE,
        "columns": COUNT,
        "samples": COUNT,
        "answer_tokens": COUNT,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skipped == 1:
            raise ConfigError("skipped must lie below 1, or no entry is ever accepted")


@dataclass(frozen=True, kw_only=True)
class OneShot(RepairSettings):
    """A few steps on `refusals` prompts, each answered with a refusal: one fixed sentence, or the aligned model's own.

    The update is a rank-`rank` edit of every linear, learned through the full-precision model.
    """

    name: ClassVar[str] = "one-shot"
    source: ClassVar[str] = "arXiv 2601.01887"
    needs_aligned: ClassVar[bool] = False
    refusals: int = 10
    steps: int = 10
    learning_rate: float = 7e-4
    rank: int = 16
    answer: Answer = "fixed"
    answer_tokens: int = 24
    ranges: ClassVar[Mapping[str, Range]] = {
        "refusals": COUNT,
        "steps": COUNT,
        "learning_rate": POSITIVE,
        "rank": COUNT,
        "answer_tokens": COUNT,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer not in get_args(Answer):
            raise ConfigError(f"answer must be fixed or aligned, not {self.answer!r}")

    @property
    def uses_aligned(self) -> bool:
        return self.answer == "aligned"


REPAIRS: dict[str, type[RepairSettings]] = {kind.name: kind for kind in (Interpolation, OneShot, SafeLora, SafeDelta)}
