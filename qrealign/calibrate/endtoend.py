"""The end-to-end engine: every quantization parameter at once, the gradient through the whole fake-quantized model.

What the gradient is of stands in `objectives`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from qrealign.calibrate.divergence import DivergenceGuard
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.objectives import Objective
from qrealign.calibrate.parameters import Trainable
from qrealign.calibrate.parts import Parts, by_length
from qrealign.calibrate.schedule import stratified_batches, warm_cosine
from qrealign.calibrate.state import load_progress, save_progress
from qrealign.records import CurvePoint

SAVE_EVERY = 10  # steps: a kill costs at most these
# What another pass costs a CPU, in tokens: the weights are rounded anew. A GPU reads them from memory for it, which is
# worth more tokens than padding ever wastes.
PASS_TOKENS = 20


class EndToEndCalibrator:
    """Trains a fake-quantized model against cached samples.

    Args:
        model: the student; its linears are `FakeQuantLinear`, its parameters attached to `trainable`.
        objective: the samples, and the loss that they give.
        state_path: where progress is kept; a file found there is continued.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: Trainable,
        objective: Objective,
        settings: CalibrationSettings,
        *,
        state_path: Path,
    ) -> None:
        self.model, self.trainable, self.objective, self.settings = model, trainable, objective, settings
        self.state_path = state_path
        batches = stratified_batches(
            *objective.groups(),
            batch_size=settings.batch_size,
            malicious_share=settings.batch_malicious_share,
            seed=settings.seed,
        )
        self.schedule = list(islice(batches, settings.steps))
        split = self._by_length if model.device.type == "cpu" else None
        self.parts = Parts(settings.batch_size, trainable.zero_grad, split)
        self.curve: list[CurvePoint] = []

    def run(self, *, progress: str | None, on_step: Callable[[int], None] | None = None) -> list[CurvePoint]:
        """Train to the last step, from the last saved one, and return the loss curve.

        Raises:
            CalibrationDivergedError: losses stayed non-finite after the restarts.
        """
        step = self._resume()
        guard = DivergenceGuard(self.trainable, "the end-to-end engine")
        guard.step = step
        with tqdm(total=self.settings.steps, initial=step, desc=progress, disable=progress is None, unit="step") as bar:
            while step < self.settings.steps:
                losses = self._step(step)
                if losses is None:
                    step = guard.recover(step, self.curve[-1].losses["total"] if self.curve else float("nan"))
                    self.curve = [point for point in self.curve if point.step < step]
                    bar.n = step
                    continue
                self.curve.append(CurvePoint(step=step, block=None, losses=losses))
                step += 1
                bar.update()
                bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items() if name != "total"})
                if step % SAVE_EVERY == 0 or step == self.settings.steps:
                    guard.mark(step)
                    self._save(step)
                if on_step is not None:
                    on_step(step)
        return self.curve

    def _step(self, step: int) -> dict[str, float] | None:
        """Take one optimizer step; return its losses, or None where they are not finite and nothing was changed."""
        settings = self.settings
        self.trainable.set_rate(warm_cosine(step, settings.steps, settings.warmup_steps))
        samples = [self.objective.samples[index] for index in self.schedule[step]]
        counts = self.objective.count(samples)
        values: Counter[str] = Counter()
        for losses in self.parts.run(lambda part: self._backward(part, counts), samples):
            values.update(losses)
        values["total"] = sum(values.values())
        if not math.isfinite(values["total"]):
            self.trainable.zero_grad()
            return None
        self.trainable.step()
        return dict(values)

    def _by_length(self, samples: Sequence[Any]) -> list[list[Any]]:
        return by_length(samples, [self.objective.length(sample) for sample in samples], PASS_TOKENS)

    def _backward(self, samples: Sequence[Any], counts: Mapping[str, int]) -> dict[str, float]:
        """Add the gradients of part of a batch; `counts` describe the whole batch."""
        self.trainable.before_forward()
        losses = self.objective.losses(self.model, samples, counts)
        torch.stack(list(losses.values())).sum().backward()
        return {name: float(value.detach()) for name, value in losses.items()}

    def _save(self, step: int) -> None:
        extra = {
            "step": step,
            "rate_factor": self.trainable.rate_factor,
            "curve": [asdict(point) for point in self.curve],
        }
        save_progress(self.state_path, self.trainable.state(), extra)

    def _resume(self) -> int:
        found = load_progress(self.state_path)
        if found is None:
            return 0
        tensors, extra = found
        self.trainable.load_state(tensors)
        self.trainable.rate_factor = extra["rate_factor"]
        self.curve = [CurvePoint(**point) for point in extra["curve"]]
        return int(extra["step"])
