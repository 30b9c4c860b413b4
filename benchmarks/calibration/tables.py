"""The measured rows as Markdown: aims, stages, steps, the estimate for another card, and the longest kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.calibration.cases import CASES
from benchmarks.calibration.ceilings import RTX_4090, Ceilings
from benchmarks.calibration.estimate import estimate
from benchmarks.calibration.goals import GEOMETRY, GOALS, Figure
from benchmarks.calibration.rows import TOTAL, Row, find_run, runs_of
from benchmarks.calibration.spans import ORDER
from benchmarks.docs import markdown_table

NAME_LENGTH = 70  # of a kernel's name in a table


def goal_table(figures: Mapping[str, Figure]) -> str:
    """Return the aims with what was measured."""
    lines = []
    for goal in GOALS:
        figure = figures.get(goal.key)
        bound = f"{'≥' if goal.at_least else '≤'} {_number(goal.limit)} {goal.unit}"
        measured, verdict = "not measured", ""
        if figure is not None:
            measured = f"**{_number(figure.value)} {goal.unit}**"
            verdict = "reached" if goal.reached(figure.value) else "missed"
        lines.append([goal.what, goal.authors, goal.floor, bound, measured, verdict])
    return markdown_table(["", "authors", "floor", "goal", "measured", ""], lines, "lrrrrl")


def stage_table(rows: Sequence[Row]) -> str:
    """Return every run with the seconds of its stages, the whole, GPU-hours and peaks."""
    stages = [name for name in ORDER if any(row.stage == name for row in rows)]
    header = ["geometry", "run", *(f"{name}, s" for name in stages), "whole, s", "GPU-hours"]
    header += ["device, GiB", "taken from the driver, GiB", "host, GB"]
    lines = []
    for run in runs_of(rows).values():
        total = run[TOTAL]
        seconds = [f"{run[name].seconds:.1f}" if name in run else "" for name in stages]
        peaks = [total.peak_device_gib, total.peak_reserved_gib, total.peak_host_gb]
        lines.append(
            [_geometry(total), _title(total), *seconds, f"{total.seconds:.1f}", f"{total.gpu_hours:.4f}"]
            + [f"{peak:.2f}" for peak in peaks]
        )
    return markdown_table(header, lines, "ll" + "r" * (len(header) - 2))


def step_table(rows: Sequence[Row]) -> str:
    """Return the optimizer's steps of every run: how many, how fast, and how near to the machine's rates."""
    header = ["geometry", "run", "steps", "ms a step", "tokens/s", "optimisation, s", "all steps, s", "floor, s"]
    header += ["PFLOP", "of matmul rate, %", "TB", "of copy rate, %"]
    lines = []
    for run in runs_of(rows).values():
        if (row := run.get("steps")) is None or not row.steps:
            continue
        cells = [f"{row.steps:,}", f"{row.step_ms:.2f}", f"{row.tokens_per_s:,.0f}", f"{row.seconds:.1f}"]
        cells += [
            f"{row.full_seconds:.1f}",
            f"{row.floor_s:.1f}",
            f"{row.petaflop:.2f}",
            f"{100 * row.matmul_share:.0f}",
        ]
        lines.append([_geometry(row), _title(row), *cells, f"{row.terabytes:.2f}", f"{100 * row.copy_share:.0f}"])
    return markdown_table(header, lines, "ll" + "r" * (len(header) - 2))


def estimate_table(rows: Sequence[Row], ceilings: Mapping[str, Ceilings]) -> str:
    """Return the whole `realign` run at 7B on an RTX 4090, stage by stage; empty where it was not measured."""
    run = find_run([row for row in rows if row.device in ceilings], GEOMETRY, "realign")
    if run is None:
        return ""
    here = ceilings[run[TOTAL].device]
    rates = markdown_table(
        ["", "copy, GB/s", "bf16, TFLOP/s", "int8, TOP/s", "from the host, GB/s"],
        [
            [name, *(f"{value:,.0f}" for value in (found.copy, found.bf16, found.int8, found.host_copy))]
            for name, found in ((f"{run[TOTAL].device}, measured", here), ("RTX 4090, taken", RTX_4090))
        ],
        "lrrrr",
    )
    parts = estimate(run, here, RTX_4090)
    lines = [
        [part.stage, f"{part.measured_s:.1f}", f"{part.factor:.2f}", part.reason, f"{part.seconds:.1f}"]
        for part in parts
    ]
    lines.append(
        ["whole", f"{sum(part.measured_s for part in parts):.1f}", "", "", f"{sum(part.seconds for part in parts):.1f}"]
    )
    header = ["stage", "measured, s", "factor", "why", "RTX 4090, s"]
    return f"{rates}\n{markdown_table(header, lines, 'lrrlr')}"


def kernel_tables(kernels: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the longest kernels of the profiled runs' steps, by case."""
    parts = []
    for case, rows in kernels.items():
        whole = sum(row["seconds"] for row in rows)
        lines = [
            (
                f"`{row['name'][:NAME_LENGTH]}`",
                f"{row['calls']:,}",
                f"{1e3 * row['seconds']:.1f}",
                f"{100 * row['seconds'] / whole:.0f}",
            )
            for row in rows[:10]
        ]
        title = CASES[case].title
        parts.append(f"{title}\n\n" + markdown_table(["kernel", "calls", "ms", "share, %"], lines, "lrrr"))
    return "\n".join(parts)


def provenance_lines(rows: Sequence[Row]) -> str:
    """Return one sentence on the machines, versions and commits behind the rows."""
    machines = sorted(
        {f"{row.device}, torch {row.torch}, triton {row.triton}, transformers {row.transformers}" for row in rows}
    )
    commits = sorted({f"{row.commit} ({row.date})" for row in rows})
    return f"Measured on {'; '.join(machines)}, at commit {', '.join(commits)}."


def _geometry(row: Row) -> str:
    return (
        row.geometry if row.layers == row.full_layers else f"{row.geometry}, {row.layers} of {row.full_layers} blocks"
    )


def _title(row: Row) -> str:
    title = CASES[row.case].title if row.case in CASES else row.case
    return title if row.shorten == 1 else f"{title}, 1/{row.shorten} of the steps"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
