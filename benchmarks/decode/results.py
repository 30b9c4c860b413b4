"""The measured rows on disk, as tables of the documentation, and as headline figures."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.docs import markdown_table, put_table
from benchmarks.summary import SUMMARY, provenance, record
from qrealign.files import write_text

if TYPE_CHECKING:
    from benchmarks.decode.measure import Row

RESULTS = Path(__file__).parents[1] / "results"
DOCUMENT = Path(__file__).parents[2] / "docs" / "deploy.md"
ROWS, TABLE = "decode.csv", "decode"
_PROFILE = "decode-profile-"
_SETTINGS = ("geometry", "weights", "batch", "compiled", "cache_tokens", "prompt_tokens", "device")  # of a step
_KEY = (*_SETTINGS, "small", "prompt_piece")
_GEOMETRY = "llama-2-7b"
_GB = 1e9
_FIGURES = {
    "w4a16": ("decode_7b_w4a16_vs_bf16", "memory_7b_w4a16_gb"),
    "w8a8": ("decode_7b_w8a8_vs_bf16", "memory_7b_w8a8_gb"),
}

# What a kernel does, by the first pattern that its name holds; torch.compile names its own after the operations.
_PARTS = {
    "attention": r"sdpa|flash|cudnn|_attention_fwd",
    "products": r"gemv|_few_|_tile_|nvjet|splitK|gemm|decode_int",
    "norms, gates, quantization": r"rms_norm|rsqrt|silu|quantize|amax",
}
_REST = "rest"

Cells = dict[str, str]


def read_rows(folder: Path) -> list[Cells]:
    """Return the rows of a folder, each a line of the CSV file; none where there is no file."""
    path = folder / ROWS
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.is_file() else []


def store_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Write rows with where and when they were measured; one replaces the row of the same settings and device."""
    stamp = provenance()
    new = [
        {**{name: "" if value is None else str(value) for name, value in asdict(row).items()}, **stamp} for row in rows
    ]
    kept = {tuple(cells[name] for name in _KEY): cells for cells in [*read_rows(folder), *new]}
    _write(folder / ROWS, [cells for _, cells in sorted(kept.items())])


def store_profile(folder: Path, row: Row, kernels: Mapping[str, tuple[float, int]]) -> None:
    """Write the kernels of one step: microseconds and launches."""
    how = "small" if row.small else "compiled" if row.compiled else "plain"
    lines = [
        {"kernel": name, "us_a_step": f"{microseconds:.2f}", "launches": str(launches)}
        for name, (microseconds, launches) in kernels.items()
    ]
    _write(folder / f"{_PROFILE}{row.geometry}-{row.weights}-{row.batch}-{how}.csv", lines)


def publish(rows: Sequence[Cells], folder: Path, document: Path | None = None) -> str:
    """Return the tables; write them into `document` and the headline figures into the summary."""
    text = decode_table(rows)
    if profiles := read_profiles(folder):
        what = "Microseconds of a step by kind of kernel, each run alone; in a step one starts while the last one ends"
        text += f"\n{what}:\n\n{part_table(profiles)}"
    if document is not None:
        put_table(document, TABLE, text)
    found = headline(rows)
    if found:
        values, stamp = found
        record("serving", values, stamp=stamp, path=folder / SUMMARY.name)
    return text


def decode_table(rows: Sequence[Cells]) -> str:
    """Return a line for each row, with its speed against bf16 under the same settings, and against compiled bf16."""
    header = [
        "geometry",
        "weights",
        "batch",
        "step",
        "tokens read at once",
        "prefill, tokens/s",
        "step, ms",
        "tokens/s",
        "times bf16",
    ]
    header += ["times compiled bf16", "weights, GB", "with cache, GB", "peak, GB", "peak while loading, GB", "commit"]
    lines = []
    for row in rows:
        lines.append(
            [row["geometry"], _name(row), row["batch"], "compiled" if row["compiled"] == "True" else "plain"]
            + [
                row["prompt_piece"] or "all",
                f"{float(row['prefill_tokens_per_s']):,.0f}",
                f"{float(row['step_ms']):.3f}",
            ]
            + [f"{float(row['tokens_per_s']):,.0f}"]
            + [_ratio(rows, row, row["compiled"]), _ratio(rows, row, "True")]
            + [f"{int(row[f'{name}_bytes']) / _GB:.2f}" for name in ("weight", "total", "peak", "loading")]
            + [row["commit"]]
        )
    return markdown_table(header, lines, "llrl" + "r" * 10)


def read_profiles(folder: Path) -> dict[str, list[Cells]]:
    """Return the kernels of a step by the name of their profile: geometry, weights, batch and kind of step."""
    return {
        path.stem.removeprefix(_PROFILE): list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        for path in sorted(folder.glob(f"{_PROFILE}*.csv"))
    }


def part_table(profiles: Mapping[str, Sequence[Cells]]) -> str:
    """Return a line for each profile: the microseconds of its kernels by what they do, and how many were launched."""
    lines = []
    for name, kernels in profiles.items():
        sums = dict.fromkeys([*_PARTS, _REST], 0.0)
        for kernel in kernels:
            part = next((part for part, pattern in _PARTS.items() if re.search(pattern, kernel["kernel"])), _REST)
            sums[part] += float(kernel["us_a_step"])
        launches = sum(int(kernel["launches"]) for kernel in kernels)
        lines.append([name, *(f"{value:,.0f}" for value in sums.values()), f"{sum(sums.values()):,.0f}", str(launches)])
    return markdown_table(["step", *_PARTS, _REST, "all", "launches"], lines, "l" + "r" * 6)


def headline(rows: Sequence[Cells]) -> tuple[dict[str, float], dict[str, str]] | None:
    """Return the figures at 7B and batch 1 with their stamp: steps as Hugging Face runs them, recorded, and memory.

    Speed and memory of a scheme are of one row: that in little memory where it was measured. What the plain one takes
    stands beside it.
    """
    values: dict[str, float] = {}
    stamp: dict[str, str] = {}
    for row in rows:
        of_goal = (row["geometry"], row["batch"], row["compiled"]) == (_GEOMETRY, "1", "False")
        if not of_goal or row["weights"] not in _FIGURES:
            continue
        base = _baseline(rows, row, row["compiled"])
        small = row["small"] == "True"
        measured_small = any(
            one["small"] == "True" and all(one[name] == row[name] for name in _SETTINGS) for one in rows
        )
        speed, memory = _FIGURES[row["weights"]]
        if measured_small and not small:
            speed, memory = (name.replace(row["weights"], f"{row['weights']}_plain") for name in (speed, memory))
        if base is not None:
            values[speed] = round(float(base["step_ms"]) / float(row["step_ms"]), 3)
        values[memory] = round(int(row["peak_bytes"]) / _GB, 3)
        stamp = {name: row[name] for name in ("device", "torch", "triton", "commit", "date")}
    return (values, stamp) if values else None


def _ratio(rows: Sequence[Cells], row: Cells, compiled: str) -> str:
    base = _baseline(rows, row, compiled)
    return "" if base is None else f"{float(base['step_ms']) / float(row['step_ms']):.2f}"


def _baseline(rows: Sequence[Cells], row: Cells, compiled: str) -> Cells | None:
    """Return the fastest bf16 row of the same settings and device, its step compiled or not."""
    wanted = row | {"weights": "bf16", "compiled": compiled}
    found = [one for one in rows if all(one[name] == wanted[name] for name in _SETTINGS)]
    return min(found, key=lambda one: float(one["step_ms"]), default=None)


def _name(row: Cells) -> str:
    return f"{row['weights']}, in little memory" if row["small"] == "True" else row["weights"]


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
