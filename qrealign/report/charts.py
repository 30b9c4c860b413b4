"""Charts as inline SVG, drawn by hand: no script, no font, no library, and colours that follow the page's theme.

Coordinates are in the SVG's own units; classes such as `c-aligned` take their colour from the page's style sheet. Every
text that comes from outside goes through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qrealign.records import Score

Point = tuple[float, float]
_MAX_LINE_POINTS = 400
_MARKED_POINTS = 48
_LOG_FROM_RATIO = 30.0
_MARKERS = {
    "base": "ring",
    "aligned": "circle",
    "finetuned": "triangle",
    "quantized": "square",
    "realigned": "diamond",
    "benign": "ring",
    "malicious": "triangle",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: `key` names its colour class and marker, `title` its legend entry."""

    key: str
    title: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A plotting area: maps data to drawing units inside its margins."""

    width: float
    height: float
    x_range: Point
    y_range: Point
    left: float = 46
    right: float = 12
    top: float = 10
    bottom: float = 36
    log_y: bool = False

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1.0) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = (self._level(end) for end in self.y_range)
        return (
            self.height
            - self.bottom
            - (self._level(value) - low) / ((high - low) or 1.0) * (self.height - self.top - self.bottom)
        )

    def _level(self, value: float) -> float:
        return math.log10(value) if self.log_y else value


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    y_range: Point | None = None,
    x_ticks: Sequence[tuple[float, str]] = (),
    separators: bool = False,
    allow_log: bool = False,
    width: float = 480,
) -> str:
    """Return lines over a shared x axis; `x_ticks` replaces the numbers below it, `separators` draws a line at each.

    With `allow_log` the y axis is logarithmic where the values are positive and span more than a factor of 30.
    """
    series = [
        Series(key=line.key, title=line.title, points=_thinned(_finite(line.points)), dashed=line.dashed)
        for line in series
    ]
    everything = [point for line in series for point in line.points]
    if not everything:
        return ""
    ys = [y for _, y in everything]
    log_y = allow_log and min(ys) > 0 and max(ys) / min(ys) > _LOG_FROM_RATIO
    frame = Frame(
        width=width,
        height=264,
        x_range=_span([x for x, _ in everything]),
        log_y=log_y,
        y_range=y_range or _y_range(ys, log_y),
    )
    ticks = x_ticks or [(value, _short(value)) for value in ticks_between(*frame.x_range, 6) if value == int(value)]
    parts = [_axes(frame, ticks, x_label, y_label, separators)]
    parts += [_line(frame, line) for line in series]
    return _svg(frame.width, frame.height, label, parts)


def interval_chart(
    rows: Sequence[tuple[str, Sequence[tuple[str, str, Score]]]], *, label: str, lane: float = 17, width: float = 560
) -> str:
    """Return percentages as dots with their intervals: per row a name and its (key, title, score), on a 0-100 axis."""
    gap, top = 13.0, 8.0
    height = top + sum(len(scores) * lane + gap for _, scores in rows) + 30
    longest = max((len(name) for name, _ in rows), default=0)
    frame = Frame(
        width=width,
        height=height,
        x_range=(0, 100),
        y_range=(0, 1),
        left=min(170.0, 20 + 6.6 * longest),
        right=44,
        top=top,
        bottom=30,
    )
    parts = [_vertical_grid(frame, [(value, f"{value}") for value in (0, 25, 50, 75, 100)])]
    y = top
    for name, scores in rows:
        middle = y + len(scores) * lane / 2
        parts.append(
            f'<text class="name" x="{frame.left - 12:.1f}" y="{middle + 4:.1f}" text-anchor="end">'
            f"{escape(_cut(name, 24))}<title>{escape(name)}</title></text>"
        )
        for key, title, score in scores:
            parts.append(_whisker(frame, y + lane / 2, key, f"{name}, {title}", score))
            y += lane
        y += gap
    return _svg(frame.width, frame.height, label, parts)


def scatter_chart(points: Sequence[tuple[float, float, int]], x_range: Point, y_range: Point, *, label: str) -> str:
    """Return prompts of both classes in a plane; points beyond the ranges lie on the edge, a line marks x = 0."""
    frame = Frame(width=260, height=210, x_range=x_range, y_range=y_range, left=10, right=10, top=10, bottom=24)
    parts = [
        f'<rect class="panel" x="{frame.left}" y="{frame.top}" width="{frame.width - 20:.0f}" '
        f'height="{frame.height - 34:.0f}" rx="4"/>'
    ]
    if x_range[0] < 0 < x_range[1]:
        zero = frame.x(0.0)
        parts.append(
            f'<line class="border" x1="{zero:.1f}" x2="{zero:.1f}" y1="{frame.top}" '
            f'y2="{frame.height - frame.bottom}"/>'
        )
    for x, y, kind in points:
        inside = frame.x(min(max(x, x_range[0]), x_range[1])), frame.y(min(max(y, y_range[0]), y_range[1]))
        parts.append(marker("malicious" if kind == 1 else "benign", *inside, 3.2, "dot"))
    parts.append(f'<text class="tick" x="{frame.left}" y="{frame.height - 8}">← benign</text>')
    parts.append(
        f'<text class="tick" x="{frame.width - frame.right}" y="{frame.height - 8}" text-anchor="end">malicious '
        f"→</text>"
    )
    return _svg(frame.width, frame.height, label, parts)


def robust_range(values: Sequence[float]) -> Point:
    """Return a range with the middle 98 % of `values` and some air: one outlier must not flatten the rest."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return -1.0, 1.0
    low, high = ordered[int(0.01 * (len(ordered) - 1))], ordered[math.ceil(0.99 * (len(ordered) - 1))]
    air = 0.12 * (high - low) or 1.0
    return low - air, high + air


def ticks_between(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round values between `low` and `high`."""
    step_raw = (high - low) / max(count, 1)
    if step_raw <= 0 or not math.isfinite(step_raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(step_raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step_raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def marker(key: str, x: float, y: float, size: float, extra: str = "") -> str:
    """Return the marker of a model or class: the shape tells it apart without its colour."""
    shape = _MARKERS.get(key, "circle")
    css = f'class="mark c-{key} {shape} {extra}"'
    if shape == "triangle":
        tall = size * 1.15
        return (
            f'<path {css} d="M{x:.1f} {y - tall:.1f}L{x + tall:.1f} {y + size * 0.8:.1f}L{x - tall:.1f} '
            f'{y + size * 0.8:.1f}Z"/>'
        )
    if shape == "square":
        return (
            f'<rect {css} x="{x - size * 0.9:.1f}" y="{y - size * 0.9:.1f}" width="{size * 1.8:.1f}" '
            f'height="{size * 1.8:.1f}"/>'
        )
    if shape == "diamond":
        wide = size * 1.3
        return (
            f'<path {css} d="M{x:.1f} {y - wide:.1f}L{x + wide:.1f} {y:.1f}L{x:.1f} {y + wide:.1f}L{x - wide:.1f} '
            f'{y:.1f}Z"/>'
        )
    return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'


def legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    """Return a legend for (key, title, dashed) as a list."""
    items = []
    for key, title, dashed in entries:
        swatch = (
            f'<line class="line c-{key}{" dashed" if dashed else ""}" x1="1" x2="21" y1="7" y2="7"/>'
            if key not in ("benign", "malicious")
            else ""
        )
        mark = "" if dashed or key.startswith("series") else marker(key, 11, 7, 3.6)
        items.append(
            f'<li><svg viewBox="0 0 22 14" width="22" height="14" aria-hidden="true">{swatch}{mark}</svg>'
            f"{escape(title)}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _axes(frame: Frame, x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str, separators: bool) -> str:
    """Return grid lines, tick texts and axis titles."""
    floor, right = frame.height - frame.bottom, frame.width - frame.right
    parts = []
    for value in _y_ticks(frame):
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{frame.left - 7}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    for value, text in _spaced(x_ticks):
        x = frame.x(value)
        line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{floor}"/>' if separators else ""
        parts.append(
            f'{line}<text class="tick" x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{escape(text)}</text>'
        )
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    parts.append(
        f'<text class="label" x="{(frame.left + right) / 2:.1f}" y="{frame.height - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    middle = (frame.top + floor) / 2
    parts.append(
        f'<text class="label" transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _vertical_grid(frame: Frame, ticks: Sequence[tuple[float, str]]) -> str:
    """Return the grid of a horizontal percentage axis."""
    floor = frame.height - frame.bottom
    return "".join(
        f'<line class="grid" x1="{frame.x(value):.1f}" x2="{frame.x(value):.1f}" y1="{frame.top}" y2="{floor}"/>'
        f'<text class="tick" x="{frame.x(value):.1f}" y="{floor + 17}" text-anchor="middle">{text} %</text>'
        for value, text in ticks
    )


def _line(frame: Frame, line: Series) -> str:
    """Return one line, with markers where they do not crowd."""
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in line.points)
    drawn = (
        f'<path class="line c-{line.key}{" dashed" if line.dashed else ""}" d="M{path}"><title>'
        f"{escape(line.title)}</title></path>"
    )
    if line.dashed or line.key.startswith("series") or len(line.points) > _MARKED_POINTS:
        return drawn
    return drawn + "".join(marker(line.key, frame.x(x), frame.y(y), 3.2) for x, y in line.points)


def _whisker(frame: Frame, y: float, key: str, title: str, score: Score) -> str:
    """Return one score: interval, dot and value."""
    low, high, at = frame.x(score.low), frame.x(score.high), frame.x(score.value)
    return (
        f"<g><title>{escape(title)}: {score.value:.1f} % ({score.low:.1f} to {score.high:.1f}, n = {score.n})</title>"
        f'<line class="whisker c-{key}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f"{marker(key, at, y, 4)}"
        f'<text class="value" x="{max(high, at + 5) + 7:.1f}" y="{y + 4:.1f}">{score.value:.1f}</text></g>'
    )


def _y_ticks(frame: Frame) -> list[float]:
    """Return the y axis's ticks: powers of ten (and 3 of them where there are few) on a logarithmic axis."""
    low, high = frame.y_range
    if not frame.log_y:
        return ticks_between(low, high, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 3) if high / low < 1000 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _y_range(values: Sequence[float], log_y: bool) -> Point:
    """Return the values' range with some air; a linear axis starts at zero and ends on a tick."""
    if log_y:
        return min(values) / 1.25, max(values) * 1.15
    low, high = min(0.0, min(values)), max(values)
    ticks = ticks_between(low, high, 5)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return low, math.ceil(high / step - 1e-9) * step or 1.0


def _spaced(ticks: Sequence[tuple[float, str]], most: int = 12) -> Sequence[tuple[float, str]]:
    """Return every k-th tick so that at most `most` remain."""
    return ticks[:: math.ceil(len(ticks) / most)] if ticks else ticks


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most `_MAX_LINE_POINTS` points, the last one included."""
    stride = math.ceil(len(points) / _MAX_LINE_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _span(values: Sequence[float]) -> Point:
    """Return the range of `values`, never empty."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _short(value: float) -> str:
    """Return a tick's number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cut(text: str, length: int) -> str:
    """Return `text`, shortened with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"
