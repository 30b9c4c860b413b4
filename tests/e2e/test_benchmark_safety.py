"""The safety benchmark on a tiny model: results, tables, resuming, a failing cell, and worker processes."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks.docs import markers
from benchmarks.safety.__main__ import main
from benchmarks.safety.tables import DOCS_NAME
from tests.bench_helpers import arguments

ONE_CELL = ["--methods", "reconstruction", "--schemes", "w8a8", "--seeds", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run two methods with one scheme and one seed, and return the folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    begin, end = markers(DOCS_NAME)
    (folder / "safety.md").write_text(f"# Safety\n\n{begin}\nold\n{end}\n\nThe end.\n")
    places = ["--docs", str(folder / "safety.md"), "--results", str(folder / "kept")]
    assert main(arguments(folder, *ONE_CELL, *places)) == 0
    return folder


def result(folder, name):
    return json.loads((folder / "out" / "results" / "broken" / f"{name}.json").read_text())


def test_every_measurement_leaves_a_result_and_no_model(run):
    out = run / "out"
    assert {file.stem for file in (out / "results" / "broken").iterdir()} == {
        "aligned",
        "finetuned",
        "rtn-w8a8-s0",
        "reconstruction-w8a8-s0",
    }
    found = result(run, "reconstruction-w8a8-s0")
    assert found["settings"]["options"]["samples"] == 16 and found["versions"]["device"]
    # No probe is fitted for a method that asks none: its seconds would be counted as the method's.
    assert [stage["name"] for stage in found["cost"]] == ["calibrate", "pack", "evaluate"]
    assert len(found["scores"]["outcomes"]["harmful_score"]) == 12
    assert not list(out.glob("cells/**/*.safetensors"))


def test_all_models_are_asked_the_same_and_nothing_that_calibration_sees(run):
    benign = (run / "out" / "prompts" / "benign.jsonl").read_text().splitlines()
    assert len(benign) == 8 and not any("calibration" in row for row in benign)
    begun = json.loads((run / "out" / "prompts" / "prefill-broken.json").read_text())["rows"]
    for name in ("aligned", "finetuned", "rtn-w8a8-s0", "reconstruction-w8a8-s0"):
        outcomes = result(run, name)["scores"]["outcomes"]
        assert [len(outcomes[key]) for key in ("over_refusal", "refusal_rate", "task_accuracy")] == [4, 8, 6]
        assert len(outcomes["prefill_attack"]) == len(begun) > 0


def test_tables_and_plots_are_written(run):
    rows = list(csv.DictReader((run / "out" / "table.csv").open()))
    assert {row["method"] for row in rows} == {"aligned", "finetuned", "rtn", "reconstruction"}
    assert {"harmful_score", "harmful_score:alpha", "perplexity"} <= {row["score"] for row in rows}
    assert (run / "kept" / "safety.csv").read_text() == (run / "out" / "table.csv").read_text()
    table = (run / "out" / "table.md").read_text()
    assert "| W8A8 | `reconstruction` | 1 |" in table and "Not measured" not in table
    docs = (run / "safety.md").read_text()
    assert docs.startswith("# Safety") and docs.endswith("The end.\n") and "old" not in docs and table in docs
    summary = json.loads((run / "out" / "summary.json").read_text())
    assert {(c["method"], c["rival"]) for c in summary["comparisons"]} >= {
        ("reconstruction", "rtn"),
        ("reconstruction", "aligned"),
    }
    pytest.importorskip("matplotlib")
    assert {file.name for file in (run / "out" / "plots").iterdir()} == {
        "broken-w8a8-trade-off.svg",
        "broken-w8a8-sources.svg",
    }


def test_second_run_measures_only_what_is_missing_or_was_made_otherwise(run, capsys):
    results = run / "out" / "results" / "broken"
    (results / "reconstruction-w8a8-s0.json").unlink()
    before = (results / "finetuned.json").stat().st_mtime_ns
    assert main(arguments(run, *ONE_CELL)) == 0
    assert "[1/1] broken/reconstruction-w8a8-s0: ok" in capsys.readouterr().err
    assert (results / "finetuned.json").stat().st_mtime_ns == before
    # Another recipe: its cell is made anew, the references and plain rounding stand.
    assert main(arguments(run, *ONE_CELL, "--option", *["samples=12", "epochs=1", "batch_size=8"])) == 0
    err = capsys.readouterr().err
    assert "broken/reconstruction-w8a8-s0: ok" in err and "broken/finetuned" not in err
    assert main(arguments(run, *ONE_CELL, "--only-report", "--again", "reconstruction")) == 0
    assert "forgot 1 results" in capsys.readouterr().err and not (results / "reconstruction-w8a8-s0.json").exists()
    assert "`broken`, `reconstruction`, W8A8 seed 0: not measured" in (run / "out" / "table.md").read_text()


def test_interrupted_cell_goes_on_from_its_packed_model(run, monkeypatch, capsys):
    from benchmarks.safety import jobs

    def stop(*_):
        raise KeyboardInterrupt

    command = arguments(run, "--methods", "rtn", "--schemes", "w8a16", "--seeds", "0", "--keep-models")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_evaluate", stop)
        assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    packed = run / "out" / "cells" / "broken" / "rtn-w8a16-s0" / "state" / "pack.done.json"
    before = packed.stat().st_mtime_ns
    assert not (run / "out" / "results" / "broken" / "rtn-w8a16-s0.json").exists()
    assert main(command) == 0
    assert packed.stat().st_mtime_ns == before and "scores" in result(run, "rtn-w8a16-s0")


def test_a_cell_that_fails_says_why_and_stops_no_other(tmp_path, capsys):
    # The tiny aligned model refuses nothing, so there is nothing that realign could learn from it.
    command = arguments(tmp_path, "--methods", "realign", *ONE_CELL[2:], "--prefill", "none")
    assert main([*command, "--limit", "2", "--benign", "2"]) == 1
    failed = result(tmp_path, "realign-w8a8-s0")
    assert "the aligned model refuses only 0" in failed["error"] and "scores" not in failed
    assert "scores" in result(tmp_path, "rtn-w8a8-s0")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "- `broken`, `realign`, W8A8 seed 0: the aligned model refuses" in table
    assert "1 measurements are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--schemes", "w3a3"], "unknown scheme 'w3a3'"),
        (["--methods", "no-such"], "unknown method 'no-such'"),
        (["--option", "steps"], "NAME=VALUE"),
        (["--option", "speed=3"], "'speed' is no option"),
        (["--methods", "rtn:samples=-1"], "--samples must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--variants", "sst2"], "unknown variant 'sst2'"),
        (["--devices", "cuda:99"], "cuda:99"),
        (["--docs", "nowhere.md"], "nowhere.md cannot be read"),
        (["--finetuned", "nowhere"], "nowhere"),
        (["--workers", "-1"], "--workers must be 0 or more"),
    ],
)
def test_bad_input_is_one_sentence(run, capsys, flags, words):
    assert main(arguments(run, *flags)) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


def test_a_worker_process_trains_and_measures(tmp_path, capfd):
    """From nothing: the attack is trained, pairs that it never saw begin the prefill attack, a process measures."""
    command = arguments(tmp_path, "--methods", "rtn", "--schemes", "w8a8", "--workers", "1", "--limit", "2")
    command += ["--prefill", "pairs"]
    index = command.index("--finetuned")
    command[index : index + 2] = ["--variants", "sst2-p05-e1"]
    assert main(command) == 0, capfd.readouterr().err
    assert (tmp_path / "out" / "variants" / "sst2-p05-e1" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "logs" / "worker-0.log").is_file()
    assert "`rtn`" in (tmp_path / "out" / "table.md").read_text()
