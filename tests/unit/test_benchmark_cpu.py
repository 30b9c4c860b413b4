"""The CPU benchmark: what it times, what it writes, and what its headline compares."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from benchmarks.cpu import __main__ as command
from benchmarks.cpu.__main__ import Timing
from benchmarks.cpu.paths import PATHS, Layer


def test_every_path_computes_the_layer() -> None:
    torch.manual_seed(0)
    layer = Layer.random(64, 128, 2)
    expected = layer.x.float() @ layer.weight.float().T
    compared = 0
    for family, paths in PATHS.items():
        for name, prepare in paths.items():
            if command.CODES_GIVEN in name:
                continue
            try:
                product = prepare(layer)().float()
            except RuntimeError:
                continue  # this build of torch lacks it
            error = (product - expected).norm() / expected.norm()
            assert error < (0.2 if family == "int4" else 0.05), name
            compared += 1
    assert compared >= 6


def test_a_run_writes_table_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs, output = tmp_path / "cpu.md", tmp_path / "results" / "cpu.csv"
    docs.write_text("<!-- cpu table: begin -->\n<!-- cpu table: end -->\n", encoding="utf-8")
    threads = torch.get_num_threads()
    try:
        arguments = ["--shapes", "64x128", "--tokens", "1", "3", "--seconds", "0", "--output", str(output)]
        assert command.main([*arguments, "--docs", str(docs), "--summary", str(tmp_path / "summary.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "| int8 | **qrealign w8a8** |" in docs.read_text(encoding="utf-8")
    with output.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["tokens"] for row in rows} == {"1", "3"}
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    assert "torch's best" not in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()


def timings(tokens: int, ours: float, torch_whole: float, torch_codes: float) -> list[Timing]:
    rows, columns = command.HEADLINE[0]
    paths = {
        command.OURS: ours,
        "torch a": torch_whole,
        "torch b": torch_whole + 1,
        "torch c, codes given": torch_codes,
    }
    return [Timing(rows, columns, tokens, "int8", path, time, time, time) for path, time in paths.items()]


def test_headline_is_the_smaller_ratio_to_torchs_best_whole_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    by_tokens = {1: timings(1, 1.0, 1.5, 0.1), 128: timings(128, 4.0, 5.0, 0.1)}
    monkeypatch.setattr(command, "measure", lambda rows, columns, tokens, seconds: by_tokens[tokens])
    summary, output = tmp_path / "summary.json", tmp_path / "cpu.csv"
    monkeypatch.setattr("benchmarks.summary.commit", lambda: "abc-dirty" if output.exists() else "abc")
    arguments = ["--tokens", "1", "128", "--output", str(output), "--summary", str(summary)]
    assert command.main(arguments) == 0
    figure = json.loads(summary.read_text())["serving"]["cpu_int8_linear_vs_torch"]
    assert (figure["value"], figure["commit"]) == (1.25, "abc"), "its own output is no change of the tree"
