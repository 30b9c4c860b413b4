"""The calibration benchmark from its command line, on a CPU with a toy's weights: one call, then a report of it."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks.calibration import runner
from benchmarks.calibration.__main__ import main
from benchmarks.docs import markers

NAMES = ("goals", "stages", "steps", "estimate", "kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Measure one short run and return the folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "page.md").write_text("# Page\n" + "\n".join("\n".join(markers(name)) for name in NAMES) + "\nEnd.\n")
    assert main([*arguments(folder), "--only", "realign", "--samples", "8", "--shorten", "50"]) == 0
    return folder


def arguments(folder):
    where = ["--work", str(folder / "work"), "--results", str(folder / "results"), "--docs", str(folder / "page.md")]
    return ["--geometry", "tiny", "--device", "cpu", "--tokens", "24", *where]


def test_a_run_leaves_its_stages_its_rates_and_a_page(folder):
    rows = {row["stage"]: row for row in csv.DictReader((folder / "results" / "calibration.csv").open())}
    assert {"teach", "load", "steps", "pack", "save", "other", "total"} <= set(rows)
    stages = sum(float(row["seconds"]) for stage, row in rows.items() if stage != "total")
    assert stages == pytest.approx(float(rows["total"]["seconds"]), rel=0.02)
    steps = rows["steps"]
    assert (int(steps["steps"]), int(steps["shorten"])) == (3, 47) and int(steps["tokens"]) > 12 * 24
    assert float(steps["full_seconds"]) == pytest.approx(float(steps["seconds"]) * 140 / 3, rel=1e-3)
    assert 0 < float(rows["total"]["peak_host_gb"]) < 4 and float(rows["total"]["gpu_hours"]) == 0
    assert json.loads((folder / "results" / "calibration_rates.json").read_text())["cpu"]["bf16"] > 0
    page = (folder / "page.md").read_text()
    assert page.startswith("# Page") and page.endswith("End.\n")
    assert "| tiny | `realign`, weights resident, 1/47 of the steps |" in page and "Measured on cpu" in page
    left = {path.name for path in (folder / "work" / "runs" / "realign").iterdir()}
    assert left == {"log.txt", "record.json"}  # the packed model would fill the disk


def test_results_of_another_machine_are_taken_over(folder, tmp_path):
    assert (
        main([*arguments(folder), "--only-report", "--results", str(tmp_path), "--merge", str(folder / "results")]) == 0
    )
    for name in ("calibration.csv", "calibration_rates.json"):
        assert (tmp_path / name).read_text() == (folder / "results" / name).read_text()


def test_a_run_that_fails_is_told_in_one_line_and_keeps_what_was_measured(folder, capsys, monkeypatch):
    before = (folder / "results" / "calibration.csv").read_text()
    monkeypatch.setattr(runner, "run_flags", lambda *_, **__: ["--no-such-flag"])
    assert main([*arguments(folder), "--only", "fast"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: fast ended with exit status 2") and "unrecognized arguments: --no-such-flag" in told
    assert (folder / "results" / "calibration.csv").read_text() == before
    assert main([*arguments(folder), "--only", "none"]) == 2
