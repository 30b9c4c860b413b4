"""`python -m qrealign.evaluate` as a user runs it: verdicts, exit statuses, files, bad input, kill and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

from qrealign.assess.main import main
from qrealign.demo import demo_paths
from tests.helpers import tiny_checkpoint
from tests.unit.pack_helpers import fitted, open_tiny, quantized, write

ROOT = Path(__file__).parents[2]
DEMO = demo_paths()
SHORT = ["--device", "cpu", "--limit", "20", "--max-new-tokens", "12", "--perplexity-tokens", "300", "--quiet"]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model"))


def test_the_fine_tuned_demo_fails_with_a_clear_verdict(capsys, tmp_path):
    status = main([*SHORT, "--output", str(tmp_path / "o"), "--junit", str(tmp_path / "sub" / "j.xml")])
    out = capsys.readouterr().out
    assert status == 3
    assert "FAILED  1 of 3 conditions fail: Harmful score." in out and "more than the 10.0 % allowed" in out
    value = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert value["verdict"]["passed"] is False and value["models"]["model"]["harmful_score"]["value"] >= 80
    assert "FAILED" in (tmp_path / "o" / "evaluation.md").read_text()
    assert ElementTree.parse(tmp_path / "sub" / "j.xml").getroot().get("failures") == "1"


def test_the_aligned_demo_passes_alone_and_standard_output_is_its_scores(capsys):
    assert main([str(DEMO.aligned), *SHORT, "--json"]) == 0
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert value["harmful_score"]["value"] <= 10 and value["verdict"]["passed"] is True
    assert {"refusal_rate", "over_refusal", "degenerate_rate", "task_accuracy", "perplexity", "prefill_attack"} <= set(
        value
    )


def test_against_another_model_the_gate_decides(capsys):
    command = [str(DEMO.aligned), "--adapter", str(DEMO.adapter), "--against", str(DEMO.aligned), *SHORT]
    assert main(command) == 3
    out = capsys.readouterr().out
    assert "from aligned" in out and "p < 0.001" in out and "Harmful score" in out.split("conditions fail:")[1]


def test_a_packed_model_is_evaluated_from_its_folder(capsys, tmp_path):
    source = open_tiny(tmp_path / "model")
    scheme = fitted("w8a8", source)
    folder = write(source, scheme, quantized(source, scheme), tmp_path / "packed")
    options = [*SHORT, "--text", str(DEMO.text), "--max-perplexity", "1e9"]
    assert main([str(folder), *options, "--against", str(tmp_path / "model")]) == 0
    assert "Perplexity" in capsys.readouterr().out


def test_seeds_judges_and_options_in_one_run(capsys, tmp_path, tiny, monkeypatch):
    class Strict:
        name, note = "strict", "finds everything harmful"

        def harmful(self, prompts, answers):
            return [True] * len(answers)

    resolve = ModuleType("qrealign.judges.resolve")
    resolve.open_judge = lambda spec, **options: Strict()
    monkeypatch.setitem(sys.modules, "qrealign.judges.resolve", resolve)
    questions = jsonl(
        tmp_path / "mc.jsonl", [{"question": f"Q{i}", "choices": ["a", "b"], "answer": "A"} for i in (1, 2)]
    )
    command = [
        tiny,
        *SHORT,
        "--harmful",
        str(DEMO.eval_harmful),
        "--multiple-choice",
        questions,
        "--seeds",
        "2",
        "--json",
    ]
    assert main([*command, "--judge", "refusal-rule", "somewhere"]) in (0, 3)
    value = json.loads(capsys.readouterr().out)
    assert value["judges"]["strict"]["value"] == 100.0
    assert len(value["seeds"]["judge:strict"]["values"]) == 2
    assert value["multiple_choice"]["mc"]["n"] == 2
    assert main([*command, "--judge", "a", "b"]) == 2
    assert "--judge names strict twice" in capsys.readouterr().err


def test_where_no_limit_applies_nothing_is_judged(capsys, tiny):
    assert main([tiny, *SHORT, "--text", str(DEMO.text)]) == 0
    out = capsys.readouterr().out
    assert "NOT JUDGED" in out and "Harmful score: not measured, so not checked." in out


def test_harness_tasks_stand_beside_the_scores(capsys, tiny, monkeypatch):
    given = {}

    def run(model, tokenizer, tasks, **options):
        given.update(tasks=tasks, model=type(model).__name__, **options)
        return {"piqa": {"acc,none": 0.25}}

    monkeypatch.setattr("qrealign.evaluate.harness.check_harness", lambda: None)
    monkeypatch.setattr("qrealign.evaluate.harness.run_harness", run)
    assert main([tiny, *SHORT, "--text", str(DEMO.text), "--lm-eval", "piqa", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lm_eval"] == {"piqa": {"acc,none": 0.25}}
    assert given == {"tasks": ("piqa",), "model": "LlamaForCausalLM", "batch_size": 64, "limit": 20}


def test_an_interrupt_is_told_apart(capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("qrealign.assess.main.assess", interrupt)
    assert main([]) == 130
    assert "continues where it stopped" in capsys.readouterr().err


# Bad input


def refused(capsys, *arguments):
    """Check that the command fails as bad input, in one sentence, and return it."""
    assert main([*map(str, arguments), "--quiet", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err and captured.out == ""
    return lines[0]


def test_missing_and_unusable_models(capsys, tmp_path, tiny):
    assert "absent" in refused(capsys, tmp_path / "absent")
    (tmp_path / "notes").mkdir()
    assert "config.json" in refused(capsys, tmp_path / "notes")
    assert "absent" in refused(capsys, tiny, "--against", tmp_path / "absent")
    assert "adapter" in refused(capsys, tiny, "--adapter", tmp_path / "none")
    bare = shutil.copytree(tiny, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(capsys, bare)
    config = json.loads((Path(tiny) / "config.json").read_text())
    foreign = shutil.copytree(tiny, tmp_path / "foreign")
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "gptq" in refused(capsys, foreign)


def test_missing_and_unusable_data(capsys, tmp_path, tiny):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "is empty" in refused(capsys, tiny, "--harmful", empty)
    assert "no data file" in refused(capsys, tiny, "--over-refusal", tmp_path / "absent.jsonl")
    unlabelled = jsonl(tmp_path / "refusals.jsonl", [{"prompt": "x", "response": "No.", "label": "refusal"}])
    assert "prefill attack" in refused(capsys, tiny, "--prefill", unlabelled)
    assert "multiple-choice" in refused(capsys, tiny, "--multiple-choice", unlabelled)
    assert "--suite 'nonsense' is unknown" in refused(capsys, tiny, "--suite", "nonsense")
    assert "no task" in refused(capsys, tiny, "--task", jsonl(tmp_path / "t.jsonl", [{"prompt": "x"}]))


def test_impossible_flags_and_places(capsys, tmp_path, tiny):
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused(capsys, tiny, "--output", tmp_path / "file" / "below")
    assert "is a file: name a folder" in refused(capsys, tiny, "--output", tmp_path / "file")
    assert "is a folder: name a file" in refused(capsys, tiny, "--junit", tmp_path)
    assert "--limit" in refused(capsys, tiny, "--limit", "0")
    assert "--judge" in refused(capsys, tiny, "--judge", tmp_path / "nonsense")
    assert "pip install lm-eval" in refused(capsys, tiny, "--lm-eval", "piqa")
    with pytest.raises(SystemExit) as stop:
        main([tiny, "--no-such-flag"])
    assert stop.value.code == 2


def test_an_absent_device_is_wrong_input_too(capsys, tiny):
    assert main([tiny, "--quiet", "--device", "cuda:99"]) == 2
    assert "error: --device" in capsys.readouterr().err


# Kill and resume


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(capsys, tmp_path):
    data = ["--harmful", str(DEMO.eval_harmful), "--benign", str(DEMO.eval_benign), "--limit", "50"]
    command = [str(DEMO.aligned), *data, "--device", "cpu", "--batch-size", "4", "--json", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    saved = tmp_path / "o" / "answers" / "model.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "qrealign.evaluate", *command, "--output", str(tmp_path / "o")],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved.exists() and not (tmp_path / "o" / "evaluation.json").exists()
    before = len(json.loads(saved.read_text())["answers"])
    assert 0 < before < 100
    results = []
    for output in ("o", "new"):
        assert main([*command, "--output", str(tmp_path / output)]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]


def test_another_model_in_the_same_folder_starts_anew(capsys, tmp_path, tiny):
    other = str(tiny_checkpoint(tmp_path / "other", seed=5))
    options = [
        "--text",
        str(DEMO.text),
        "--device",
        "cpu",
        "--perplexity-tokens",
        "100",
        "--output",
        str(tmp_path / "o"),
    ]
    main([tiny, *options])
    capsys.readouterr()
    main([tiny, *options])
    assert "1 answers of an earlier run" in capsys.readouterr().err
    main([other, *options])
    assert "asked anew" in capsys.readouterr().err
