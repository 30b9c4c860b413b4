"""What is measured: runs of the project's own command, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qrealign.calibrate.methods import CalibrationSettings, method_settings
from qrealign.errors import ConfigError

Engine = Literal["endtoend", "blockwise"]
SAMPLES = 200
REFERENCE_STEPS = 4  # of the end-to-end engine on the reference backend, whose steps take seconds
REFERENCE_EPOCHS = 0.05  # the same for the block-wise engine: one or two steps a block


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: flags of `qrealign.run` on top of those that all cases share.

    `steps` and `epochs` replace the method's own where given. `backend` is what computes the ops, None for the fastest.
    A case that is `extrapolated` is the baseline: it takes a few steps, and its optimisation is counted up from them.
    """

    name: str
    title: str
    method: str
    engine: Engine
    flags: tuple[str, ...] = ()
    gpus: int = 1
    steps: int | None = None
    epochs: float | None = None
    backend: str | None = None
    extrapolated: bool = False

    def settings(self) -> CalibrationSettings:
        """Return the settings of the whole run, before it is shortened."""
        setting = [flag for flag in self.flags if "=" in flag]
        values = dict(item.split("=") for item in setting)
        batch = values.get("batch_size")
        steps = None if self.extrapolated else self.steps
        return method_settings(
            self.method, engine=self.engine, samples=SAMPLES, batch_size=int(batch) if batch else None, steps=steps
        )

    def length_flags(self, shorten: int) -> list[str]:
        """Return the flags that set how many steps are taken, `shorten` times fewer than the whole run's."""
        settings = self.settings()
        if self.engine == "endtoend":
            steps = REFERENCE_STEPS if self.extrapolated else math.ceil(settings.steps / shorten)
            return ["--steps", str(steps)]
        epochs = REFERENCE_EPOCHS if self.extrapolated else settings.epochs / shorten
        return ["--epochs", f"{epochs:g}"]


_PAPER = ("--setting", "batch_size=1")
_CASES = (
    Case(
        name="realign",
        title="`realign`, weights resident",
        method="realign",
        engine="endtoend",
        flags=(),
    ),
    Case(
        name="realign-80",
        title="`realign`, 80 steps, weights resident",
        method="realign",
        engine="endtoend",
        flags=(),
        steps=80,
    ),
    Case(
        name="realign-streamed",
        title="`realign`, weights streamed",
        method="realign",
        engine="endtoend",
        flags=(),
    ),
    Case(
        name="realign-low",
        title="`realign`, low memory",
        method="realign",
        engine="endtoend",
        flags=(),
    ),
    Case(
        name="fast",
        title="block-wise, fast mode",
        method="paper",
        engine="blockwise",
        flags=("--setting", "batch_size=8"),
    ),
    Case(name="parity", title="block-wise, parity mode", method="paper", engine="blockwise", flags=_PAPER),
    Case(
        name="parity-low",
        title="block-wise, parity mode, low memory",
        method="paper",
        engine="blockwise",
        flags=_PAPER,
    ),
    Case(
        name="realign-two-gpus",
        title="`realign`, two GPUs",
        method="realign",
        engine="endtoend",
        flags=(),
        gpus=2,
    ),
    Case(
        name="fast-two-gpus",
        title="block-wise, fast mode, two GPUs",
        method="paper",
        engine="blockwise",
        flags=("--setting", "batch_size=8"),
        gpus=2,
    ),
    Case(
        name="realign-reference",
        title="`realign`, eager reference",
        method="realign",
        engine="endtoend",
        flags=(),
        backend="reference",
        extrapolated=True,
    ),
    Case(
        name="parity-reference",
        title="block-wise, parity mode, eager reference",
        method="paper",
        engine="blockwise",
        flags=_PAPER,
        backend="reference",
        extrapolated=True,
    ),
)
CASES: dict[str, Case] = {case.name: case for case in _CASES}
DEFAULT = ("realign", "realign-80", "realign-streamed", "fast", "parity", "parity-low", "realign-reference", "parity-reference")


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
    case: Case, *, model: Path, adapter: Path, prompts: Mapping[str, Path], output: Path, shorten: int, tokens: int
) -> list[str]:
    """Return the command line of `qrealign.run` for a case.

    One folder of weights serves as the aligned model and, with the adapter merged, as the fine-tuned one.
    """
    return [
        *("--model", str(model), "--adapter", str(adapter), "--aligned", str(model), "--output", str(output)),
        *("--method", case.method, "--engine", case.engine, "--samples", str(SAMPLES)),
        *("--sequence-length", str(tokens), "--eval", "none", "--quiet", "--fresh"),
        *("--safety-data", str(prompts["malicious"]), "--benign-data", str(prompts["benign"])),
        *("--borderline-data", str(prompts["borderline"]), "--task-data", str(prompts["task"])),
        *("--text-data", str(prompts["text"])),
        *case.length_flags(shorten),
        *case.flags,
    ]
