"""The forward and backward pass of the end-to-end engine as one CUDA graph, for batches of one shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qrealign.calibrate.graphs import Recorded
from qrealign.calibrate.objectives import BehaviourObjective
from qrealign.calibrate.parameters import Trainable
from qrealign.calibrate.readout import causal_mask
from qrealign.calibrate.teachers import TeacherSample
from qrealign.data.batching import to_device


class RecordedPass:
    """Computes losses and gradients of batches; on a GPU the first one is recorded, and all are replays of it.

    A model of billions of weights has thousands of kernels in a step, each of which takes the host longer to launch
    than many take to run. Gradients stand in tensors of the recording's own, where every replay leaves them.

    Args:
        model: the student; its weights stay where they are, and none of its modules reads a value back.
        trainable: what gets gradients.
        objective: makes the batches and their losses.
        batches: all that will come; the largest gives the shape. Where their lengths differ much, sequences are packed
            into one row, masked from each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: Trainable,
        objective: BehaviourObjective,
        batches: Iterable[Sequence[TeacherSample]],
    ) -> None:
        self.model, self.trainable, self.objective = model, trainable, objective
        self.room = objective.room(batches, may_pack=causal_mask(model, 1) is not None)
        self._inputs: dict[str, Tensor] = {}
        self._losses: dict[str, Tensor] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        self._replay = Recorded(self._work, objective.device)

    def __call__(self, samples: Sequence[TeacherSample], counts: Mapping[str, int]) -> dict[str, Tensor]:
        """Set the gradients of a batch and return its losses; gradients that were there before are forgotten."""
        batch = self.objective.collate(samples, counts, self.room)
        if not self._inputs:
            self._inputs = {name: to_device(tensor, self.objective.device) for name, tensor in batch.items()}
            if (mask := causal_mask(self.model, self.room.length)) is not None:
                self._inputs["mask"] = mask
            self._replay.record()
        for name, tensor in batch.items():
            self._inputs[name].copy_(to_device(tensor, self.objective.device))
        self._replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return {name: value.clone() for name, value in self._losses.items()}

    def _work(self) -> None:
        self.trainable.zero_grad()  # a recording then owns the gradients that it makes
        self.trainable.before_forward()
        losses = self.objective.losses_of(self.model, self._inputs)
        torch.stack(list(losses.values())).sum().backward()
        self._losses = {name: value.detach() for name, value in losses.items()}
        self._gradients = [(parameter, parameter.grad) for parameter in self.trainable.named.values()]
