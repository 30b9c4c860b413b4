"""Every method by name, from the command line to a packed model, on tiny models: repair, quantize, polish."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from safetensors import safe_open

from qrealign.calibrate.distributed import Team
from qrealign.config import parse_scheme
from qrealign.models.source import open_model
from qrealign.pipeline import main as pipeline_main
from qrealign.pipeline.models import add_shells, round_block
from qrealign.quant.fake_quant import quantized_linears
from qrealign.repair.interpolate import InterpolationChange
from qrealign.repair.safelora import SafeLoraChange, choose_projected, update_cosines
from qrealign.repair.stored import StoredChange
from qrealign.run import main
from tests.helpers import tiny_checkpoint

SHORT = ["--samples", "24", "--sequence-length", "200", "--eval", "none", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny base, aligned and fine-tuned models."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: str(tiny_checkpoint(root / name, seed=seed)) for seed, name in enumerate(("base", "aligned", "model"))
    }


def run(folders, output, *arguments):
    flags = [part for name, folder in folders.items() for part in (f"--{name}", folder)]
    return main([*flags, *SHORT, "--output", str(output), *arguments])


def packed(output):
    """Return the tensors of the packed model."""
    tensors = {}
    for path in sorted((output / "model").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    return tensors


def codes_of(source):
    """Return the codes of a source's linears, rounded to nearest."""
    model, scheme = source.skeleton(dtype=torch.float32), parse_scheme("w8a8")
    add_shells(model, source, scheme)
    codes = {}
    for index in range(source.num_blocks):
        block = round_block(model, source, index, torch.device("cpu"), torch.float32)
        for name, layer in quantized_linears(block).items():
            codes[f"{source.spec.block_name(index)}.{name}.weight"] = layer.codes
    return codes


def expect_rounded(output, source):
    """Check that the packed model is `source` rounded to nearest, its other tensors as they are."""
    tensors, codes = packed(output), codes_of(source)
    for name in source.stored_names:
        expected = codes.get(name)
        assert torch.equal(tensors[name], source.read_tensor(name) if expected is None else expected), name


@pytest.mark.parametrize("method", ["interpolate", "safelora", "safe-delta"])
def test_a_repair_is_followed_by_plain_rounding(folders, tmp_path, method):
    extra = ["--interpolation", "0.5"] if method == "interpolate" else []
    extra += ["--setting", "repair.budget=50"] if method == "safe-delta" else []
    extra += ["--setting", "repair.lowest=3"] if method == "safelora" else []
    assert run(folders, tmp_path / "o", "--method", method, *extra) == 0
    base, aligned, finetuned = (open_model(folder) for folder in folders.values())
    if method == "interpolate":
        change = InterpolationChange(aligned, 0.5)
    elif method == "safelora":
        cosines = update_cosines(base, aligned, finetuned)
        change = SafeLoraChange(base, aligned, choose_projected(cosines, threshold=0.5, lowest=3))
    else:
        change = StoredChange(tmp_path / "o" / "state" / "repair", 2)
    repaired = finetuned.changed_by(change)
    assert codes_of(repaired).keys() == codes_of(finetuned).keys()
    assert any(not torch.equal(codes_of(repaired)[name], codes) for name, codes in codes_of(finetuned).items())
    expect_rounded(tmp_path / "o", repaired)
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["method"] == method and report["settings"]["repair"]["name"] == method
    assert [stage["name"] for stage in report["cost"]["stages"]][:2] == ["repair", "calibrate"]


def answers(output, folders):
    """Return what the packed model computes on a fixed sequence."""
    from qrealign.pack.source import open_packed
    from qrealign.pipeline.models import ModelPool

    model = ModelPool(torch.device("cpu")).packed("realigned", open_packed(str(output / "model")))
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def expect_learned(output, folders, arguments):
    """Check that a run's model is finite and not the fine-tuned one rounded, and that its stages are the method's."""
    tensors, plain = packed(output), codes_of(open_model(folders["model"]))
    assert any(not torch.equal(tensors[name], codes) for name, codes in plain.items())
    assert answers(output, folders).isfinite().all()
    report = json.loads((output / "report.json").read_text())
    stages = [stage["name"] for stage in report["cost"]["stages"]]
    assert ("polish" in stages) == ("--polish" in arguments) and stages[-1] == "pack"
    assert ("calibrate" in stages) == (arguments[1] != "safelora")


REPAIRED = [
    ["--method", "safelora", "--polish", "2"],
    ["--method", "realign", "--repair", "interpolate", "--steps", "2"],
    ["--method", "aaq", "--repair", "one-shot", "--steps", "2"],  # calibrates on no malicious prompt
]


@pytest.mark.parametrize("arguments", REPAIRED, ids=["-".join(flags[1:4]) for flags in REPAIRED])
def test_learning_behind_a_repair_ends_in_another_model_than_rounding(folders, tmp_path, monkeypatch, arguments):
    monkeypatch.setattr("qrealign.calibrate.teachers.is_refusal", lambda _: True)  # random models refuse nothing
    assert run(folders, tmp_path / "o", *arguments) == 0
    expect_learned(tmp_path / "o", folders, arguments)


def test_rtn_is_the_fine_tuned_model_rounded(folders, tmp_path):
    assert run(folders, tmp_path / "o", "--method", "rtn") == 0
    expect_rounded(tmp_path / "o", open_model(folders["model"]))


def test_a_run_with_another_repair_is_another_run(folders, tmp_path, capsys):
    assert run(folders, tmp_path / "o", "--method", "interpolate") == 0
    assert run(folders, tmp_path / "o", "--method", "interpolate", "--interpolation", "0.5") == 2
    assert "repair.coefficient: 0.25 -> 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("without", "arguments", "message"),
    [
        ("base", ["--method", "safelora"], "name it with --base"),
        ("aligned", ["--method", "safe-delta"], "name it with --aligned"),
        ("base", ["--method", "aaq"], "name it with --base"),
        ("aligned", ["--method", "qresafe"], "name it with --aligned"),
        ("aligned", ["--method", "rtn", "--polish", "5"], "name it with --aligned"),
        ("base", ["--method", "paper", "--polish", "5"], "learns its grid"),
        ("base", ["--method", "realign", "--polish", "5"], "end-to-end already"),
        ("base", ["--edit", "bias"], "have no biases"),
        ("aligned", ["--repair", "interpolate", "--method", "rtn"], "name it with --aligned"),
    ],
)
def test_what_a_method_needs_is_said_before_any_work(folders, tmp_path, capsys, without, arguments, message):
    given = {name: folder for name, folder in folders.items() if name != without}
    assert run(given, tmp_path / "o", *arguments, "--dry-run") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and not (tmp_path / "o").exists()


class Killed(Exception):
    """Stands for a kill in the middle of a stage."""


def kill_at(monkeypatch, step):
    """Let the end-to-end engine die after saving its first steps; return how to let it live again."""
    from qrealign.calibrate.endtoend import EndToEndCalibrator

    whole = EndToEndCalibrator._step

    def broken(self, at):
        if at == step:
            raise Killed
        return whole(self, at)

    monkeypatch.setattr(EndToEndCalibrator, "_step", broken)
    return lambda: monkeypatch.setattr(EndToEndCalibrator, "_step", whole)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "one-shot", "--setting", "repair.steps=13"],
        ["--method", "realign", "--engine", "blockwise", "--epochs", "0.5", "--polish", "13"],
        ["--method", "aaq", "--steps", "13"],
        ["--method", "qresafe", "--steps", "13"],
    ],
    ids=["one-shot", "polish", "aaq", "qresafe"],
)
def test_a_method_learns_and_ends_in_the_same_bits_when_killed(folders, tmp_path, monkeypatch, arguments):
    monkeypatch.setattr("qrealign.calibrate.teachers.is_refusal", lambda _: True)
    assert run(folders, tmp_path / "whole", *arguments) == 0
    expect_learned(tmp_path / "whole", folders, arguments)
    live = kill_at(monkeypatch, 12)
    with pytest.raises(Killed):
        run(folders, tmp_path / "killed", *arguments)
    live()
    assert run(folders, tmp_path / "killed", *arguments, "--resume") == 0
    expected, found = packed(tmp_path / "whole"), packed(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # Finished, it is not run again, and still knows what it was repaired into.
    assert run(folders, tmp_path / "killed", *arguments, "--resume") == 0


def test_streamed_blocks_give_one_shot_the_same_bits_and_refuse_channel_scales(folders, tmp_path, monkeypatch, capsys):
    flags = ["--method", "one-shot", "--setting", "repair.steps=3"]
    assert run(folders, tmp_path / "resident", *flags) == 0
    monkeypatch.setattr("qrealign.pipeline.models.RESIDENT_SHARE", 0.0)
    assert run(folders, tmp_path / "streamed", *flags) == 0
    expected, found = packed(tmp_path / "resident"), packed(tmp_path / "streamed")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for method, message in (("aaq", "channel scales are learned"), ("qresafe", "finding its critical weights")):
        assert run(folders, tmp_path / method, "--method", method, "--steps", "2") == 1
        assert message in capsys.readouterr().err


def test_a_repair_shows_in_the_report_beside_plain_rounding(folders, tmp_path):
    """The column of plain PTQ stays the fine-tuned model's; the repaired one is measured on its own."""
    from qrealign.demo import demo_paths

    demo = demo_paths()
    quick = ["--eval", "quick", "--max-new-tokens", "2", "--task-data", str(demo.task)]
    for field in ("eval_harmful", "eval_over_refusal", "eval_benign", "eval_task", "text"):
        few = tmp_path / f"{field}.jsonl"
        few.write_text("\n".join(getattr(demo, field).read_text().splitlines()[:20]))
        quick += [f"--eval-{field.removeprefix('eval_').replace('_', '-')}", str(few)]
    assert run(folders, tmp_path / "o", "--method", "interpolate", "--interpolation", "0", *quick) == 0
    models = json.loads((tmp_path / "o" / "report.json").read_text())["models"]
    assert set(models) == {"base", "aligned", "finetuned", "quantized", "realigned"}
    perplexity = {name: model["perplexity"] for name, model in models.items()}
    assert perplexity["realigned"] == pytest.approx(perplexity["aligned"], rel=0.02)
    assert abs(perplexity["quantized"] - perplexity["aligned"]) > 0.02 * perplexity["aligned"]


TEAMWORK = [
    ["--method", "paper", "--schedule", "fast", "--epochs", "0.5"],
    ["--method", "realign", "--engine", "blockwise", "--epochs", "0.5", "--polish", "2"],
]


@pytest.mark.parametrize("arguments", TEAMWORK, ids=["-".join(flags[1:4]) for flags in TEAMWORK])
def test_a_process_that_follows_learns_and_writes_nothing(folders, tmp_path, monkeypatch, capsys, arguments):
    """It joins when the first process has done what it does alone; here that one's sums come back unchanged."""
    monkeypatch.setattr("qrealign.calibrate.teachers.is_refusal", lambda _: True)
    assert run(folders, tmp_path / "o", *arguments) == 0
    for name in ("calibrate.done.json", "polish.done.json"):
        (tmp_path / "o" / "state" / name).unlink(missing_ok=True)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")}

    @contextlib.contextmanager
    def joined():
        yield Team(rank=1, size=2)

    sums = []
    monkeypatch.setattr(pipeline_main, "joined_team", joined)
    monkeypatch.setattr(Team, "add", lambda self, tensor: sums.append(tensor.shape) or tensor)
    monkeypatch.setattr(Team, "keep_largest", lambda self, tensors: None)
    assert run(folders, tmp_path / "o", *arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")} == before
    assert capsys.readouterr().out == "" and len(sums) > 3
