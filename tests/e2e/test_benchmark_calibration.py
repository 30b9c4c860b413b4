"""The calibration benchmark from its command line, on a CPU with a toy's weights: one call, then a report of it."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks.calibration.__main__ import main
from benchmarks.docs import markers

NAMES = ("goals", "stages", "steps", "estimate", "kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Measure one short run of the block-wise engine and return the folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "page.md").write_text("# Page\n" + "\n".join("\n".join(markers(name)) for name in NAMES) + "\nEnd.\n")
    assert main([*arguments(folder), "--only", "parity", "--samples", "8", "--shorten", "20"]) == 0
    return folder


def arguments(folder):
    where = ["--work", str(folder / "work"), "--results", str(folder / "results"), "--docs", str(folder / "page.md")]
    return ["--geometry", "tiny", "--device", "cpu", "--tokens", "24", *where]


def test_a_run_leaves_its_stages_its_rates_and_a_page(folder):
    rows = {row["stage"]: row for row in csv.DictReader((folder / "results" / "calibration.csv").open())}
    assert {"probe", "load", "capture", "steps", "pack", "save", "other", "total"} <= set(rows)
    stages = sum(float(row["seconds"]) for stage, row in rows.items() if stage != "total")
    assert stages == pytest.approx(float(rows["total"]["seconds"]), rel=0.02)
    steps = rows["steps"]
    assert int(steps["steps"]) >= 2 and int(steps["tokens"]) == pytest.approx(24 * int(steps["steps"]), rel=0.1)
    assert float(steps["full_seconds"]) > float(steps["seconds"]) and int(steps["shorten"]) > 1
    assert 0 < float(rows["total"]["peak_host_gb"]) < 4 and float(rows["total"]["gpu_hours"]) == 0
    assert json.loads((folder / "results" / "calibration_rates.json").read_text())["cpu"]["bf16"] > 0
    page = (folder / "page.md").read_text()
    assert page.startswith("# Page") and page.endswith("End.\n")
    assert "| tiny | block-wise, parity mode, 1/" in page and "Measured on cpu" in page
    assert not [path for path in (folder / "work").iterdir() if path.name == "parity"], "the run's output is removed"


def test_results_of_another_machine_are_taken_over(folder, tmp_path):
    assert main([*arguments(folder), "--only-report", "--results", str(tmp_path), "--merge", str(folder / "results")]) == 0
    for name in ("calibration.csv", "calibration_rates.json"):
        assert (tmp_path / name).read_text() == (folder / "results" / name).read_text()


def test_a_run_that_fails_is_told_in_one_line_and_keeps_what_was_measured(folder, capsys):
    before = (folder / "results" / "calibration.csv").read_text()
    assert main([*arguments(folder), "--only", "parity", "--samples", "100000"]) == 1
    assert "error: parity ended with exit status 2" in capsys.readouterr().err
    assert (folder / "results" / "calibration.csv").read_text() == before
    assert main([*arguments(folder), "--only", "none"]) == 2
