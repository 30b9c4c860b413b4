"""The rows of the kernel benchmark: a CSV file, the table of the documentation, two headline figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.docs import markdown_table, put_table
from benchmarks.summary import SUMMARY, record
from qrealign.files import write_text

RESULTS = SUMMARY.parent / "kernels.csv"
DOCS_NAME = "kernel table"
HEADLINES = {
    "fake_quant_forward_copy_share": "fake_quant_weight, forward",
    "fake_quant_backward_copy_share": "fake_quant_weight, backward",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; seconds are medians. `floor_s` is what bytes at the copy's rate, or products at theirs, take."""

    kernel: str
    variant: str
    shape: str
    bytes: int
    operations: int
    copies: int
    seconds: float
    definition_seconds: float
    floor_s: float
    copy_gb_s: float
    device: str
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def share(self) -> float:
        """Share of what the GPU can do: floor over time."""
        return self.floor_s / self.seconds


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file."""
    kinds: Mapping[str, type] = {"int": int, "float": float, "str": str}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(**{field.name: kinds[str(field.type)](line[field.name]) for field in fields(Row)})
            for line in csv.DictReader(file)
        ]


def headline_figures(rows: Sequence[Row]) -> dict[str, float]:
    """Return the share of the copy's rate that a 7B block's linears reach together, each as often as it is there."""
    figures = {}
    for name, kernel in HEADLINES.items():
        counted = [row for row in rows if row.kernel == kernel and row.copies]
        if counted:
            seconds = sum(row.copies * row.seconds for row in counted)
            figures[name] = sum(row.copies * row.floor_s for row in counted) / seconds
    return figures


def table(rows: Sequence[Row]) -> str:
    """Return the table of the documentation, and where its rows come from."""
    body = [
        [
            row.kernel,
            row.variant,
            row.shape,
            f"{row.bytes / 1e6:,.1f}" if row.bytes >= 1e5 else f"{row.bytes / 1e6:.3f}",
            f"{row.operations / 1e9:,.1f}" if row.operations else "-",
            f"{row.seconds * 1e6:,.1f}",
            f"{100 * row.share:.0f} %",
            f"{row.definition_seconds * 1e6:,.0f}",
        ]
        for row in rows
    ]
    header = ["op", "of what", "shape", "MB", "GFLOP", "µs", "share of ceiling", "definition, µs"]
    origin = rows[0]
    commits = " and ".join(dict.fromkeys(row.commit for row in rows))
    figures = ", ".join(f"`{name}` {value:.2f}" for name, value in headline_figures(rows).items())
    return markdown_table(header, body, "lllrrrrr") + (
        f"\n{origin.device}, torch {origin.torch}, triton {origin.triton}, commit {commits}, {origin.date}; copy "
        f"{origin.copy_gb_s:,.0f} GB/s read and written. Linears of a Llama-2-7B block together, each as often as it "
        f"is there: {figures}.\n"
    )


def publish(rows: Sequence[Row], docs: Path | None, summary: Path) -> str:
    """Write the headline figures and, where asked, the documentation's table; return the table."""
    if figures := headline_figures(rows):
        stamp = {name: getattr(rows[0], name) for name in ("device", "torch", "triton", "commit", "date")}
        record("calibration", figures, stamp=stamp, path=summary)
    text = table(rows)
    if docs is not None:
        put_table(docs, DOCS_NAME, text)
    return text
