"""What is measured: runs of the project's own command, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qrealign.calibrate.methods import CalibrationSettings, method_settings
from qrealign.errors import ConfigError

Engine = Literal["endtoend", "blockwise"]
SAMPLES = 200
REFERENCE_STEPS = 4  # of the end-to-end engine on the reference backend, whose steps take seconds
REFERENCE_EPOCHS = 0.05  # the same for the block-wise engine: one or two steps a block


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: flags of `qrealign.run` on top of those that all cases share.

    `overrides` are fields of the method's settings. `backend` is what computes the ops, None for the fastest. A case
    that is `extrapolated` is the baseline: it takes a few steps, and its optimisation is counted up from them. One
    whose steps are not recorded may have each of them waited for and `timed`, because the first ones take longer.
    """

    name: str
    title: str
    method: str
    engine: Engine
    flags: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    gpus: int = 1
    backend: str | None = None
    extrapolated: bool = False
    timed: bool = False

    def settings(self, samples: int = SAMPLES) -> CalibrationSettings:
        """Return the settings of the whole run, before it is shortened."""
        schedule = "fast" if "fast" in self.flags else None
        return method_settings(self.method, engine=self.engine, schedule=schedule, samples=samples, **self.overrides)

    def step_flags(self, shorten: int, samples: int) -> list[str]:
        """Return the flags that set how many steps are taken, `shorten` times fewer than the whole run's."""
        settings = self.settings(samples)
        if self.engine == "endtoend":
            return ["--steps", str(REFERENCE_STEPS if self.extrapolated else math.ceil(settings.steps / shorten))]
        return ["--epochs", f"{REFERENCE_EPOCHS if self.extrapolated else settings.epochs / shorten:g}"]


_REALIGN = Case(
    name="realign",
    title="`realign`, weights resident",
    method="realign",
    engine="endtoend",
    flags=("--memory", "resident"),
)
_FAST = Case(
    name="fast",
    title="block-wise, fast mode",
    method="paper",
    engine="blockwise",
    flags=("--schedule", "fast"),
)
_PARITY = Case(name="parity", title="block-wise, parity mode", method="paper", engine="blockwise")
_CASES = (
    _REALIGN,
    replace(_REALIGN, name="realign-80", title="`realign`, 80 steps, weights resident", overrides={"steps": 80}),
    replace(
        _REALIGN,
        name="realign-streamed",
        title="`realign`, weights streamed",
        flags=("--memory", "streamed"),
        timed=True,
    ),
    replace(_REALIGN, name="realign-low", title="`realign`, low memory", flags=("--memory", "low"), timed=True),
    replace(_REALIGN, name="realign-two-gpus", title="`realign`, two GPUs", gpus=2),
    replace(
        _REALIGN,
        name="realign-reference",
        title="`realign`, eager reference",
        backend="reference",
        extrapolated=True,
        timed=True,
    ),
    _FAST,
    replace(_FAST, name="fast-whole", title="block-wise, fast mode, no early stop", overrides={"plateau": 0.0}),
    replace(_FAST, name="fast-two-gpus", title="block-wise, fast mode, two GPUs", gpus=2),
    _PARITY,
    replace(_PARITY, name="parity-low", title="block-wise, parity mode, low memory", flags=("--memory", "low")),
    replace(
        _PARITY,
        name="parity-reference",
        title="block-wise, parity mode, eager reference",
        backend="reference",
        extrapolated=True,
        timed=True,
    ),
)
CASES: dict[str, Case] = {case.name: case for case in _CASES}
# Every case that one GPU serves.
DEFAULT = tuple(case.name for case in _CASES if case.gpus == 1)


def find_cases(names: Sequence[str]) -> list[Case]:
    """Return cases by name.

    Raises:
        ConfigError: there is none of some name.
    """
    for name in names:
        if name not in CASES:
            raise ConfigError(f"--only {name}: there is no such case, use some of {', '.join(CASES)}")
    return [CASES[name] for name in names]


def run_flags(
    case: Case,
    *,
    model: Path,
    adapter: Path,
    prompts: Mapping[str, Path],
    output: Path,
    shorten: int,
    samples: int,
    tokens: int,
) -> list[str]:
    """Return the command line of `qrealign.run` for a case.

    One folder of weights serves as the aligned model and, with the adapter merged, as the fine-tuned one.
    """
    return [
        *("--model", str(model), "--adapter", str(adapter), "--aligned", str(model), "--output", str(output)),
        *("--method", case.method, "--engine", case.engine, "--samples", str(samples)),
        *("--sequence-length", str(tokens), "--eval", "none", "--quiet", "--fresh"),
        *("--safety-data", str(prompts["malicious"]), "--benign-data", str(prompts["benign"])),
        *("--borderline-data", str(prompts["borderline"]), "--task-data", str(prompts["task"])),
        *("--text-data", str(prompts["text"])),
        *case.step_flags(shorten, samples),
        *(
            flag
            for name, value in case.overrides.items()
            if name != "steps"
            for flag in ("--setting", f"{name}={value:g}")
        ),
        *case.flags,
    ]
