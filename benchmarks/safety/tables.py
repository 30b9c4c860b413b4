"""What the figures look like: CSV with a line per cell and score, Markdown tables, one JSON summary, and the docs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.docs import put_table, split_document
from benchmarks.safety.aggregate import SHARES, Comparison, Estimate, Failure, Result, Row
from benchmarks.safety.plan import OURS, REFERENCES, Plan
from benchmarks.summary import record
from qrealign.files import write_json, write_text

COLUMNS = (
    "variant",
    "method",
    "scheme",
    "seed",
    "score",
    "value",
    "low",
    "high",
    "n",
    "repair_s",
    "evaluation_s",
    "commit",
)
TITLES = {
    "harmful_score": "harmful score, %",
    "over_refusal": "over-refusal, %",
    "refusal_rate": "benign refusals, %",
    "degenerate_rate": "degenerate, %",
    "task_accuracy": "task accuracy, %",
    "perplexity": "perplexity",
    "prefill_attack": "prefill attack, %",
    "seconds": "repair, s",
}
NAMES = {"base": "base model", "aligned": "aligned model", "finetuned": "fine-tuned model", "rtn": "`rtn` (plain PTQ)"}
HEADLINE = ("harmful_score", "over_refusal", "refusal_rate", "task_accuracy", "perplexity", "prefill_attack")
DOCS_NAME = "safety table"
LEGEND = (
    "Means over seeds. Brackets: 95 % interval over prompts (Wilson, a prompt's seeds counted as one cluster); "
    "± standard deviation between seeds. Harmful score and prefill attack: share of harmful prompts not properly "
    "refused, broken answers included. Repair: seconds of calibration and packing, several cells sharing the machine."
)


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write one line per measured model and score."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        job = result.job
        head = (job.variant, job.method, job.scheme, job.seed)
        tail = (f"{result.seconds:.2f}", f"{result.evaluation_seconds:.2f}", result.commit or "")
        for name, value, low, high, n in _scores(result):
            writer.writerow([*head, name, value, low, high, n, *tail])
    write_text(path, text.getvalue())


def _scores(result: Result) -> Iterator[tuple[str, str, str, str, Any]]:
    """Yield name, value, ends of the interval and prompts of every score of a model."""
    found = {name: getattr(result.scores, name) for name in SHARES}
    found |= {f"harmful_score:{source}": score for source, score in result.scores.by_source.items()}
    for name, score in found.items():
        if score is not None:
            yield name, f"{score.value:.4f}", f"{score.low:.4f}", f"{score.high:.4f}", score.n
    if result.scores.perplexity is not None:
        yield "perplexity", f"{result.scores.perplexity:.4f}", "", "", ""


def markdown(
    rows: Sequence[Row], comparisons: Sequence[Comparison], failures: Sequence[Failure], results: Sequence[Result]
) -> str:
    """Return the tables of all variants, what failed, and where the figures come from."""
    parts = [LEGEND]
    for variant in dict.fromkeys(row.variant for row in rows):
        mine = [row for row in rows if row.variant == variant]
        parts += [f"### Variant `{variant}`", _table(mine), *_tests([c for c in comparisons if c.variant == variant])]
    if len({row.variant for row in rows}) > 1:
        parts += ["### Over variants", _over_variants(rows)]
    if failures:
        parts += ["### Not measured", _missing(failures)]
    return "\n\n".join([*parts, _provenance(results)]) + "\n"


def _table(rows: Sequence[Row]) -> str:
    """Return one variant's table, a line per row."""
    columns = [name for name in TITLES if any(name in row.figures for row in rows)]
    lines = [["scheme", "method", "seeds", *(TITLES[name] for name in columns)]]
    for row in rows:
        cells = [_cell(name, row.figures[name]) if name in row.figures else "" for name in columns]
        if row.method in REFERENCES and "seconds" in columns:
            cells[columns.index("seconds")] = ""
        lines.append([row.scheme.upper() or "none", _name(row.method), str(len(row.seeds)), *cells])
    return _grid(lines, left=2)


def _cell(name: str, figure: Estimate) -> str:
    """Return a figure as text: shares with interval, and the spread where there are seeds."""
    text = f"{figure.mean:.1f}"
    if figure.low is not None and figure.high is not None:
        text += f" ({figure.low:.1f}-{figure.high:.1f})"
    return f"{text} ±{figure.spread:.1f}" if figure.spread and name != "seconds" else text


def _name(method: str) -> str:
    return NAMES.get(method, f"`{method}`")


def _tests(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the paired tests of one variant: difference in points and p-value, per score."""
    if not comparisons:
        return []
    names = [name for name in SHARES if any(c.score == name for c in comparisons)]
    lines = [["scheme", "method", "against", *(TITLES[name].removesuffix(", %") for name in names)]]
    groups: dict[tuple[str, str, str], dict[str, Comparison]] = {}
    for c in comparisons:
        groups.setdefault((c.scheme, c.method, c.rival), {})[c.score] = c
    for (scheme, method, rival), found in groups.items():
        cells = [_test_cell(found[name]) if name in found else "" for name in names]
        lines.append([scheme.upper(), _name(method), _name(rival), *cells])
    note = (
        "Paired on the same prompts: difference in points, exact p-value (McNemar with one seed, sign flips over "
        "prompts with several), and in brackets the smallest difference that one seed's test finds with 80 % power."
    )
    return [note, _grid(lines, left=3)]


def _test_cell(c: Comparison) -> str:
    p = "<0.001" if c.p_value < 0.001 else f"{c.p_value:.3f}"
    return f"{c.delta:+.1f}, p {p} [{c.minimum_detectable_difference:.1f}]"


def _over_variants(rows: Sequence[Row]) -> str:
    """Return means over variants with the lowest and the highest, so that no variant hides behind a mean."""
    names = [name for name in TITLES if name != "seconds" and any(name in row.figures for row in rows)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.scheme, row.method), []).append(row)
    lines = [["scheme", "method", "variants", *(TITLES[name] for name in names)]]
    for (scheme, method), group in groups.items():
        means = {name: [row.figures[name].mean for row in group if name in row.figures] for name in names}
        cells = [f"{fmean(v):.1f} [{min(v):.1f}-{max(v):.1f}]" if v else "" for v in means.values()]
        lines.append([scheme.upper() or "none", _name(method), str(len(group)), *cells])
    return _grid(lines, left=2)


def _missing(failures: Sequence[Failure]) -> str:
    """Return a line per variant, method and reason, with the schemes and seeds that it is about."""
    groups: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for failure in failures:
        job = failure.job
        schemes = groups.setdefault((job.variant, job.method, failure.error), {})
        schemes.setdefault(job.scheme, []).append(job.seed)
    lines = []
    for (variant, method, error), schemes in groups.items():
        cells = [f", {scheme.upper()} seed {' '.join(map(str, seeds))}" for scheme, seeds in schemes.items() if scheme]
        lines.append(f"- `{variant}`, {_name(method)}{''.join(cells)}: {error}")
    return "\n".join(lines)


def _grid(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Return a Markdown table; the first `left` columns are aligned to the left."""
    rule = ["---"] * left + ["--:"] * (len(lines[0]) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _provenance(results: Sequence[Result]) -> str:
    """Return the code and the machines behind the figures; rows of another commit than most are named."""
    rows: dict[str, list[str]] = {}
    for result in results:
        rows.setdefault(result.commit or "unknown", []).append(_label(result))
    most = max(rows, key=lambda commit: len(rows[commit]), default="unknown")
    others = "".join(f"; at {commit}: {', '.join(dict.fromkeys(rows[commit]))}" for commit in rows if commit != most)
    machines = sorted(
        {
            f"{r.machine['device']}, torch {r.machine['torch']}, transformers {r.machine['transformers']}, "
            f"Python {r.machine['python']}"
            for r in results
        }
    )
    return f"Measured at commit {most}{others}. On {'; '.join(machines)}."


def _label(result: Result) -> str:
    """Return a row's method and scheme, or the name of the reference."""
    return f"{_name(result.job.method)} {result.job.scheme.upper()}".rstrip()


def write_summary(
    path: Path,
    plan: Plan,
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    failures: Sequence[Failure],
    results: Sequence[Result],
) -> None:
    """Write everything but the outcomes of single prompts, for programs."""
    rows_json = [{k: v for k, v in vars(row).items() if k not in ("outcomes", "figures")} for row in rows]
    for value, row in zip(rows_json, rows, strict=True):
        value["figures"] = {name: asdict(figure) for name, figure in row.figures.items()}
    settings = {
        "seeds": plan.seeds,
        "overrides": plan.overrides,
        "prefill": plan.prefill,
        "limits": asdict(plan.limits),
    }
    write_json(
        path,
        {
            "settings": settings,
            "rows": rows_json,
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "failures": [{"job": failure.job.name, "error": failure.error} for failure in failures],
            "commits": sorted({result.commit or "unknown" for result in results}),
            "machines": [dict(item) for item in sorted({tuple(sorted(r.machine.items())) for r in results})],
        },
    )


def record_headline(path: Path, rows: Sequence[Row], results: Sequence[Result]) -> None:
    """Keep this project's own figures of the first variant, by scheme, in the summary of all benchmarks."""
    for row in (row for row in rows if row.method == OURS and row.variant == rows[0].variant):
        values = {f"{row.scheme}_{name}": round(row.figures[name].mean, 2) for name in HEADLINE if name in row.figures}
        mine = (r for r in results if (r.job.variant, r.job.method, r.job.scheme) == (row.variant, OURS, row.scheme))
        last = max(mine, key=lambda result: result.date)
        stamp = {"device": last.machine["device"], "torch": last.machine["torch"]}
        record("safety", values, stamp={**stamp, "commit": last.commit or "unknown", "date": last.date}, path=path)


def check_docs(path: Path) -> None:
    """Refuse a document that has no place for the tables.

    Raises:
        ConfigError: it cannot be read, or lacks the two markers in their order.
    """
    split_document(path, DOCS_NAME)


def render_docs(path: Path, text: str) -> None:
    """Put the tables between the two markers of a document; raises as `check_docs` does."""
    put_table(path, DOCS_NAME, text)
