"""What happens when calibration leaves the finite numbers: restore, halve the rate, try again, then stop."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qrealign.calibrate.parameters import Trainable
from qrealign.errors import CalibrationDivergedError

RETRIES = 2


class DivergenceGuard:
    """Keeps the last good state of a `Trainable` and goes back to it when a loss is not finite."""

    def __init__(self, trainable: Trainable, where: str) -> None:
        self.trainable = trainable
        self.where = where
        self.retries = 0
        self.mark(0)

    def mark(self, step: int) -> None:
        """Remember the present state as good at `step`."""
        self.step = step
        self.good: Mapping[str, Tensor] = self.trainable.state()

    def recover(self, step: int, last_loss: float) -> int:
        """Restore the last good state with half the learning rate and return its step.

        Raises:
            CalibrationDivergedError: it has happened too often.
        """
        if self.retries == RETRIES:
            raise CalibrationDivergedError(
                f"calibration diverged at {self.where}, step {step} (last finite loss {last_loss:.4g}), also after "
                f"{RETRIES} restarts at half the rate: lower the learning rate or use --method rtn"
            )
        self.retries += 1
        self.trainable.load_state(self.good)
        self.trainable.rate_factor *= 0.5
        return self.step
