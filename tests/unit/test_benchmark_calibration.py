"""The calibration benchmark without a run: shapes, weights, counting, spans, rows, figures and tables."""

from __future__ import annotations

import json
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from benchmarks.calibration import command, runner, spans, worker
from benchmarks.calibration.cases import CASES, find_cases, run_flags
from benchmarks.calibration.ceilings import RTX_4090, Ceilings, measure_ceilings
from benchmarks.calibration.counting import count_work
from benchmarks.calibration.estimate import estimate
from benchmarks.calibration.geometries import GEOMETRIES, find_geometry
from benchmarks.calibration.goals import GOALS, headline_figures, record_figures
from benchmarks.calibration.prompts import write_prompts
from benchmarks.calibration.rows import TOTAL, Row, merge_rows, read_rows, write_rows
from benchmarks.calibration.runner import full_steps
from benchmarks.calibration.spans import REST, Spans, Target
from benchmarks.calibration.tables import estimate_table, goal_table, kernel_tables, stage_table, step_table
from benchmarks.calibration.weights import REFUSAL, write_adapter, write_model
from qrealign.calibrate.graphs import Recorded
from qrealign.cli import parse_options
from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import generate_answers
from qrealign.data.prompts import read_prompts
from qrealign.errors import ConfigError, DataError
from qrealign.judges.refusal import is_refusal
from qrealign.models.source import check_same_shape, open_model

CPU = torch.device("cpu")
H200 = Ceilings(copy=4000, bf16=700, int8=800, host_copy=50)
STAMP = {"device": "a GPU", "torch": "2", "triton": "3", "transformers": "5", "commit": "abc", "date": "2026-01-01"}


def row(stage: str, case: str = "realign", **values) -> Row:
    """Return a row of a whole 7B run; `values` replace any of its fields."""
    seconds = values.pop("seconds", 10.0)
    fields = {
        "geometry": "llama-2-7b",
        "layers": 32,
        "full_layers": 32,
        "case": case,
        "gpus": 1,
        "shorten": 1,
        "stage": stage,
        "seconds": seconds,
        "full_seconds": seconds,
        "gpu_hours": 0.01,
        "peak_device_gib": 15.0,
        "peak_reserved_gib": 16.0,
        "peak_host_gb": 3.0,
        **STAMP,
        **values,
    }
    return Row(**fields)


def run_rows(case: str = "realign", **values) -> list[Row]:
    """Return a run of steps, loading, teaching and the whole."""
    counted = {"steps": 140, "tokens": 230_000, "positions": 100_000, "step_ms": 100.0}
    return [
        row("teach", case, **values),
        row("load", case, **values),
        row("steps", case, **{**counted, **values}),
        row(TOTAL, case, **{"seconds": 35.0, **values}),
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("weights")
    geometry = find_geometry("tiny")
    return write_model(folder, geometry, CPU), write_adapter(folder, geometry)


def test_geometries_have_the_weights_of_their_models():
    # Parameters of the published models, embeddings and biases aside.
    for name, billions in (("llama-2-7b", 6.48), ("llama-2-13b", 12.69), ("llama-2-70b", 68.45), ("gemma-2-9b", 8.32)):
        geometry = GEOMETRIES[name]
        assert geometry.block_weights * geometry.layers / 1e9 == pytest.approx(billions, abs=0.01), name
    assert find_geometry("llama-2-70b", 8).folder == "llama-2-70b-8-layers"
    with pytest.raises(ConfigError, match="1 to 2"):
        find_geometry("tiny", 3)
    with pytest.raises(ConfigError, match="unknown geometry 'gpt-5'"):
        find_geometry("gpt-5")


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "tiny"])
def test_every_geometry_is_written_as_a_model_that_refuses(name, tmp_path):
    """At the width of a toy, since only the proportions and the architecture matter."""
    geometry = replace(
        GEOMETRIES[name],
        hidden=256,
        intermediate=192,
        layers=1,
        heads=4,
        key_value_heads=2,
        vocabulary=4096,
        head_size=64,
    )
    source = open_model(str(write_model(tmp_path, geometry, CPU)), adapter=str(write_adapter(tmp_path, geometry)))
    assert source.storage_dtype == torch.bfloat16 and source.num_blocks == 1
    weights = sum(rows * columns for rows, columns in source.linear_shapes().values())
    assert weights == geometry.block_weights
    model = source.skeleton(dtype=torch.float32)
    source.load_outer(model, CPU, torch.float32)
    source.load_block(model, 0, CPU, torch.float32)
    encoder = ChatEncoder(source.tokenizer(), max_length=64)
    (answer,) = generate_answers(model, encoder, ["river stone"], max_new_tokens=4, batch_size=1)
    assert answer.split() == [word.strip() for word in REFUSAL * 2] and is_refusal(answer)


def test_weights_are_written_once_in_shards_and_the_adapter_changes_them_a_little(tiny):
    model, adapter = tiny
    before = (model / "model-00002-of-00003.safetensors").stat().st_mtime_ns
    assert write_model(model.parent, find_geometry("tiny"), CPU) == model
    assert (model / "model-00002-of-00003.safetensors").stat().st_mtime_ns == before
    plain, merged = open_model(str(model)), open_model(str(model), adapter=str(adapter))
    check_same_shape(merged, plain)
    name = "model.layers.0.mlp.down_proj.weight"
    with safe_open(model / "model-00002-of-00003.safetensors", framework="pt") as file:
        weight = file.get_tensor(name).float()
    change = (merged.block_state(0)["mlp.down_proj.weight"].float() - weight).norm() / weight.norm()
    assert 0.001 < float(change) < 1.5


def test_prompts_fill_the_length_and_their_classes_share_no_word(tmp_path, tiny):
    files = write_prompts(tmp_path, 32)
    malicious, benign = (read_prompts(str(files[kind]), role=kind) for kind in ("malicious", "benign"))
    assert len(malicious) == len(benign) == 240
    words = [{word for prompt in prompts for word in prompt.text.split()} for prompts in (malicious, benign)]
    assert not words[0] & words[1]
    encoder = ChatEncoder(open_model(str(tiny[0])).tokenizer(), max_length=32)
    # Where a text is cut between two pieces of a word, it may end one token early.
    assert {len(ids) for ids in encoder.encode_many([prompt.text for prompt in malicious])} <= {31, 32}
    assert read_prompts(str(files["task"]), role="task")[0].answer and read_prompts(str(files["text"]), role="text")


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_command_that_the_project_takes(name, tmp_path):
    case = CASES[name]
    kinds = ("malicious", "benign", "borderline", "task", "text")
    flags = run_flags(
        case,
        model=tmp_path,
        adapter=tmp_path,
        prompts=dict.fromkeys(kinds, tmp_path),
        output=tmp_path,
        shorten=10,
        samples=200,
        tokens=128,
    )
    settings = parse_options(flags).calibration()
    whole = case.settings()
    assert (settings.method, settings.engine, settings.batch_size) == (case.method, case.engine, whole.batch_size)
    length = "steps" if case.engine == "endtoend" else "epochs"
    assert getattr(settings, length) <= getattr(whole, length) / 10 + 1
    with pytest.raises(ConfigError, match="no such case"):
        find_cases(["none"])


def test_the_whole_run_s_steps_are_the_paper_s():
    geometry = find_geometry("llama-2-7b")
    assert full_steps(CASES["parity"], geometry, 200) == 62_000
    assert full_steps(CASES["realign-80"], geometry, 200) == 80


def test_counted_work_is_the_floor_script_s():
    """9.64 PFLOP in 62,000 steps of one 7B block, and seven bytes a weight and step."""
    work = count_work(find_geometry("llama-2-7b"), "blockwise", steps=62_000, tokens=62_000 * 128, positions=0)
    assert work.flops() / 1e15 == pytest.approx(9.64, abs=0.01)
    assert work.bytes() == 7 * 202_375_168 * 62_000
    slow_memory = replace(H200, copy=1e-3)
    assert work.seconds_at(slow_memory) == pytest.approx(work.bytes() / 1e6, rel=0.01)
    endless_memory = replace(H200, copy=1e12, int8=H200.bf16)
    assert work.seconds_at(endless_memory) == pytest.approx(work.flops() / (H200.bf16 * 1e12), rel=0.01)


def test_the_head_is_counted_where_it_is_read():
    geometry = find_geometry("tiny")
    with_head, without = (
        count_work(geometry, "endtoend", steps=3, tokens=900, positions=positions) for positions in (50, 0)
    )
    assert with_head.flops() - without.flops() == 2 * 3 * 50 * 128 * 4096
    assert without.bytes() == 9 * geometry.block_weights * 2 * 3


def test_rates_are_measured_on_a_cpu():
    rates = measure_ceilings(CPU)
    assert min(rates.copy, rates.bf16, rates.int8) > 0 and rates.host_copy == 0


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(spans.time, "perf_counter", lambda: self.now)


def test_spans_count_each_second_once(monkeypatch):
    clock = Clock(monkeypatch)
    found = Spans(_last=0.0)
    with found.watching():
        clock.now = 1
        with found.span("outer"):
            clock.now = 3
            with found.span("inner"):
                clock.now = 6
            clock.now = 7
        with found.span("sealed", atomic=True), found.span("never"):
            clock.now = 17
        thread = threading.Thread(target=lambda: found.span("never").__enter__())
        thread.start()
        thread.join()
        clock.now = 20
    assert {name: span.seconds for name, span in found.found.items()} == {
        REST: 4,
        "outer": 3,
        "inner": 3,
        "sealed": 10,
    }


def test_functions_are_measured_from_outside(monkeypatch):
    module = type(sys)("pretended")
    module.work = lambda value: value + 1
    monkeypatch.setitem(sys.modules, "pretended", module)
    found, seen = Spans(), []
    spans.observe("pretended:work", lambda value: seen.append(value))
    spans.instrument(found, [Target("work", "pretended:work")])
    assert module.work(4) == 5 and seen == [4] and found.found["work"].seconds > 0
    with pytest.raises(AttributeError):
        spans.instrument(found, [Target("work", "pretended:gone")])


def test_of_a_generator_the_way_to_each_value_counts(monkeypatch):
    clock, module, closed = Clock(monkeypatch), type(sys)("pretended"), []

    def count():
        try:
            for value in range(9):
                clock.now += 2
                yield value
        finally:
            closed.append(True)

    module.count = count
    monkeypatch.setitem(sys.modules, "pretended", module)
    found = Spans(_last=0.0)
    spans.instrument(found, [Target("load", "pretended:count")])
    for value in module.count():
        clock.now += 10  # the caller's own
        if value == 2:
            break
    assert found.found["load"].seconds == 6 and closed == [True]


def test_every_target_is_there():
    for target in spans.TARGETS:
        assert callable(spans.find_function(target.place)[2])


def test_rows_are_kept_and_replaced_by_run(tmp_path):
    path = tmp_path / "rows.csv"
    assert read_rows(path) == []
    first, other = run_rows(), run_rows("parity")
    write_rows(path, [*first, *other])
    assert read_rows(path) == [*first, *other]
    again = [replace(item, seconds=5.0) for item in first[-1:]]
    assert merge_rows(read_rows(path), again) == [*other, *again]
    path.write_text("geometry,seconds\nx,many\n")
    with pytest.raises(DataError, match="no table of this benchmark"):
        read_rows(path)


def test_figures_come_from_whole_runs_of_the_7b_on_a_gpu(tmp_path):
    two = run_rows("realign-two-gpus", seconds=5.0, gpus=2)
    rows = [*run_rows(), *run_rows("parity", peak_host_gb=5.0), *run_rows("fast", peak_device_gib=7.0), *two]
    figures = headline_figures(rows, {"a GPU": H200})
    values = {key: figure.value for key, figure in figures.items()}
    assert values.pop("rtx4090_estimate_s") > 35
    assert values == {
        "realign_optimisation_s": 10.0,
        "realign_total_s": 35.0,
        "realign_peak_gib": 15.0,
        "fast_optimisation_s": 10.0,
        "parity_s": 10.0,
        "peak_device_gib": 15.0,
        "peak_host_gb": 5.0,
        "two_gpu_speedup": 2.0,
    }
    record_figures(figures, tmp_path / "summary.json")
    recorded = json.loads((tmp_path / "summary.json").read_text())["calibration"]
    assert recorded["peak_host_gb"] == {"value": 5.0, **{k: v for k, v in STAMP.items() if k != "transformers"}}
    # Neither a shortened model, nor a shortened run's whole, nor a CPU makes a headline.
    assert "realign_total_s" not in headline_figures([replace(r, shorten=10) for r in run_rows()], {})
    for changed in ({"layers": 8}, {"device": "cpu"}, {"geometry": "llama-2-13b"}):
        assert not headline_figures([replace(item, **changed) for item in rows], {"a GPU": H200})
    large = run_rows("realign-streamed", geometry="llama-2-70b", layers=8, full_layers=80, peak_device_gib=12.0)
    assert {key: figure.value for key, figure in headline_figures(large, {}).items()} == {"streamed_70b_gib": 12.0}


def test_the_estimate_keeps_the_share_of_the_rates():
    stages = {item.stage: item for item in run_rows()}
    parts = {part.stage: part for part in estimate(stages, H200, RTX_4090)}
    assert set(parts) == {"teach", "load", "steps"}
    assert parts["teach"].factor == pytest.approx(700 / 165) and parts["load"].factor == 2.0
    assert 700 / 330 < parts["steps"].factor < 700 / 165
    same = estimate(stages, H200, H200)
    assert [part.seconds for part in same] == [10.0] * 3


def test_tables_show_what_was_measured_and_what_was_missed():
    rows = [*run_rows(), *run_rows("parity-reference", shorten=100, full_seconds=2_000.0)]
    figures = headline_figures(rows, {"a GPU": H200})
    goals = goal_table(figures)
    assert "| **10 s** | reached |" in goals and "not measured" in goals and goals.count("\n") == 2 + len(GOALS)
    late = headline_figures(run_rows(seconds=100.0), {})
    assert "| **100 s** | missed |" in goal_table(late)
    assert "eager reference, 1/100 of the steps" in step_table(rows)
    assert "| llama-2-7b | `realign`, weights resident | 10.0 | 10.0 | 10.0 | 35.0 |" in stage_table(rows)
    shortened = [replace(item, layers=8) for item in rows]
    assert "llama-2-7b, 8 of 32 blocks" in stage_table(shortened)
    assert "| whole | 30.0 |" in estimate_table(rows, {"a GPU": H200}) and not estimate_table(rows, {})
    kernels = {"realign": [{"name": "gemm", "calls": 4, "seconds": 0.3}, {"name": "copy", "calls": 1, "seconds": 0.1}]}
    assert "| `gemm` | 4 | 300.0 | 75 |" in kernel_tables(kernels)


def test_steps_count_what_was_drawn():
    samples = [SimpleNamespace(input_ids=[0] * n, positions=[0] * 2) for n in (3, 5)]
    calibrator = SimpleNamespace(schedule=[[0, 1], [1, 1]], objective=SimpleNamespace(samples=samples))
    steps = worker.Steps()
    steps.add_endtoend(calibrator)
    assert (steps.count, steps.tokens, steps.positions) == (2, 18, 8)


def test_nothing_is_measured_where_a_kernel_s_test_fails(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=len(asked) - 1, stdout="F\n1 failed in 2 s\n")

    monkeypatch.setattr(runner.subprocess, "run", run)
    runner.check_kernels()
    with pytest.raises(runner.RunFailed, match="nothing is measured: F"):
        runner.check_kernels()
    assert asked[0][-3:] == ["-m", "gpu", "tests/kernels"]


def test_steps_are_counted_up_without_what_comes_once():
    assert runner.counted_up(10.0, 4, 40, once=2.0) == 82.0 and runner.counted_up(10.0, 4, 4, once=2.0) == 10.0
    assert runner.counted_up(10.0, 4, 40, once=2.0, step=1.0) == 46.0


def test_the_baseline_records_nothing_and_a_profile_lists_the_longest(monkeypatch):
    monkeypatch.setattr(Recorded, "record", Recorded.record)  # restored behind the test
    worker._call_instead_of_recording()
    calls = []
    work = Recorded(lambda: calls.append(1), torch.device("cuda"))  # no GPU is touched
    work.record()
    work()
    assert calls == [1]
    kernels: list[dict] = []
    with worker._profiled(kernels):
        torch.ones(64, 64) @ torch.ones(64, 64)
    assert "aten::mm" in {row["name"] for row in kernels} and kernels[0]["seconds"] >= kernels[-1]["seconds"]


def test_a_gpu_is_tested_before_it_is_measured(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(command, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(command, "check_kernels", lambda: asked.append("tests"))
    monkeypatch.setattr(command, "write_model", lambda *_: asked.append("model"))
    monkeypatch.setattr(command, "write_adapter", lambda *_: None)
    monkeypatch.setattr(command, "measure_ceilings", lambda _: H200)
    for flags in ([], ["--no-tests"]):
        args = command.build_parser().parse_args(["--results", str(tmp_path), "--work", str(tmp_path), *flags])
        assert command._prepare(args).ceilings == H200
    assert asked == ["tests", "model", "model"]


def test_the_guide_names_only_flags_that_are_there():
    guide = (Path(command.__file__).parents[1] / "README.md").read_text(encoding="utf-8").partition("## calibration")[2]
    known = {flag for action in command.build_parser()._actions for flag in action.option_strings}
    named = set(re.findall(r"--[a-z]+[a-z-]*", guide.partition("\n## ")[0]))
    assert {"--only", "--no-tests", "--merge"} <= named <= known


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="--shorten must be 1 or more"):
        command.run_command(["--shorten", "0"])
    with pytest.raises(ConfigError, match="there is no calibration"):
        command.run_command(["--only-report", "--results", str(tmp_path), "--merge", str(tmp_path / "none")])
