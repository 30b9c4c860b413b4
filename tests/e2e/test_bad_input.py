"""Bad input: one clear sentence, a non-zero exit, and nothing on disk touched."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qrealign.demo import demo_paths
from qrealign.run import main
from tests.helpers import tiny_adapter, tiny_checkpoint

DEMO = demo_paths()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return two tiny models of one shape, one of another, and an adapter of the other shape."""
    root = tmp_path_factory.mktemp("tiny")
    folders = {
        "model": tiny_checkpoint(root / "model", seed=0),
        "aligned": tiny_checkpoint(root / "aligned", seed=1),
        "wide": tiny_checkpoint(root / "wide", hidden_size=128, head_dim=32),
    }
    return folders | {"wide_adapter": tiny_adapter(root / "wide_adapter", folders["wide"])}


def run(capsys, *arguments, **data):
    """Run the command line and return its exit status and what it said on standard error."""
    flags = [part for name, value in data.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    status = main([*map(str, arguments), *flags, "--quiet"])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return status, error


def expect(capsys, output, message, *arguments, **data):
    """Check that a run fails with `message` in one sentence, and that the output folder was not made."""
    status, error = run(capsys, *arguments, output=output, **data)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert status != 0 and len(lines) == 1 and message in lines[0], error
    assert not output.exists()


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(count, label=None, start=0):
    return [
        {"prompt": f"please tell me about subject number {i}"} | ({} if label is None else {"label": label})
        for i in range(start, start + count)
    ]


@pytest.mark.parametrize("flag", ["model", "aligned", "adapter", "safety_data", "probe"])
def test_missing_paths(capsys, tiny, tmp_path, flag):
    data = {"model": tiny["model"], "aligned": tiny["aligned"]} | {flag: tmp_path / "absent"}
    expect(capsys, tmp_path / "o", "absent", **data)


def test_a_backend_that_cannot_be_used_is_told_before_any_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("qrealign_kernels.backend._requested", "fast")
    expect(capsys, tmp_path / "o", "unknown backend 'fast'")


def test_folder_that_is_no_model(capsys, tiny, tmp_path):
    (tmp_path / "notes").mkdir()
    expect(capsys, tmp_path / "o", "config.json", model=tmp_path / "notes", aligned=tiny["aligned"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [("truncate", "truncated"), ("header", "header"), ("pickle", "pickle"), ("tokenizer", "tokenizer")],
)
def test_damaged_models(capsys, tiny, tmp_path, damage, message):
    folder = shutil.copytree(tiny["model"], tmp_path / "damaged")
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "header":
        weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    elif damage == "pickle":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    expect(capsys, tmp_path / "o", message, model=folder, aligned=tiny["aligned"])


def test_models_that_do_not_belong_together(capsys, tiny, tmp_path):
    expect(capsys, tmp_path / "o", "hidden_size", model=tiny["model"], aligned=tiny["wide"])
    expect(
        capsys, tmp_path / "o", "adapter", model=tiny["model"], aligned=tiny["aligned"], adapter=tiny["wide_adapter"]
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (prompts(40, label=0), "no malicious prompt"),
        (prompts(40), "needs 18"),
        ([{"prompt": ""}] * 40, "empty"),
        ([{"title": "a"}] * 40, "no field"),
        (prompts(40, label="perhaps"), "perhaps"),
    ],
    ids=["one class", "too few", "empty", "no field", "unknown label"],
)
def test_unusable_prompts(capsys, tiny, tmp_path, rows, message):
    rows = rows[:12] if message == "needs 18" else rows
    file = jsonl(tmp_path / "data.jsonl", rows)
    expect(
        capsys,
        tmp_path / "o",
        message,
        model=tiny["model"],
        aligned=tiny["aligned"],
        safety_data=file,
        eval_harmful=DEMO.eval_harmful,
        samples=40,
    )


def test_prompts_that_are_not_utf8(capsys, tiny, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n' * 50)
    expect(
        capsys,
        tmp_path / "o",
        "UTF-8",
        model=tiny["model"],
        aligned=tiny["aligned"],
        safety_data=tmp_path / "data.jsonl",
    )


def test_prompts_that_overlap_the_evaluation(capsys, tiny, tmp_path):
    file = jsonl(tmp_path / "data.jsonl", prompts(60))
    expect(
        capsys,
        tmp_path / "o",
        "give away",
        model=tiny["model"],
        aligned=tiny["aligned"],
        safety_data=file,
        eval_harmful=file,
        samples=40,
    )


def test_over_long_prompts_are_cut_and_counted(capsys, tiny, tmp_path):
    file = jsonl(tmp_path / "data.jsonl", [{"prompt": f"{i} " + "long " * 2000} for i in range(60)])
    flags = ["--method", "reconstruction", "--epochs", "0.1", "--samples", "24", "--eval", "none", "--device", "cpu"]
    status, _ = run(capsys, *flags, model=tiny["model"], output=tmp_path / "o", benign_data=file)
    assert status == 0 and "6 prompts did not fit into 128 tokens" in (tmp_path / "o" / "report.md").read_text()


def test_unknown_names(capsys, tiny, tmp_path):
    expect(capsys, tmp_path / "o", "unknown scheme", model=tiny["model"], aligned=tiny["aligned"], scheme="w3a8")
    with pytest.raises(SystemExit):
        main(["--method", "magic"])


def test_output_that_holds_something_else(capsys, tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    status, error = run(capsys, model=tiny["model"], aligned=tiny["aligned"], output=tmp_path)
    assert status != 0 and "thesis.tex" in error and (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_dry_run_finds_what_the_run_would(capsys, tiny, tmp_path):
    models = {"model": tiny["model"], "aligned": tiny["aligned"]}
    expect(capsys, tmp_path / "o", "no-such-probe", "--dry-run", **models, probe=tmp_path / "no-such-probe")
    (tmp_path / "o").write_text("mine")
    status, error = run(capsys, "--dry-run", **models, output=tmp_path / "o")
    assert status == 2 and "is a file" in error


def test_texts_too_short_for_a_perplexity_are_told_before_any_work(capsys, tmp_path):
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": "a"}])
    expect(capsys, tmp_path / "o", "no two tokens in a row", "--dry-run", eval_text=texts)
    assert run(capsys, "--dry-run", "--eval", "none", output=tmp_path / "o", eval_text=texts) == (0, "")


@pytest.mark.parametrize("flags", [("--dry-run",), ("--fresh",)])
def test_a_model_that_the_run_would_replace(capsys, tiny, tmp_path, flags):
    shutil.copytree(tiny["model"], tmp_path / "model")
    for model in (tmp_path / "model", tiny["model"]):
        status, error = run(capsys, *flags, model=model, aligned=tiny["aligned"], output=tmp_path)
        assert status == 2 and "holds something else" in error and (tmp_path / "model" / "config.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none(capsys, tiny, tmp_path):
    expect(capsys, tmp_path / "o", "--device cuda", model=tiny["model"], aligned=tiny["aligned"], device="cuda")


def test_a_folder_where_a_weight_file_should_be(capsys, tiny, tmp_path):
    shutil.copytree(tiny["model"], tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
        file.mkdir()
    expect(capsys, tmp_path / "o", "safetensors", model=tmp_path / "model", aligned=tiny["aligned"])


def test_a_full_disk(capsys, tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    expect(capsys, tmp_path / "o", "free", model=tiny["model"], aligned=tiny["aligned"])


def test_an_aligned_model_that_cannot_teach(capsys, tiny, tmp_path):
    """A random model refuses nothing: the run stops with a sentence and can be continued once the mistake is mended."""
    status, error = run(
        capsys,
        "--eval",
        "none",
        model=tiny["model"],
        aligned=tiny["aligned"],
        output=tmp_path / "o",
        samples=24,
        sequence_length=200,
    )
    assert status != 0 and "refuses only" in error
