"""What a run would take on an RTX 4090, from what it took where it was measured.

Every stage is held to the share of the rates that it reached: its seconds are multiplied by what its counted work takes
at the other card's rates over what it takes at the measured ones. Stages whose work is not counted (teachers, probe,
capture) are multiplied by the worst ratio of the two cards' rates. Loading and writing wait for the host, so they take
as long, but for the way to the device, which is longer by the ratio of the two buses at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.calibration.cases import CASES
from benchmarks.calibration.ceilings import Ceilings
from benchmarks.calibration.counting import count_work
from benchmarks.calibration.geometries import find_geometry
from benchmarks.calibration.rows import TOTAL, Row

ON_DEVICE = ("probe", "teach", "capture", "pack")
OVER_THE_BUS = ("load", "save")


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage: measured seconds, the factor to the other card, why it is that, and the seconds there."""

    stage: str
    measured_s: float
    factor: float
    reason: str

    @property
    def seconds(self) -> float:
        return self.measured_s * self.factor


def estimate(stages: Mapping[str, Row], here: Ceilings, there: Ceilings) -> list[StageEstimate]:
    """Return every stage of a run on another card.

    Args:
        stages: the run's rows by stage.
        here: rates measured beside the run.
        there: the other card's rates, each at what its data sheet says.
    """
    found = []
    worst = max(here.copy / there.copy, here.bf16 / there.bf16, here.int8 / there.int8)
    bus = max(1.0, here.host_copy / there.host_copy)
    for stage, row in stages.items():
        if stage == TOTAL:
            continue
        factor, reason = 1.0, "waits for the host"
        if stage == "steps":
            geometry = find_geometry(row.geometry, row.layers)
            work = count_work(
                geometry, CASES[row.case].engine, steps=row.steps, tokens=row.tokens, positions=row.positions
            )
            factor, reason = work.seconds_at(there) / work.seconds_at(here), "counted operations and bytes"
        elif stage in ON_DEVICE:
            factor, reason = worst, "worst ratio of the rates"
        elif stage in OVER_THE_BUS:
            factor, reason = bus, "ratio of the buses"
        found.append(StageEstimate(stage=stage, measured_s=row.full_seconds, factor=factor, reason=reason))
    return found
