"""The figures of all runs as CSV: a line per run and stage, replaced when the run is measured again."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from qrealign.errors import DataError
from qrealign.files import write_text

TOTAL = "total"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage of one run, or the whole run as the stage `total`.

    `layers` are those measured and `full_layers` the geometry's; `shorten` is how many times fewer steps were taken
    than the whole run has. `seconds` are measured; `full_seconds` is what the stage takes with all steps, the same
    where nothing was shortened. `peak_device_gib` counts live tensors, `peak_reserved_gib` what torch took from the
    driver, the worst rank's with several GPUs; `peak_host_gb` is one process's, without mapped files.

    The stage `steps` has more: `steps`, `step_ms`, `tokens`, `positions` at which the output head was read,
    `tokens_per_s`, operations and bytes as counted (`counting.py`), the shares of the measured rates that they come to,
    and `floor_s`, their time at those rates.
    """

    geometry: str
    layers: int
    full_layers: int
    case: str
    gpus: int
    shorten: int
    stage: str
    seconds: float
    full_seconds: float
    gpu_hours: float
    peak_device_gib: float
    peak_reserved_gib: float
    peak_host_gb: float
    steps: int = 0
    step_ms: float = 0.0
    tokens: int = 0
    positions: int = 0
    tokens_per_s: float = 0.0
    petaflop: float = 0.0
    terabytes: float = 0.0
    matmul_share: float = 0.0
    copy_share: float = 0.0
    floor_s: float = 0.0
    device: str
    torch: str
    triton: str
    transformers: str
    commit: str
    date: str

    @property
    def run(self) -> tuple[Any, ...]:
        """What tells one run from another; a run measured again replaces the one before."""
        return self.geometry, self.layers, self.case, self.device

    @property
    def stamp(self) -> dict[str, str]:
        """Where and when it was measured, as the summary of figures keeps it."""
        return {name: getattr(self, name) for name in ("device", "torch", "triton", "commit", "date")}


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, none where it is missing.

    Raises:
        DataError: it is no file of this benchmark.
    """
    if not path.is_file():
        return []
    kinds = get_type_hints(Row)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no table of this benchmark ({error}): remove it and measure again") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, floats with six digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Row)]
    writer.writerow(names)
    for row in rows:
        values = asdict(row)
        writer.writerow([f"{values[name]:.6g}" if isinstance(values[name], float) else values[name] for name in names])
    write_text(path, text.getvalue())


def merge_rows(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return all rows, with the runs of `new` in the place of the same runs of `old`."""
    measured = {row.run for row in new}
    return [row for row in old if row.run not in measured] + list(new)


def by_stage(rows: Iterable[Row]) -> dict[str, Row]:
    """Return one run's rows by stage."""
    return {row.stage: row for row in rows}


def runs_of(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Return the runs, each as its rows by stage, in the order of the file."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.run, []).append(row)
    return {run: by_stage(group) for run, group in found.items()}


def find_run(rows: Iterable[Row], geometry: str, case: str, *, any_depth: bool = False) -> Mapping[str, Row] | None:
    """Return a geometry's run of a case, the latest in the file, or None; of a whole model, unless `any_depth`."""
    fitting = [
        stages
        for stages in runs_of(rows).values()
        if (stages[TOTAL].geometry, stages[TOTAL].case) == (geometry, case)
        and (any_depth or stages[TOTAL].layers == stages[TOTAL].full_layers)
    ]
    return fitting[-1] if fitting else None
