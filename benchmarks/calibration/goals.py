"""The aims of issue "Calibration at 7B" beside what was measured: the headline figures and where each comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.calibration.ceilings import RTX_4090, Ceilings
from benchmarks.calibration.estimate import estimate
from benchmarks.calibration.rows import TOTAL, Row, find_run
from benchmarks.summary import SUMMARY, record

GEOMETRY = "llama-2-7b"
BLOCKWISE = ("fast", "parity")
NEAR_HOST = ("realign", *BLOCKWISE, "parity-low")  # runs whose memory on the host is bounded


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One line of the table: `best` is "at most" or "at least"; `floor` and `authors` are text, empty where none."""

    key: str
    what: str
    unit: str
    limit: float
    authors: str = ""
    floor: str = ""
    at_least: bool = False

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


# The authors' figures and the floors are measured and counted outside of this tree, by the scripts that issue 4 names.
GOALS = (
    Goal(
        key="realign_optimisation_s",
        what="`realign` end-to-end, optimisation, weights resident",
        unit="s",
        limit=30,
        floor="≈ 6",
    ),
    Goal(
        key="realign_total_s",
        what="`realign`, whole run: load, teachers, steps, pack, save",
        unit="s",
        limit=90,
        authors="2,256 for the steps alone",
    ),
    Goal(
        key="realign_peak_gib",
        what="`realign`, peak device memory, weights resident",
        unit="GiB",
        limit=20,
        floor="13.5",
    ),
    Goal(
        key="realign_streamed_peak_gib",
        what="`realign`, peak device memory, weights streamed",
        unit="GiB",
        limit=8,
        floor="≈ 2",
    ),
    Goal(
        key="fast_optimisation_s",
        what="block-wise fast mode, optimisation of all 32 blocks",
        unit="s",
        limit=30,
        floor="10",
    ),
    Goal(
        key="parity_s",
        what="block-wise parity mode, 62,000 steps",
        unit="s",
        limit=150,
        authors="2,256",
        floor="21",
    ),
    Goal(
        key="peak_device_gib",
        what="block-wise, peak device memory, default",
        unit="GiB",
        limit=8,
        authors="5.7 for a block",
    ),
    Goal(key="peak_device_low_gib", what="block-wise, peak device memory, low", unit="GiB", limit=4),
    Goal(
        key="peak_host_gb",
        what="peak host memory, block-wise and resident, mapped file pages aside",
        unit="GB",
        limit=8,
    ),
    Goal(
        key="two_gpu_speedup",
        what="two GPUs against one, optimisation",
        unit="times",
        limit=1.6,
        floor="2",
        at_least=True,
    ),
    Goal(key="blockwise_13b_gib", what="13B block-wise, low, peak device memory", unit="GiB", limit=8),
    Goal(key="blockwise_70b_gib", what="70B block-wise, low, peak device memory", unit="GiB", limit=16),
    Goal(key="streamed_13b_gib", what="13B `realign` streamed, peak device memory", unit="GiB", limit=12),
    Goal(key="streamed_70b_gib", what="70B `realign` streamed, peak device memory", unit="GiB", limit=24),
    Goal(
        key="rtx4090_estimate_s",
        what="RTX 4090, whole `realign` run, estimated",
        unit="s",
        limit=180,
        authors="2,400",
        floor="45",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A headline figure and the row that it was read from."""

    value: float
    row: Row


def headline_figures(rows: Sequence[Row], ceilings: Mapping[str, Ceilings]) -> dict[str, Figure]:
    """Return the headline figures that the rows have, by key: whole runs of the 7B geometry on a GPU.

    Of larger geometries only the memory counts, which a shortened run needs as well.

    Args:
        rows: all that were measured.
        ceilings: rates by device.
    """
    on_gpu = [row for row in rows if row.device != "cpu"]

    def stage(case: str, name: str) -> Row | None:
        run = find_run(on_gpu, GEOMETRY, case)
        return None if run is None else run.get(name)

    found: dict[str, Figure] = {}

    def put(key: str, row: Row | None, value: Callable[[Row], float]) -> None:
        if row is not None:
            found[key] = Figure(value=value(row), row=row)

    def whole(row: Row | None) -> Row | None:
        return row if row is not None and row.shorten == 1 else None

    put("realign_optimisation_s", stage("realign", "steps"), lambda row: row.full_seconds)
    put("realign_total_s", whole(stage("realign", TOTAL)), lambda row: row.seconds)
    put("realign_peak_gib", stage("realign", TOTAL), lambda row: row.peak_device_gib)
    put("realign_streamed_peak_gib", stage("realign-streamed", TOTAL), lambda row: row.peak_device_gib)
    put("fast_optimisation_s", stage("fast", "steps"), lambda row: row.full_seconds)
    put("parity_s", stage("parity", "steps"), lambda row: row.full_seconds)
    put("peak_device_low_gib", stage("parity-low", TOTAL), lambda row: row.peak_device_gib)
    put("peak_device_gib", _largest(stage(case, TOTAL) for case in BLOCKWISE), lambda row: row.peak_device_gib)
    put(
        "peak_host_gb",
        _largest((stage(case, TOTAL) for case in NEAR_HOST), lambda row: row.peak_host_gb),
        lambda row: row.peak_host_gb,
    )
    one, two = stage("realign", "steps"), stage("realign-two-gpus", "steps")
    if one is not None and two is not None and one.device == two.device:
        put("two_gpu_speedup", two, lambda row: one.full_seconds / row.full_seconds)
    run = find_run(on_gpu, GEOMETRY, "realign")
    if run is not None and run[TOTAL].device in ceilings and whole(run[TOTAL]):
        parts = estimate(run, ceilings[run[TOTAL].device], RTX_4090)
        put("rtx4090_estimate_s", run[TOTAL], lambda _: sum(part.seconds for part in parts))
    for size in ("13b", "70b"):
        for key, case in (("blockwise", "parity-low"), ("streamed", "realign-streamed")):
            larger = find_run(on_gpu, f"llama-2-{size}", case, any_depth=True)
            put(f"{key}_{size}_gib", None if larger is None else larger[TOTAL], lambda row: row.peak_device_gib)
    return found


def _largest(rows: Iterable[Row | None], value: Callable[[Row], float] = lambda row: row.peak_device_gib) -> Row | None:
    """Return the row with the largest value, None where there is no row."""
    return max((row for row in rows if row is not None), key=value, default=None)


def record_figures(figures: Mapping[str, Figure], path: Path = SUMMARY) -> None:
    """Put the figures into the summary, each with where and when its row was measured."""
    for key, figure in figures.items():
        record("calibration", {key: round(figure.value, 4)}, stamp=figure.row.stamp, path=path)
