"""Pictures of the table: safety against over-refusal, and the harmful score by source; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.safety.aggregate import Row
from benchmarks.safety.plan import OURS
from qrealign.errors import QrealignError
from qrealign.files import write_aside


def draw_plots(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw two pictures per variant and scheme as SVG into `folder`; return their paths.

    Raises:
        QrealignError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps, rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QrealignError(
            "the plots need matplotlib: pip install matplotlib, then run the same command again"
        ) from error
    drawn = []
    for variant, scheme in dict.fromkeys((row.variant, row.scheme) for row in rows if row.scheme):
        chosen = [row for row in rows if row.variant == variant and row.scheme in ("", scheme)]
        for name, draw in (("trade-off", _draw_trade_off), ("sources", _draw_sources)):
            figure = Figure(figsize=(7.5, 5), layout="constrained")
            axes = figure.subplots()
            axes.set_prop_cycle(color=[colormaps["tab20"](shade) for shade in range(20)])  # methods are more than 10
            draw(axes, chosen)
            figure.suptitle(f"{variant}, {scheme.upper()}")
            path = folder / f"{variant}-{scheme}-{name}.svg"
            with write_aside(path) as aside, rc_context({"svg.hashsalt": path.stem}):  # the same figures, the same file
                figure.savefig(aside, format="svg", metadata={"Date": None})
            drawn.append(path)
    return drawn


def _draw_trade_off(axes: Any, rows: Sequence[Row]) -> None:
    """Draw each row as a point with its intervals: harmful score to the right, over-refusal upwards."""
    for row in rows:
        harmful, refusal = row.figures.get("harmful_score"), row.figures.get("over_refusal")
        if harmful is None or refusal is None:
            continue
        axes.errorbar(
            harmful.mean,
            refusal.mean,
            xerr=[[harmful.mean - (harmful.low or 0)], [(harmful.high or 0) - harmful.mean]],
            yerr=[[refusal.mean - (refusal.low or 0)], [(refusal.high or 0) - refusal.mean]],
            fmt="o" if row.scheme else "s",
            label=row.method,
            capsize=2,
            markersize=9 if row.method == OURS else 6,
        )
    axes.set(xlabel="harmful score, %", ylabel="over-refusal, %", xlim=(-2, 102), ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="squares: not quantized", title_fontsize="small")


def _draw_sources(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the harmful score of each source as a group of bars, one per row."""
    sources = sorted({source for row in rows for source in row.by_source})
    width = 0.8 / max(1, len(rows))
    for number, row in enumerate(rows):
        places = [index + (number + 0.5) * width - 0.4 for index in range(len(sources))]
        axes.bar(places, [row.by_source.get(source, 0.0) for source in sources], width=width, label=row.method)
    axes.set_xticks(range(len(sources)), sources, rotation=45, ha="right", fontsize="small")
    axes.set(ylabel="harmful score, %", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
