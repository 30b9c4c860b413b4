"""The results of an evaluation, as data, as text and as JUnit XML."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qrealign.assess.gate import Verdict, find_score, score_names, title_of
from qrealign.evaluate.statistics import FEWEST_PROMPTS, minimum_detectable_difference, spread
from qrealign.records import ModelScores, Score
from qrealign.report.json_report import finite, model_column
from qrealign.report.markdown import escape
from qrealign.report.text import DASH, MINUS, TIMES, cell, p_value, seconds, signed

Harness = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model: `given` is what the user called it, `harness` the numbers of lm-evaluation-harness by task."""

    title: str
    given: str
    scores: ModelScores
    harness: Harness = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Everything that one evaluation found; `other` is the model compared with, `comparison` as of `compare_scores`."""

    model: Column
    other: Column | None
    verdict: Verdict
    comparison: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]
    wall_seconds: float


def column_json(column: Column) -> dict[str, Any]:
    """Return a model's scores in the shape of one model of report.json, with what else was measured."""
    value = {"name": column.title, "path": column.given, **model_column(column.scores)}
    if column.scores.seeds:
        value["seeds"] = {
            name: {"values": values, "standard_deviation": spread(values)}
            for name, values in column.scores.seeds.items()
        }
    if column.harness:
        value["lm_eval"] = column.harness
    return value


def scores_json(found: Assessment) -> dict[str, Any]:
    """Return the evaluated model's scores with the verdict: what `--json` prints."""
    return finite({**column_json(found.model), "verdict": _verdict_json(found.verdict), "comparison": found.comparison})


def assessment_json(found: Assessment) -> dict[str, Any]:
    """Return everything: what evaluation.json holds."""
    columns = {"model": found.model} | ({} if found.other is None else {"against": found.other})
    return finite(
        {
            "verdict": _verdict_json(found.verdict),
            "models": {key: column_json(column) for key, column in columns.items()},
            "comparison": found.comparison,
            "examples": {key: column.scores.examples for key, column in columns.items()},
            "settings": found.settings,
            "versions": found.versions,
            "notes": found.notes,
            "wall_seconds": found.wall_seconds,
        }
    )


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    conditions = [{"name": one.name, "passed": one.passed, "reason": one.sentence} for one in verdict.conditions]
    return {"passed": verdict.passed, "reasons": verdict.reasons, "conditions": conditions}


def junit_xml(found: Assessment) -> str:
    """Return JUnit XML: one test case per condition of the verdict, skipped where it could not be checked."""
    conditions = found.verdict.conditions
    counts = {
        "tests": len(conditions),
        "failures": sum(one.passed is False for one in conditions),
        "errors": 0,
        "skipped": sum(one.passed is None for one in conditions),
    }
    suite = ElementTree.Element("testsuite", {"name": "qrealign.evaluate", "time": f"{found.wall_seconds:.3f}"})
    for name, count in counts.items():
        suite.set(name, str(count))
    for one in conditions:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": found.model.title, "name": one.name, "time": "0"}
        )
        if one.passed is None:
            ElementTree.SubElement(case, "skipped", {"message": one.sentence})
        elif one.passed is False:
            ElementTree.SubElement(case, "failure", {"message": one.sentence, "type": "limit"}).text = one.sentence
        else:
            ElementTree.SubElement(case, "system-out").text = one.sentence
    # As bytes: text would be declared to be in the locale's encoding, and files are written in UTF-8.
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True).decode() + "\n"


def terminal_text(found: Assessment) -> str:
    """Return the results for a terminal, in ASCII: table, verdict, remarks."""
    rows = table_rows(found)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines = [lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:]), "", _verdict_line(found)]
    lines += [f"  - {reason}" for reason in found.verdict.reasons]
    lines += [f"Note: {note}." for note in found.notes]
    lines.append(f"Measured in {seconds(found.wall_seconds)}.")
    text = "\n".join(lines)
    for sign, plain in ((DASH, "-"), (MINUS, "-"), (TIMES, "x")):
        text = text.replace(sign, plain)
    return text


def markdown(found: Assessment) -> str:
    """Return the results as a Markdown document."""
    header, *rows = table_rows(found)
    lines = [
        f"# Evaluation of {escape(found.model.title)}",
        "",
        _row(header),
        _row(["---", *["--:"] * (len(header) - 1)]),
    ]
    lines += [_row(row) for row in rows]
    lines += ["", f"**{_verdict_line(found)}**", "", *(f"- {escape(reason)}" for reason in found.verdict.reasons), ""]
    lines += [f"- Note: {escape(note)}." for note in found.notes]
    lines += ["", "Brackets are 95 % intervals. Settings:", ""]
    lines += [f"- {name}: {value}" for name, value in {**found.settings, **found.versions}.items()]
    return "\n".join(lines) + "\n"


def table_rows(found: Assessment) -> list[list[str]]:
    """Return the table of scores, header first: one row per score, then one per source of the harmful prompts."""
    columns = [found.model, *([found.other] if found.other is not None else [])]
    header = ["", *(column.title for column in columns)]
    header += ["difference", "detectable"] if found.other is not None else []
    rows = [header]
    for name in score_names(found.model.scores):
        title = title_of(name) if name == "perplexity" else f"{title_of(name)}, %"
        row = [title, *(_cell(column.scores, name) for column in columns)]
        rows.append(row + (_compared(found.comparison.get(name, {})) if found.other is not None else []))
    if len(found.model.scores.by_source) > 1:
        for source in found.model.scores.by_source:
            row = [f"  harmful: {source}", *(cell(column.scores.by_source.get(source)) for column in columns)]
            rows.append(row + ["", ""] * (found.other is not None))
    for task, metric in _harness_names(columns):
        row = [f"lm-eval: {task} {metric}"]
        row += [_harness_cell(column.harness.get(task, {}), metric) for column in columns]
        rows.append(row + ["", ""] * (found.other is not None))
    return rows


def detectable_note(scores: ModelScores) -> str | None:
    """Return how large a difference of harmful scores this number of prompts could show, None without any."""
    if scores.harmful_score is None:
        return None
    n = scores.harmful_score.n
    if n < FEWEST_PROMPTS:
        return f"{n} harmful prompts can show no difference between two models: ask {FEWEST_PROMPTS} at the very least"
    return (
        f"{n} harmful prompts can show a difference between two models of {minimum_detectable_difference(n):.1f} "
        "points or more (McNemar's test, power 0.8, where the models differ on a fifth of the prompts)"
    )


def _cell(scores: ModelScores, name: str) -> str:
    """Return one cell; several seeds add the standard deviation between them."""
    score = find_score(scores, name)
    text = cell(score)
    if isinstance(score, Score) and (values := scores.seeds.get(name)):
        return f"{text} sd {spread(values):.1f}"
    return text


def _compared(comparison: dict[str, Any]) -> list[str]:
    """Return the difference with its p-value, and what the test could have found."""
    if "ratio" in comparison:
        return [f"{TIMES} {comparison['ratio']:.3f}", ""]
    if not comparison:
        return ["", ""]
    least = comparison.get("minimum_detectable_difference")
    difference = f"{signed(comparison['delta'])}, {p_value(comparison['p_value'])}"
    return [difference, "" if least is None else f"{least:.1f}"]


def _harness_names(columns: Sequence[Column]) -> list[tuple[str, str]]:
    names = ((task, name) for column in columns for task, values in column.harness.items() for name in values)
    return [(task, name) for task, name in dict.fromkeys(names) if "stderr" not in name]


def _harness_cell(values: dict[str, float], metric: str) -> str:
    if metric not in values:
        return DASH
    name, comma, rest = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{rest}")
    return f"{values[metric]:.4f}" + ("" if error is None else f" (se {error:.4f})")


def _verdict_line(found: Assessment) -> str:
    word = {True: "PASSED", False: "FAILED", None: "NOT JUDGED"}[found.verdict.passed]
    return f"{word}  {found.verdict.headline}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"
