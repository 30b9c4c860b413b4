"""Rows of the sweep as CSV, as the table of the documentation, and as headline figures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.docs import markdown_table
from benchmarks.gemm.peers import BASELINE, CALIBRATION_ROWS, LARGE, PEERS

FIELDS = (
    "peer",
    "K",
    "N",
    "M",
    "us",
    "baseline_us",
    "eager_us",
    "error",
    "note",
    "device",
    "torch",
    "triton",
    "commit",
    "date",
)
SMALL = (1, 8, 16)
# figure -> who, against whom, at which numbers of tokens
FIGURES: dict[str, dict[str, tuple[str, str, tuple[int, ...]]]] = {
    "serving": {
        "w8a8_small_m_vs_bf16": ("ours w8a8", BASELINE, SMALL),
        "w8a8_small_m_vs_gemlite": ("ours w8a8", "gemlite w8a8", SMALL),
        "w8a8_large_m_vs_bf16": ("ours w8a8", BASELINE, LARGE),
        "w4a16_m1_vs_bf16": ("ours w4a16", BASELINE, (1,)),
        "w4a16_m8_16_vs_bf16": ("ours w4a16", BASELINE, (8, 16)),
        "w4a16_large_m_vs_bf16": ("ours w4a16", BASELINE, (256, *LARGE)),
    },
    "calibration": {"int8_forward_vs_int_mm": ("ours int8 forward", "torch._int_mm", (CALIBRATION_ROWS,))},
}
Row = Mapping[str, Any]
Times = dict[tuple[str, int, int, int], float]


def times(rows: Iterable[Row], field: str = "us") -> Times:
    """Return (peer, K, N, M) -> microseconds in a CUDA graph, of the peer or (`baseline_us`) of the baseline beside."""
    return {
        (row["peer"], int(row["K"]), int(row["N"]), int(row["M"])): float(row[field]) for row in rows if row.get(field)
    }


def figures(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return section -> figure -> geometric mean, over the shapes, of how many times faster; what is missing is not."""
    rows = list(rows)
    found, beside = times(rows), times(rows, "baseline_us")
    shapes = sorted({key[1:3] for key in found})
    result: dict[str, dict[str, float]] = {}
    for section, named in FIGURES.items():
        for name, (mine, theirs, tokens) in named.items():
            pairs = [((mine, *shape, m), (theirs, *shape, m)) for shape in shapes for m in tokens]
            if all(key in found for pair in pairs for key in pair) and pairs:
                given = beside if theirs == BASELINE else {}
                logs = [math.log(given.get(my, found[their]) / found[my]) for my, their in pairs]
                result.setdefault(section, {})[name] = round(math.exp(sum(logs) / len(logs)), 3)
    return result


def to_csv(rows: Iterable[Row]) -> str:
    """Return the rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        rounded = {name: f"{row[name]:.4g}" for name in ("us", "baseline_us", "eager_us", "error") if name in row}
        writer.writerow({**row, **rounded})
    return text.getvalue()


def from_csv(text: str) -> list[dict[str, Any]]:
    """Return the rows that `to_csv` wrote, without empty fields."""
    return [{name: value for name, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]


def table(rows: Sequence[Row]) -> str:
    """Return a line a shape and number of tokens: microseconds of the baseline, how many times faster the others.

    Where the baseline was timed by turns with a peer, the peer is compared with that.
    """
    found, beside, peers = (
        times(rows),
        times(rows, "baseline_us"),
        [name for name in PEERS if any(row["peer"] == name for row in rows)],
    )
    others = [name for name in peers if name != BASELINE]
    body = []
    for shape in dict.fromkeys(key[1:3] for key in found):
        for tokens in sorted({key[3] for key in found if key[1:3] == shape}):
            base = found.get((BASELINE, *shape, tokens))
            keys = [(name, *shape, tokens) for name in others]
            cells = [_cell(found.get(key), beside.get(key, base)) for key in keys]
            body.append([f"{shape[0]} x {shape[1]}", str(tokens), "-" if base is None else f"{base:.1f}", *cells])
    notes = {(row["peer"], row["note"]) for row in rows if row.get("note") and not row.get("us")}
    lines = [f"- {peer}: {note}\n" for peer, note in sorted(notes)]
    first = next((row for row in rows if row.get("us")), {})
    where = "{device}, torch {torch}, triton {triton}, commit {commit}, {date}.\n\n".format_map(first) if first else ""
    text = where + markdown_table(["K x N", "M", f"{BASELINE}, µs", *others], body, "l" + "r" * (2 + len(others)))
    return text + ("\n" + "".join(lines) if lines else "")


def _cell(us: float | None, base: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.1f} µs" if base is None else f"{base / us:.2f}"
