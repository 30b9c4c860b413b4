"""The summary of figures: nothing is lost when one is added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import summary


def test_recording_keeps_other_figures_and_says_where_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QREALIGN_COMMIT", "abc1234")
    path = tmp_path / "results" / "summary.json"
    summary.record("serving", {"a": 1.0, "b": 2.0}, path=path)
    summary.record("serving", {"b": 3.0}, device="a test", path=path)
    found = json.loads(path.read_text())["serving"]
    assert (found["a"]["value"], found["b"]["value"], found["b"]["device"]) == (1.0, 3.0, "a test")
    assert set(found["a"]) == {"value", "device", "torch", "triton", "commit", "date"}
    assert found["a"]["commit"] == "abc1234"


def test_merging_takes_over_what_another_machine_measured(tmp_path: Path) -> None:
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    summary.record("serving", {"a": 1.0}, path=here)
    summary.record("calibration", {"c": 5.0}, device="elsewhere", path=there)
    summary.merge([there], into=here)
    found = json.loads(here.read_text())
    assert found["serving"]["a"]["value"] == 1.0
    assert found["calibration"]["c"]["device"] == "elsewhere"


def test_the_commit_is_git_s_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QREALIGN_COMMIT", raising=False)
    assert summary.commit()
