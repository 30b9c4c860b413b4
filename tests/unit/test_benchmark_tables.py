"""Aggregation arithmetic of the safety benchmark, and the text made of it."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import pytest

from benchmarks.docs import markers
from benchmarks.safety.aggregate import Failure, Result, compare, comparisons_of, load_results, rows_of
from benchmarks.safety.plan import Job
from benchmarks.safety.plots import draw_plots
from benchmarks.safety.tables import DOCS_NAME, check_docs, markdown, record_headline, render_docs, write_csv
from qrealign.errors import ConfigError, DataError, QrealignError
from qrealign.evaluate.statistics import mcnemar, minimum_detectable_difference, score, wilson
from qrealign.files import write_json
from qrealign.records import ModelScores
from tests.bench_helpers import plan_of

BEGIN, END = markers(DOCS_NAME)
MACHINE = {"device": "a CPU", "torch": "2", "transformers": "5", "python": "3.12"}


def bits(text: str) -> list[bool]:
    return [bit == "1" for bit in text]


def result(method, harmful, *, scheme="w8a8", seed=0, variant="v", perplexity=100.0, seconds=10.0):
    outcomes = {"harmful_score": bits(harmful), "task_accuracy": bits(harmful[::-1])}
    scores = ModelScores(
        perplexity=perplexity,
        outcomes=outcomes,
        by_source={"advbench": score(outcomes["harmful_score"])},
        **{name: score(values) for name, values in outcomes.items()},
    )
    kind = "cell" if scheme else "reference"
    return Result(
        job=Job(kind=kind, variant=variant, method=method, scheme=scheme, seed=seed),
        scores=scores,
        seconds=seconds,
        evaluation_seconds=5.0,
        commit="abc",
        date="2026-11-22",
        machine=MACHINE,
    )


RESULTS = [
    result("aligned", "0000000001", scheme=""),
    result("rtn", "1111111110"),
    result("realign", "0000000011", seed=0, perplexity=101.0, seconds=20.0),
    result("realign", "0000000111", seed=1, perplexity=103.0, seconds=30.0),
]


def test_rows_of_another_commit_than_most_are_named():
    later = [replace(row, commit="def") for row in RESULTS if row.job.method == "realign"]
    mixed = [*RESULTS[:2], result("paper", "01"), *later]
    text = markdown(rows_of(mixed), [], [], mixed)
    assert "Measured at commit abc; at def: `realign` W8A8. On a CPU" in text


def test_a_row_holds_mean_spread_and_an_interval_that_counts_a_prompt_once():
    row = rows_of(RESULTS)[2]
    harmful = row.figures["harmful_score"]
    assert (row.method, row.seeds, harmful.mean, harmful.n) == ("realign", (0, 1), 25.0, 10)
    assert harmful.spread == pytest.approx(50**0.5)  # of 20 and 30
    # Not narrower than twenty independent tries, not wider than ten.
    assert (
        wilson(2.5, 10)[0] <= harmful.low <= wilson(5, 20)[0] < wilson(5, 20)[1] <= harmful.high <= wilson(2.5, 10)[1]
    )
    assert (row.figures["perplexity"].mean, row.figures["perplexity"].low) == (102.0, None)
    assert row.figures["seconds"].mean == 25.0 and row.by_source == {"advbench": 25.0}


def test_rows_come_variant_by_variant_and_scheme_by_scheme():
    methods = [result(m, "01", scheme=s, variant=v) for m in ("rtn", "paper") for v in "vw" for s in ("w8a8", "w4a4")]
    rows = rows_of([*methods, *(result("aligned", "01", scheme="", variant=v) for v in "vw")])
    assert [(row.variant, row.scheme, row.method) for row in rows[:6]] == [
        ("v", "", "aligned"),
        ("v", "w8a8", "rtn"),
        ("v", "w8a8", "paper"),
        ("v", "w4a4", "rtn"),
        ("v", "w4a4", "paper"),
        ("w", "", "aligned"),
    ]


def test_one_seed_gives_wilson_and_mcnemar():
    rows = rows_of([RESULTS[1], RESULTS[2]])
    figure = rows[1].figures["harmful_score"]
    assert (figure.low, figure.high) == wilson(2, 10) and figure.spread == 0
    found = compare(rows[1], rows[0], "harmful_score")
    mine, theirs = (r.scores.outcomes["harmful_score"] for r in (RESULTS[2], RESULTS[1]))
    assert found.p_value == pytest.approx(mcnemar(mine, theirs))
    assert found.delta == pytest.approx(-70) and (found.n, found.seeds) == (10, 1)
    assert found.minimum_detectable_difference == minimum_detectable_difference(10, discordant_share=0.9)


def test_the_detectable_difference_is_that_of_one_seed():
    tries = {"paper": ["1100" * 20, "0011" * 20], "realign": ["0000" * 20] * 2}  # half differ in each seed
    first, second = rows_of([result(m, bits, seed=s) for m, seeds in tries.items() for s, bits in enumerate(seeds)])
    found = compare(first, second, "harmful_score")
    assert found.minimum_detectable_difference == minimum_detectable_difference(80, discordant_share=0.5)


def test_plain_rounding_and_references_stand_for_every_seed():
    rows = rows_of(RESULTS)
    found = {(c.method, c.rival): c for c in comparisons_of(rows) if c.score == "harmful_score"}
    assert set(found) == {("rtn", "realign"), ("rtn", "aligned"), ("realign", "rtn"), ("realign", "aligned")}
    assert found["realign", "rtn"].seeds == 2 and found["realign", "rtn"].delta == pytest.approx(-65)
    # Prompts differ in 3, 2 and 1 of 2 tries...: the sign-flip test over prompts, by enumeration.
    first, second = [2] * 9 + [0], [0] * 7 + [1, 2, 2]
    sizes = [abs(a - b) for a, b in zip(first, second, strict=True)]
    signs = [sum(s if mask >> i & 1 else -s for i, s in enumerate(sizes)) for mask in range(2 ** len(sizes))]
    exact = sum(abs(total) >= abs(sum(second) - sum(first)) for total in signs) / len(signs)
    assert found["realign", "rtn"].p_value == pytest.approx(exact)


def test_methods_without_a_common_seed_or_prompt_are_not_compared():
    first, second = rows_of([result("paper", "0011", seed=0), result("realign", "0011", seed=1)])
    assert compare(first, second, "harmful_score") is None
    assert compare(first, second, "over_refusal") is None
    short = rows_of([result("realign", "001", seed=0)])[0]
    assert compare(first, short, "harmful_score") is None


def test_markdown_names_failures_schemes_and_provenance():
    rows = rows_of([*RESULTS, *(result("rtn", "1100", variant="w", scheme=s) for s in ("w8a8", "w4a4"))])
    missing = [("w4a4", 1, "it diverged"), ("w4a4", 2, "it diverged"), ("w8a8", 0, "it diverged"), ("w8a8", 2, "late")]
    failures = [
        Failure(job=Job(kind="cell", variant="v", method="paper", scheme=scheme, seed=seed), error=error)
        for scheme, seed, error in missing
    ]
    text = markdown(rows, comparisons_of(rows), failures, RESULTS)
    assert "| none | aligned model | 1 | 10.0 (1.8-40.4) |" in text
    assert "| W8A8 | `realign` | 2 | 25.0 (" in text and "±7.1" in text
    assert "- `v`, `paper`, W4A4 seed 1 2, W8A8 seed 0: it diverged\n- `v`, `paper`, W8A8 seed 2: late" in text
    assert "Measured at commit abc. On a CPU, torch 2, transformers 5, Python 3.12." in text
    assert "| W8A8 | `rtn` (plain PTQ) | 2 | 70.0 [50.0-90.0] |" in text  # over variants: mean, lowest, highest
    assert "| W8A8 | `realign` | `rtn` (plain PTQ) | -65.0, p " in text


def test_csv_has_a_line_per_model_and_score(tmp_path):
    write_csv(tmp_path / "table.csv", RESULTS)
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(lines) == 4 * 4
    last = [line for line in lines if line["method"] == "realign" and line["seed"] == "1"]
    assert {line["score"]: line["value"] for line in last} == {
        "harmful_score": "30.0000",
        "task_accuracy": "30.0000",
        "harmful_score:advbench": "30.0000",
        "perplexity": "103.0000",
    }
    assert last[0]["n"] == "10" and last[0]["repair_s"] == "30.00" and last[-1]["low"] == ""


def test_headline_figures_are_those_of_this_project_with_where_they_come_from(tmp_path):
    path = tmp_path / "summary.json"
    record_headline(path, rows_of(RESULTS[:2]), RESULTS[:2])
    assert not path.is_file()
    several = [*RESULTS, replace(result("realign", "01", scheme="w4a4"), commit="def")]
    record_headline(path, rows_of(several), several)
    found = json.loads(path.read_text())["safety"]
    names = ("harmful_score", "task_accuracy", "perplexity")
    assert set(found) == {f"{scheme}_{name}" for scheme in ("w8a8", "w4a4") for name in names}
    assert found["w4a4_harmful_score"]["commit"] == "def"
    stamp = {"device": "a CPU", "torch": "2", "commit": "abc", "date": "2026-11-22"}
    assert found["w8a8_harmful_score"] == {"value": 25.0, **stamp}


def test_docs_keep_everything_outside_the_markers(tmp_path):
    path = tmp_path / "safety.md"
    path.write_text(f"before {BEGIN} old {END} after")
    render_docs(path, "new")
    assert path.read_text() == f"before {BEGIN}\n\nnew\n{END} after"
    path.write_text(f"{END} {BEGIN}")
    with pytest.raises(ConfigError, match="needs the lines"):
        check_docs(path)


def test_plots_without_matplotlib_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(QrealignError, match="pip install matplotlib"):
        draw_plots(tmp_path, rows_of(RESULTS))


def test_a_result_that_is_none_is_named(tmp_path):
    plan = plan_of(tmp_path, "--methods", "rtn", "--schemes", "w8a8")
    job = plan.measurements()[0]
    assert [failure.error for failure in load_results(plan)[1]] == ["not measured"] * 3
    write_json(plan.result_file(job), {"scores": {}})
    with pytest.raises(DataError, match=r"aligned.json is no result of this benchmark"):
        load_results(plan)
    plan.result_file(job).write_text("{")
    with pytest.raises(DataError, match="remove it"):
        load_results(plan)
    write_json(plan.result_file(job), {"error": "it broke"})
    assert json.loads(plan.result_file(job).read_text())["error"] == load_results(plan)[1][0].error
