"""The end-to-end engine: every quantization parameter at once, the gradient through the whole fake-quantized model.

What the gradient is of stands in `objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qrealign.calibrate.distributed import ALONE, Team
from qrealign.calibrate.divergence import DivergenceGuard
from qrealign.calibrate.handover import HandOver
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.objectives import LOSS_NAMES, BehaviourObjective, Objective
from qrealign.calibrate.parameters import Trainable
from qrealign.calibrate.parts import Parts
from qrealign.calibrate.recorded import RecordedPass
from qrealign.calibrate.schedule import stratified_batches, warm_cosine
from qrealign.calibrate.state import load_progress, save_progress
from qrealign.data.batching import by_length
from qrealign.records import CurvePoint

SAVE_EVERY = 10  # steps between two looks at the losses: a kill, or a divergence, costs at most these
# What another pass costs a CPU, in tokens: the weights are rounded anew. A GPU reads them from memory for it, which is
# worth more tokens than padding ever wastes.
PASS_TOKENS = 20

Losses = dict[str, Tensor]  # of one step by name, scalars on the device


class EndToEndCalibrator:
    """Trains a fake-quantized model against cached samples.

    Args:
        model: the student; its linears are `FakeQuantLinear`, its parameters attached to `trainable`.
        objective: the samples, and the loss that they give.
        state_path: where progress is kept; a file found there is continued.
        record: on a GPU, pad every batch to one shape and record forward and backward pass as a CUDA graph. The weights
            must stay where they are, and nothing in the model may read a tensor's value.
        team: the processes that share every batch; the first one alone saves.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: Trainable,
        objective: Objective,
        settings: CalibrationSettings,
        *,
        state_path: Path,
        record: bool = False,
        team: Team = ALONE,
    ) -> None:
        self.model, self.trainable, self.objective, self.settings = model, trainable, objective, settings
        self.state_path, self.team = state_path, team
        batches = stratified_batches(
            *objective.groups(),
            batch_size=settings.batch_size,
            malicious_share=settings.batch_malicious_share,
            seed=settings.seed,
        )
        self.schedule = list(islice(batches, settings.steps))
        if team.size > 1:  # shares of like mixes: a recorded pass has room for the most that any brings of each class
            malicious = frozenset(objective.groups()[0])
            self.schedule = [sorted(batch, key=malicious.__contains__) for batch in self.schedule]
        self.recorded: RecordedPass | None = None
        if record and isinstance(objective, BehaviourObjective):
            self.recorded = RecordedPass(model, trainable, objective, map(self._own_samples, range(settings.steps)))
        split = self._by_length if model.device.type == "cpu" and self.recorded is None else None
        self.parts = Parts(len(team.share(range(settings.batch_size))), trainable.zero_grad, split)
        self.curve: list[CurvePoint] = []

    def run(self, *, progress: str | None, on_step: Callable[[int], None] | None = None) -> list[CurvePoint]:
        """Train to the last step, from the last saved one, and return the loss curve.

        Losses stay on the device and are read every `SAVE_EVERY` steps, so that the host never waits for one step. A
        loss that was not finite is found then, and the whole stretch is taken back.

        Raises:
            CalibrationDivergedError: losses stayed non-finite after the restarts.
        """
        step = self._resume()
        guard = DivergenceGuard(self.trainable, "the end-to-end engine")
        guard.step = step
        bar = tqdm(total=self.settings.steps, initial=step, desc=progress, disable=progress is None, unit="step")
        with bar, HandOver(self.model.device) as hand_over:
            while step < self.settings.steps:
                first, step = step, min(self.settings.steps, (step // SAVE_EVERY + 1) * SAVE_EVERY)
                unread: list[Losses] = []
                for taken in range(first, step):
                    unread.append(self._step(taken))
                    bar.update()
                    if on_step is not None:
                        on_step(taken + 1)
                if (bad := self._read(unread, first)) is not None:
                    step = guard.recover(bad, self.curve[-1].losses["total"] if self.curve else float("nan"))
                    self.curve = [point for point in self.curve if point.step < step]
                    bar.n = step
                    continue
                bar.set_postfix(
                    {name: f"{value:.3f}" for name, value in self.curve[-1].losses.items() if name != "total"}
                )
                guard.mark(step)
                self._save(guard, hand_over)
        return self.curve

    def _read(self, unread: Sequence[Losses], first: int) -> int | None:
        """Add steps, from `first` on, to the curve; return the first one whose loss is not finite, if there is one."""
        values = torch.stack([value for losses in unread for value in losses.values()]).tolist()
        read = []
        for names in unread:
            read.append(dict(zip(names, values, strict=False)))
            del values[: len(names)]
        for step, losses in enumerate(self.team.add_named(read, LOSS_NAMES), start=first):
            losses["total"] = sum(losses.values())
            if not math.isfinite(losses["total"]):
                return step
            self.curve.append(CurvePoint(step=step, block=None, losses=losses))
        return None

    def _step(self, step: int) -> Losses:
        """Take one optimizer step; return its losses, not yet read."""
        settings = self.settings
        self.trainable.set_rate(warm_cosine(step, settings.steps, settings.warmup_steps))
        samples = self._own_samples(step)
        counts = self.objective.count([self.objective.samples[index] for index in self.schedule[step]])
        total: Losses = {}
        for losses in self.parts.run(lambda part: self._backward(part, counts, len(samples)), samples):
            total |= {name: value + total[name] if name in total else value for name, value in losses.items()}
        self.team.add_gradients(self.trainable.named.values())
        self.trainable.step()
        return total

    def _own_samples(self, step: int) -> list[Any]:
        """Return this process's share of a batch."""
        return [self.objective.samples[index] for index in self.team.share(self.schedule[step])]

    def _by_length(self, samples: Sequence[Any]) -> list[list[Any]]:
        return by_length(samples, [self.objective.length(sample) for sample in samples], PASS_TOKENS)

    def _backward(self, samples: Sequence[Any], counts: Mapping[str, int], whole: int) -> Losses:
        """Add the gradients of part of `whole` samples; `counts` describe the batch of all processes."""
        if self.recorded is not None and len(samples) == whole:
            return self.recorded(samples, counts)
        self.recorded = None  # the whole batch did not fit
        self.trainable.before_forward()
        losses = self.objective.losses(self.model, samples, counts)
        torch.stack(list(losses.values())).sum().backward()
        return {name: value.detach() for name, value in losses.items()}

    def _save(self, guard: DivergenceGuard, hand_over: HandOver) -> None:
        """Save what the guard has marked, on a GPU while the next steps are made."""
        if not self.team.leads:
            return
        tensors = guard.good
        extra = {
            "step": guard.step,
            "rate_factor": self.trainable.rate_factor,
            "curve": [asdict(point) for point in self.curve],
        }
        hand_over.submit(lambda: save_progress(self.state_path, tensors, extra))

    def _resume(self) -> int:
        found = load_progress(self.state_path)
        if found is None:
            return 0
        tensors, extra = found
        self.trainable.load_state(tensors)
        self.trainable.rate_factor = extra["rate_factor"]
        self.curve = [CurvePoint(**point) for point in extra["curve"]]
        return int(extra["step"])
