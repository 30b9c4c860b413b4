"""The report's end of the terminal: a table, the verdict and the cost."""

from __future__ import annotations

from collections.abc import Sequence

from qrealign.report.model import Metric, RunReport, lower_title
from qrealign.report.text import DASH, MINUS, TIMES, cell, comparison_line, cost_line, recipe
from qrealign.report.verdict import headline, verdict

_GAP = "  "


def terminal_table(report: RunReport) -> str:
    """Return plain text for a terminal: scores by model with 95 % intervals, the verdict with its reasons, the cost."""
    passed, reasons = verdict(report)
    lines = [f"{report.name}: {recipe(report)}", ""]
    lines += _table(report) if report.measured_metrics else ["No model was evaluated."]
    lines += ["", f"{'PASSED' if passed else 'NOT PASSED'}  {headline(report)}"]
    lines += [f"  - {reason}" for reason in reasons]
    lines += [line for line in (comparison_line(report),) if line]
    if cost := cost_line(report):
        lines.append(f"Cost: {cost}.")
    return _plain("\n".join(lines))


def _table(report: RunReport) -> list[str]:
    """Return the score table's lines, columns aligned."""
    rows = [["", *(lower_title(name) for name in report.columns)]]
    rows += [
        [_row_title(metric), *(cell(report.score(name, metric.name)) for name in report.columns)]
        for metric in report.measured_metrics
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _row_title(metric: Metric) -> str:
    """Return a metric's name with its unit, and its good direction where that is up."""
    unit, direction = ", %" if metric.percent else "", " (higher is better)" if metric.better == "higher" else ""
    return f"{metric.title.lower()}{unit}{direction}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line: first column to the left, the others to the right."""
    return _GAP.join(
        [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
    )


def _plain(text: str) -> str:
    """Return `text` without the signs that a terminal without UTF-8 cannot print."""
    for sign, plain in ((DASH, "-"), (MINUS, "-"), (TIMES, "x"), ("→", "->")):
        text = text.replace(sign, plain)
    return text
