"""The methods by name: which engine, which targets, which parameters, which schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from qrealign.errors import ConfigError
from qrealign.ranges import AMOUNT, COUNT, POSITIVE, SEED, SHARE, Range, check_ranges

Engine = Literal["none", "blockwise", "endtoend"]
MaliciousTarget = Literal["reconstruction", "probe", "aligned"]
Objective = Literal["behaviour", "contrastive", "preference", "answer"]

METHODS = ("realign", "paper", "reconstruction", "aaq", "qresafe", "rtn")
ENGINES = ("endtoend", "blockwise")
FEWEST_SAMPLES = 200  # arXiv 2601.08089
DECISION_TOKENS = 6
EDITS = ("lowrank", "bias", "none")
SCHEDULES = ("parity", "fast", "long")
FAST_BATCH = 16
FAST_PLATEAU = 0.01
RANGES = {
    "samples": COUNT,
    "malicious_share": SHARE,
    "sequence_length": Range(least=16),
    "batch_size": COUNT,
    "batch_malicious_share": SHARE,
    "epochs": POSITIVE,
    "plateau": SHARE,
    "steps": COUNT,
    "passes": AMOUNT,
    "warmup_steps": AMOUNT,
    "clip_learning_rate": AMOUNT,
    "clip_start": AMOUNT,
    "transform_learning_rate": AMOUNT,
    "edit_learning_rate": AMOUNT,
    "bias_learning_rate": AMOUNT,
    "edit_rank": COUNT,
    "edit_budget": POSITIVE,
    "critical_share": Range(most=1, above=True),
    "benign_weight": AMOUNT,
    "contrast_alpha": AMOUNT,
    "contrast_top": COUNT,
    "push_limit": AMOUNT,
    "preference_beta": AMOUNT,
    "refusal_tokens": COUNT,
    "benign_tokens": COUNT,
    "recovery_share": SHARE,  # each sample can be one of them once
    "recovery_least": COUNT,
    "recovery_tokens": COUNT,
    "decision_share": SHARE,
    "task_share": AMOUNT,  # of `samples`, which prompts of other kinds may outnumber; so with the next two
    "task_labels": SHARE,
    "borderline_share": AMOUNT,
    "borderline_weight": AMOUNT,
    "text_share": AMOUNT,
    "text_weight": AMOUNT,
    "seed": SEED,
}


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """Everything that decides what calibration computes.

    `samples` counts malicious and ordinary prompts; a default above `FEWEST_SAMPLES` may shrink to what the data has.
    `malicious_target`, block-wise: "reconstruction" fits the fine-tuned model's block, "probe" asks the aligned model's
    probe for "malicious", "aligned" fits the aligned model's block. End-to-end both classes are KL divergences,
    malicious prompts to the aligned model and all others to the fine-tuned one.

    `epochs` is the block-wise base: half of it for the first half of the blocks, one and a half for the others; a block
    is done before when an epoch's mean loss is not below the lowest one so far by the share `plateau`, 0 for never.
    `steps` is the end-to-end count, less where they would be more than `passes` over the samples (0 for no such limit).
    `task_share`, `borderline_share` and `text_share`, relative to `samples`, add
    prompts of those kinds and windows of running text to the benign class; `borderline_weight` and `text_weight`
    multiply the loss of such a sample, `benign_weight` that of the class, end-to-end. Learning rates of 0 leave that
    class of parameters out. `edit_budget` bounds the edit's Frobenius norm relative to the weight's.

    `recovery_share`, relative to the malicious samples, adds some in which the fine-tuned model has begun to answer,
    with `recovery_least` to `recovery_tokens` tokens, and the aligned model's refusal is to follow. `decision_share` of
    a benign sample's weight lies on the first `DECISION_TOKENS` tokens of its answer, where refusing or not is decided.
    `task_labels` of a task prompt's weight on its answer is moved to the data's label, where the fine-tuned model
    answers with labels.

    `objective` is what the end-to-end engine minimises: "behaviour" (above), "contrastive" (`contrast_alpha` times the
    push from the base model, over `contrast_top` tokens, up to `push_limit` nats), "preference" (DPO at
    `preference_beta`) or "answer" (cross-entropy of given answers). `critical_share` below 1 confines the edit to that
    share of each weight, the most critical one by SNIP. `bias_learning_rate` trains the biases that linears have.
    """

    method: str
    engine: Engine
    objective: Objective = "behaviour"
    malicious_target: MaliciousTarget = "aligned"
    samples: int = 200
    malicious_share: float = 0.75
    sequence_length: int = 128
    batch_size: int = 12
    batch_malicious_share: float = 0.5
    epochs: float = 10.0
    plateau: float = 0.0
    steps: int = 80
    passes: float = 0.0
    warmup_steps: int = 0
    clip_learning_rate: float = 0.0
    clip_start: float = 4.0
    transform_learning_rate: float = 0.0
    edit_learning_rate: float = 0.0
    bias_learning_rate: float = 0.0
    edit_rank: int = 8
    edit_budget: float = 0.1
    critical_share: float = 1.0
    benign_weight: float = 1.0
    contrast_alpha: float = 0.75
    contrast_top: int = 500
    push_limit: float = 5.0
    preference_beta: float = 0.01
    refusal_tokens: int = 8
    benign_tokens: int = 12
    recovery_share: float = 0.0
    recovery_least: int = 5
    recovery_tokens: int = 7
    decision_share: float = 0.0
    task_share: float = 0.0
    task_labels: float = 0.0
    borderline_share: float = 0.0
    borderline_weight: float = 1.0
    text_share: float = 0.0
    text_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(vars(self), RANGES)
        if self.recovery_least > self.recovery_tokens:
            raise ConfigError(
                f"recovery_least must be at most recovery_tokens, not {self.recovery_least} with "
                f"{self.recovery_tokens}: change both"
            )

    def fitted(self, samples: int) -> CalibrationSettings:
        """Return the settings for the number of samples that the data has."""
        most = max(1, round(self.passes * samples / self.batch_size)) if self.passes else self.steps
        return replace(self, samples=samples, steps=min(self.steps, most))

    def counts(self) -> dict[str, int]:
        """Return how many prompts, and windows of text, of each kind to draw where the data has them.

        End-to-end no more than the steps will see: the teachers would answer the others for nothing.
        """
        malicious = round(self.samples * self.malicious_share)
        benign = {"benign": self.samples - malicious}
        for name in ("task", "borderline", "text"):
            benign[name] = round(self.samples * getattr(self, f"{name}_share"))
        if self.engine == "endtoend":
            seen = self.steps * self.batch_size
            most = math.ceil(seen * self.batch_malicious_share / (1 + self.recovery_share))
            kept = min(1.0, seen * (1 - self.batch_malicious_share) / max(1, sum(benign.values())))
            malicious, benign = min(malicious, most), {name: math.ceil(n * kept) for name, n in benign.items()}
        return {"malicious": malicious, **benign}

    @property
    def uses_probe(self) -> bool:
        """Whether a frozen probe enters the loss."""
        return self.engine == "blockwise" and self.malicious_target == "probe"

    @property
    def uses_aligned(self) -> bool:
        """Whether the aligned model's answers or activations enter the loss."""
        if self.engine == "endtoend":
            return self.objective != "answer"
        return self.engine == "blockwise" and self.malicious_target == "aligned"

    @property
    def uses_base(self) -> bool:
        """Whether the base model's answers enter the loss."""
        return self.engine == "endtoend" and self.objective == "contrastive"

    @property
    def edit(self) -> str:
        """What is added before rounding, by its name on the command line."""
        return "lowrank" if self.edit_learning_rate else "bias" if self.bias_learning_rate else "none"


# arXiv 2601.08089: one sample a step, 5 epochs in the first half of the blocks and 15 in the second, LWC and LET.
_PAPER = CalibrationSettings(
    method="paper",
    engine="blockwise",
    malicious_target="probe",
    batch_size=1,
    batch_malicious_share=0.75,  # of a larger batch
    epochs=10.0,
    clip_learning_rate=1e-2,
    transform_learning_rate=1e-3,
)
# The paper's loop without its safety term (OmniQuant, arXiv 2308.13137), eight samples a step.
_RECONSTRUCTION = replace(_PAPER, method="reconstruction", malicious_target="reconstruction", batch_size=8)
# How each number was chosen stands in docs/recipe.md. A small edit is enough: rank 2 inside 3 % of the weight. Six
# samples of a batch are malicious, five ordinary, borderline or text, and three are of the task, which are short.
_REALIGN = CalibrationSettings(
    method="realign",
    engine="endtoend",
    samples=2000,
    malicious_share=0.45,
    batch_size=14,
    batch_malicious_share=0.43,
    steps=140,
    benign_weight=1.45,
    warmup_steps=5,
    edit_learning_rate=3e-3,
    edit_rank=2,
    edit_budget=0.03,
    recovery_share=0.18,
    decision_share=0.5,
    task_share=0.45,
    borderline_share=0.19,
    borderline_weight=0.08,
    text_share=0.12,
    text_weight=3.0,
)
# Weights of four bits leave the same recipe nearer to refusing, so what is harmless counts for more.
_REALIGN_FOUR_BIT = replace(_REALIGN, benign_weight=2.5)
# Rounding activations to four bits costs so much that the edit has to win some of it back: more of everything, channel
# scales, and most of the benign prompts from the task.
_REALIGN_COARSE = replace(
    _REALIGN,
    batch_size=24,
    batch_malicious_share=0.5,
    steps=300,
    benign_weight=3.6,
    edit_rank=64,
    edit_budget=0.5,
    clip_learning_rate=0.02,
    transform_learning_rate=3e-3,
    benign_tokens=32,
    recovery_share=0.14,
    task_share=0.6,
)
_REALIGN_CLIPPING = replace(_REALIGN, edit_learning_rate=0.0, clip_learning_rate=0.2)
_REALIGN_BLOCKWISE = CalibrationSettings(
    method="realign",
    engine="blockwise",
    malicious_target="aligned",
    batch_size=16,
    batch_malicious_share=0.75,
    edit_learning_rate=3e-3,
    task_share=0.25,
    borderline_share=0.5,
)
_REALIGN_BLOCKWISE_CLIPPING = replace(_REALIGN_BLOCKWISE, edit_learning_rate=0.0, clip_learning_rate=0.1)
_REALIGN_BIAS = replace(_REALIGN, edit_learning_rate=0.0, bias_learning_rate=5e-3)
# arXiv 2511.07842: ordinary text only, about a hundred steps, channel scales (here with clipping, without rotations).
_AAQ = CalibrationSettings(
    method="aaq",
    engine="endtoend",
    objective="contrastive",
    samples=128,
    malicious_share=0.0,
    batch_size=8,
    steps=100,
    warmup_steps=5,
    clip_learning_rate=5e-2,
    transform_learning_rate=2e-3,
    benign_tokens=24,
    task_share=0.5,
)
# arXiv 2506.20251: DPO on masked LoRA of rank 128, beta 0.01, tau 0.6. Its rate of 5e-6 is for thousands of steps.
_QRESAFE = CalibrationSettings(
    method="qresafe",
    engine="endtoend",
    objective="preference",
    batch_size=8,
    steps=100,
    warmup_steps=10,
    edit_learning_rate=3e-5,
    edit_rank=128,
    edit_budget=1.0,
    critical_share=0.6,
    refusal_tokens=24,
    benign_tokens=24,
)
_RTN = CalibrationSettings(method="rtn", engine="none")

_TABLE: dict[tuple[str, str, str], CalibrationSettings] = {
    ("rtn", "none", "none"): _RTN,
    ("reconstruction", "blockwise", "none"): _RECONSTRUCTION,
    ("paper", "blockwise", "none"): _PAPER,
    ("realign", "endtoend", "lowrank"): _REALIGN,
    ("realign", "endtoend", "bias"): _REALIGN_BIAS,
    ("realign", "endtoend", "none"): _REALIGN_CLIPPING,
    ("realign", "blockwise", "lowrank"): _REALIGN_BLOCKWISE,
    ("realign", "blockwise", "none"): _REALIGN_BLOCKWISE_CLIPPING,
    ("aaq", "endtoend", "none"): _AAQ,
    ("qresafe", "endtoend", "lowrank"): _QRESAFE,
}


# What replaces a row where activations, or weights alone, are rounded to four bits.
_COARSE_ACTIVATIONS = {("realign", "endtoend", "lowrank"): _REALIGN_COARSE}
_COARSE_WEIGHTS = {("realign", "endtoend", "lowrank"): _REALIGN_FOUR_BIT}


def method_settings(
    method: str,
    *,
    engine: str | None = None,
    edit: str | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    schedule: str | None = None,
    **overrides: object,
) -> CalibrationSettings:
    """Return the settings of `method`, with every override that is not None applied.

    Args:
        method: a name in `METHODS`.
        engine, edit: variant of the method; None for its first.
        weight_bits, activation_bits: bits that they are rounded to; None where they are not, or it does not matter.
        schedule: a name in `SCHEDULES`; None for the first, the method's own steps.
        overrides: fields of the settings.

    Raises:
        ConfigError: the method is unknown, has no such engine, edit or schedule, or a field is out of its range.
    """
    if schedule not in (None, *SCHEDULES):
        raise ConfigError(f"unknown schedule {schedule!r}: use {', '.join(SCHEDULES)}")
    rows = [key for key in _TABLE if key[0] == method]
    if not rows:
        raise ConfigError(f"unknown method {method!r}: use {', '.join(METHODS)}")
    fitting = [key for key in rows if engine in (None, key[1]) and edit in (None, key[2])]
    if not fitting:
        offered = "; ".join(f"--engine {key[1]} --edit {key[2]}" for key in rows)
        asked = " ".join(f"--{flag} {name}" for flag, name in (("engine", engine), ("edit", edit)) if name is not None)
        raise ConfigError(f"method {method!r} has no {asked}: it offers {offered}")
    given = {name: value for name, value in overrides.items() if value is not None}
    if "steps" in given:
        given["passes"] = 0.0  # a number that was asked for is no upper limit
    coarse = _COARSE_ACTIVATIONS if activation_bits == 4 else _COARSE_WEIGHTS if weight_bits == 4 else {}
    row = coarse.get(fitting[0], _TABLE[fitting[0]])
    scheduled = {"fast": _fast, "long": _long}.get(schedule or "", lambda settings: settings)
    return replace(scheduled(row), **given)


def _fast(settings: CalibrationSettings) -> CalibrationSettings:
    """Return block-wise settings that read the weights less often: larger batches and rates, and an end at a plateau.

    Every parameter may move as far as before: Adam's steps are as long as its rate, so that grows with the batch.
    """
    if settings.engine != "blockwise":
        raise ConfigError(
            f"--schedule fast shortens the block-wise engine, and method {settings.method!r} does not use it here: "
            "leave it out, or add --engine blockwise where the method has it"
        )
    growth = FAST_BATCH / settings.batch_size
    rates = ("clip_learning_rate", "transform_learning_rate", "edit_learning_rate")
    return replace(
        settings,
        batch_size=FAST_BATCH,
        plateau=FAST_PLATEAU,
        **{name: getattr(settings, name) * growth for name in rates},
    )


def _long(settings: CalibrationSettings) -> CalibrationSettings:
    """Return settings of `realign` for ten times the prompts and 13 times the sequences, or what the data has of both.

    Harmful answers and refusals of borderline prompts trade as before; ordinary prompts and prefill attacks are told
    apart better (docs/recipe.md).
    """
    if settings.method != "realign" or settings.engine != "endtoend":
        raise ConfigError(
            f"--schedule long is for method 'realign' with the end-to-end engine, not for {settings.method!r} with "
            f"{settings.engine!r}: leave it out"
        )
    return replace(
        settings,
        samples=20_000,
        malicious_share=0.5,
        batch_size=32,
        batch_malicious_share=0.5,
        steps=800,
        passes=1.28,
        edit_rank=max(8, settings.edit_rank),
        edit_budget=max(0.05, settings.edit_budget),
        refusal_tokens=16,  # to their ends: the longer late refusals are taught, the sooner a loop follows an open one
        recovery_share=0.1,
        task_share=0.2,
        task_labels=1.0,
        borderline_share=0.1,
        borderline_weight=0.42,
        text_share=0.08,
    )
