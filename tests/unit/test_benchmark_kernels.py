"""What the tuner writes into launch tables, and what becomes of the kernel benchmark's rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.docs import markers
from benchmarks.kernels import measures
from benchmarks.kernels.results import DOCS_NAME, Row, headline_figures, publish, read_rows, write_rows
from benchmarks.timing import CACHE_BYTES, rotations
from benchmarks.tunables.tunable import all_tunables
from qrealign_kernels import launches
from qrealign_kernels.reference_calibration import WeightGradients

FORWARD = Row(
    kernel="fake_quant_weight, forward",
    variant="clip",
    shape="8 x 8",
    bytes=256,
    operations=0,
    copies=3,
    seconds=2.0,
    definition_seconds=9.0,
    floor_s=1.0,
    copy_gb_s=4273.0,
    device="a GPU",
    torch="2",
    triton="3",
    commit="abc",
    date="2026-11-22",
)
ONCE = dataclasses.replace(FORWARD, copies=1, seconds=1.0, floor_s=0.9)
UNCOUNTED = dataclasses.replace(FORWARD, copies=0, seconds=100.0)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [FORWARD, ONCE])
    assert read_rows(tmp_path / "rows.csv") == [FORWARD, ONCE]


def test_headline_weighs_each_linear_by_how_often_a_block_has_it() -> None:
    figures = headline_figures([FORWARD, ONCE, UNCOUNTED])
    assert figures == {"fake_quant_forward_copy_share": pytest.approx((3 * 1.0 + 0.9) / (3 * 2.0 + 1.0))}
    assert headline_figures([UNCOUNTED]) == {}


def test_publishing_writes_the_figures_and_the_table(tmp_path: Path) -> None:
    docs, summary = tmp_path / "kernels.md", tmp_path / "summary.json"
    begin, end = markers(DOCS_NAME)
    docs.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    text = publish([FORWARD, UNCOUNTED], docs, summary)
    assert "| fake_quant_weight, forward | clip | 8 x 8 |" in text
    assert text in docs.read_text() and "old" not in docs.read_text()
    figure = json.loads(summary.read_text())["calibration"]["fake_quant_forward_copy_share"]
    assert (figure["value"], figure["device"]) == (0.5, "a GPU")


def test_every_linear_of_a_block_is_counted_once_forward_and_once_backward() -> None:
    found = list(measures.all_measures())
    for kernel in ("fake_quant_weight, forward", "fake_quant_weight, backward"):
        assert sum(measure.copies for measure in found if measure.kernel == kernel) == 7
    assert len({(measure.kernel, measure.variant, measure.shape) for measure in found}) == len(found)


def test_wrong_codes_and_gradients_give_no_number() -> None:
    codes = torch.zeros(100, dtype=torch.int8)
    one_off = codes.clone()
    one_off[0] = 1
    measures._check_codes(lambda: (one_off,), lambda: (codes,), 0.01)
    with pytest.raises(AssertionError, match="too many"):
        measures._check_codes(lambda: (one_off,), lambda: (codes,), 0.001)
    with pytest.raises(AssertionError, match="more than a step"):
        measures._check_codes(lambda: (2 * one_off,), lambda: (codes,), 1.0)
    truth = {"low_logit": torch.ones(4)}
    measures._check_gradients(WeightGradients(low_logit=torch.ones(4)), truth)
    with pytest.raises(AssertionError, match="gradient of low_logit is off"):
        measures._check_gradients(WeightGradients(low_logit=2 * torch.ones(4)), truth)


def test_candidates_are_complete_choices() -> None:
    default = launches.table(launches.DEFAULT)
    for tunable in all_tunables().values():
        for key in tunable.keys:
            assert (candidates := tunable.candidates(key)), (tunable.name, key)
            if (entries := default.get(tunable.name)) is not None:  # one without is used only where it was tuned
                known = set(entries.get(key) or entries[launches.DEFAULT])
                assert all(set(choice) == known for choice in candidates), (tunable.name, key)


@pytest.mark.parametrize(
    ("found", "standing", "expected"),
    [
        ([], None, None),
        ([(1.0, {"A": 1})], None, {"A": 1}),
        ([(1.0, {"A": 1}), (1.001, {"A": 2})], {"A": 2}, {"A": 2}),  # no better than the noise
        ([(1.0, {"A": 1}), (1.1, {"A": 2})], {"A": 2}, {"A": 1}),
        ([(1.0, {"A": 1})], {"A": 2}, {"A": 1}),  # what stands cannot run here
        ([], {"A": 2}, {"A": 2}),
        ([(1.0, {"A": 1}), (1.1, None)], None, {"A": 1}),
        ([(1.0, None), (1.1, {"A": 1})], {"A": 1}, None),  # the way without the kernel is the faster one
    ],
)
def test_a_table_changes_only_for_what_is_faster(found, standing, expected) -> None:
    assert tune.better_choice(found, standing) == expected


def test_a_written_table_is_read_as_it_is_and_has_a_line_a_key(tmp_path: Path) -> None:
    table = {"b": {"default": {"BLOCK": 1}}, "a": {"1": {"BLOCK": 2}, "2": {"BLOCK": 4}}}
    tune.write_table(tmp_path / "t.json", table)
    text = (tmp_path / "t.json").read_text()
    assert json.loads(text) == table
    assert len(text.splitlines()) == 9


def test_committed_tables_are_as_the_tuner_writes_them(tmp_path: Path) -> None:
    for path in launches.TABLES.glob("*.json"):
        tune.write_table(tmp_path / path.name, json.loads(path.read_text()))
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name


def test_inputs_rotate_past_the_cache() -> None:
    assert rotations(CACHE_BYTES) == 2
    assert rotations(CACHE_BYTES // 8) == 8
    assert rotations(1) == 64
