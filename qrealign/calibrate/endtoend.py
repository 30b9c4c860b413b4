"""The end-to-end engine: every quantization parameter at once, the gradient through the whole fake-quantized model.

Malicious prompts are pulled to the aligned model's next-token distributions, all others to the fine-tuned model's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qrealign.calibrate.divergence import DivergenceGuard
from qrealign.calibrate.losses import divergence
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.parameters import Trainable
from qrealign.calibrate.parts import Parts
from qrealign.calibrate.readout import final_hidden, readout
from qrealign.calibrate.schedule import stratified_batches, warm_cosine
from qrealign.calibrate.state import load_progress, save_progress
from qrealign.calibrate.teachers import TeacherCache, TeacherSample
from qrealign.data.prompts import Label
from qrealign.records import CurvePoint

SAVE_EVERY = 10  # steps: a kill costs at most these


class EndToEndCalibrator:
    """Trains a fake-quantized model against cached teachers.

    Args:
        model: the student; its linears are `FakeQuantLinear`, its parameters attached to `trainable`.
        cache: teachers' answers and hidden states.
        state_path: where progress is kept; a file found there is continued.
        pad_id: fills the batches' right side, where the attention mask is 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: Trainable,
        cache: TeacherCache,
        settings: CalibrationSettings,
        *,
        state_path: Path,
        pad_id: int,
    ) -> None:
        self.model, self.trainable, self.cache, self.settings = model, trainable, cache, settings
        self.state_path, self.pad_id = state_path, pad_id
        batches = stratified_batches(
            cache.of_class(Label.MALICIOUS),
            cache.of_class(Label.BENIGN),
            batch_size=settings.batch_size,
            malicious_share=settings.batch_malicious_share,
            seed=settings.seed,
        )
        self.schedule = list(islice(batches, settings.steps))
        self.head_weight = None if cache.head_weight is None else cache.head_weight.to(model.device)
        self.parts = Parts(settings.batch_size, trainable.zero_grad)
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
        samples = [self.cache.samples[index] for index in self.schedule[step]]
        counts = Counter(sample.label for sample in samples)
        values: Counter[str] = Counter()
        for losses in self.parts.run(lambda part: self._backward(part, counts), samples):
            values.update(losses)
        values["total"] = sum(values.values())
        if not math.isfinite(values["total"]):
            self.trainable.zero_grad()
            return None
        self.trainable.step()
        return dict(values)

    def _backward(self, samples: Sequence[TeacherSample], counts: Mapping[Label, int]) -> dict[str, float]:
        """Add the gradients of part of a batch; `counts` are the whole batch's samples of each class."""
        self.trainable.before_forward()
        losses = self.losses(samples, counts)
        torch.stack(list(losses.values())).sum().backward()
        return {name: float(value.detach()) for name, value in losses.items()}

    def losses(self, samples: Sequence[TeacherSample], counts: Mapping[Label, int]) -> dict[str, Tensor]:
        """Return each class's loss summed over `samples` and divided by its count, the benign one weighted."""
        input_ids, mask = self._pad(samples)
        hidden = final_hidden(self.model, input_ids, mask)
        losses = {}
        for label, name, head, weight in (
            (Label.MALICIOUS, "malicious", self.head_weight, 1.0),
            (Label.BENIGN, "benign", None, self.settings.benign_weight),
        ):
            rows = [(row, sample) for row, sample in enumerate(samples) if sample.label == label]
            if rows:
                losses[name] = weight * self._class_loss(hidden, rows, head) / counts[label]
        return losses

    def _class_loss(self, hidden: Tensor, rows: list[tuple[int, TeacherSample]], head: Tensor | None) -> Tensor:
        """Return the weighted KL summed over one class's samples."""
        device = hidden.device
        student = torch.cat([hidden[row, sample.positions.to(device)] for row, sample in rows])  # [P, H]
        teacher = torch.cat([sample.hidden for _, sample in rows]).to(device=device, dtype=hidden.dtype)
        weights = torch.cat([sample.weights for _, sample in rows]).to(device)
        with torch.no_grad():
            target = readout(self.model, teacher, head)
        return (divergence(target, readout(self.model, student)) * weights).sum()

    def _pad(self, samples: Sequence[TeacherSample]) -> tuple[Tensor, Tensor]:
        """Right-pad the batch; padding never enters a loss."""
        longest = max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full((len(samples), longest), self.pad_id)
        mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample.input_ids)] = sample.input_ids
            mask[row, : len(sample.input_ids)] = 1
        return input_ids.to(self.model.device), mask.to(self.model.device)

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
