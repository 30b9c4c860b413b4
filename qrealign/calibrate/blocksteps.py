"""The optimizer steps of one block: samples are picked on the device, losses read by the host once an epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from qrealign.calibrate.distributed import ALONE, Team
from qrealign.calibrate.divergence import DivergenceGuard
from qrealign.calibrate.graphs import Recorded
from qrealign.calibrate.parameters import Trainable
from qrealign.calibrate.parts import Parts
from qrealign.calibrate.schedule import Plateau
from qrealign.records import CurvePoint

CURVE_POINTS = 40  # kept per block


@dataclass(kw_only=True)
class BlockSteps:
    """Trains one block by a list of batches; on a GPU one step is recorded and replayed, elsewhere it is called.

    Nothing in a step waits for the device. The losses of the steps since the last look are read at the end of an epoch
    (of a step, where reading costs nothing): are they not finite, the state of the epoch before comes back with half
    the rate; have they stopped falling, the block is done.

    Args:
        index: the block's place, for messages and the curve.
        losses_of: sample indices `[b]` -> each sample's loss `[b]` float32 with gradients.
        order: `[S, B]` int64, the samples of every step.
        malicious: `[N]` bool on the host, the class of every sample.
        epoch: steps that see every sample about once.
        plateau: least share by which an epoch's loss has to fall for the next to follow; 0 makes every step.
        team: the processes that share every batch.
    """

    index: int
    trainable: Trainable
    losses_of: Callable[[Tensor], Tensor]
    order: Tensor
    malicious: Tensor
    device: torch.device
    epoch: int
    plateau: float = 0.0
    team: Team = ALONE

    def __post_init__(self) -> None:
        mine = slice(self.team.rank, None, self.team.size)
        self._rows = self.order[:, mine].to(self.device)  # [S, own share of B]
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._losses = torch.zeros(self.order.shape, device=self.device)
        self._own_losses = self._losses[:, mine]
        self._parts = Parts(self._rows.shape[1], self.trainable.zero_grad)

    def run(self, on_steps: Callable[[int, float], None]) -> list[CurvePoint]:
        """Train to the last step or to the plateau and return points of the loss curve.

        `on_steps` hears how many steps are done and the last one's loss.

        Raises:
            CalibrationDivergedError: losses stayed non-finite after the restarts.
        """
        # Not an attribute, which would be a cycle: all that a block held is to go before the next one is loaded.
        with closing(Recorded(self._step, self.device)) as recorded:
            return self._curve(self._train(recorded, on_steps))

    def _train(self, recorded: Recorded, on_steps: Callable[[int, float], None]) -> Tensor:
        """Train to the last step or to the plateau and return every step's losses, `[steps, B]` on the host."""
        guard, plateau = DivergenceGuard(self.trainable, f"block {self.index}"), Plateau(self.plateau)
        self._record(recorded, guard)
        steps, step, last = len(self.order), 0, float("nan")
        seen = torch.zeros(self.order.shape)
        while step < steps:
            stop = min(steps, self._next_look(step))
            seen[step:stop] = self._go(recorded, step, stop)
            broken = (~seen[step:stop].isfinite()).any(dim=1).nonzero()
            if len(broken):
                step = guard.recover(step + int(broken[0]), last)
                continue
            step, last = stop, float(seen[stop - 1].mean())
            on_steps(step, last)
            if step % self.epoch == 0:
                guard.mark(step)
                if plateau.reached(float(seen[step - self.epoch : step].mean())):
                    break
        return seen[:step]

    def _next_look(self, step: int) -> int:
        """Return the step before which the host looks at the losses again."""
        return step + 1 if self.device.type == "cpu" else (step // self.epoch + 1) * self.epoch

    def _record(self, recorded: Recorded, guard: DivergenceGuard) -> None:
        """Record a step; what the trial step before it has changed is taken back."""
        recorded.record()
        self.trainable.load_state(guard.good)

    def _go(self, recorded: Recorded, start: int, stop: int) -> Tensor:
        """Make some steps and return their losses, `[stop - start, B]` on the host."""
        self.trainable.set_rate(1.0)
        self._position.fill_(start)
        self._losses[start:stop] = 0  # the other processes' columns
        for _ in range(start, stop):
            recorded()
        losses = self.team.add(self._losses[start:stop])
        self.team.finish(self.device)
        return losses.cpu()

    def _step(self) -> None:
        """Make the step at the present position, and go on to the next position."""
        rows = self._rows.index_select(0, self._position).flatten()
        losses = torch.cat(self._parts.run(self._backward, rows))
        self._own_losses.index_copy_(0, self._position, losses[None])
        self.team.add_gradients(self.trainable.named.values())
        self.trainable.step()
        self._position.add_(1)

    def _backward(self, rows: Tensor) -> Tensor:
        """Add the gradients of part of a batch and return its losses."""
        self.trainable.before_forward()
        losses = self.losses_of(rows)
        (losses.sum() / self.order.shape[1]).backward()
        return losses.detach()

    def _curve(self, losses: Tensor) -> list[CurvePoint]:
        """Return the points of the curve from every step's losses `[steps, B]`."""
        every = max(1, len(self.order) // CURVE_POINTS)
        return [
            CurvePoint(
                step=step, block=self.index, losses=self._by_class(losses[step], self.malicious[self.order[step]])
            )
            for step in sorted({*range(0, len(losses), every), len(losses) - 1})
        ]

    @staticmethod
    def _by_class(losses: Tensor, malicious: Tensor) -> dict[str, float]:
        """Return the mean loss of a batch, and of each class that it holds."""
        classes = {"malicious": losses[malicious], "benign": losses[~malicious]}
        return {"total": float(losses.mean())} | {
            name: float(part.mean()) for name, part in classes.items() if len(part)
        }
