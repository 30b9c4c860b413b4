"""Prompt selection: amounts, hold-out, splits, disjointness, and what the shipped prompts stand in for."""

import json

import pytest

from qrealign.data.prompts import Label, find_overlap
from qrealign.demo import demo_paths
from qrealign.errors import DataError
from qrealign.pipeline.options import RunOptions
from qrealign.pipeline.prepare import QUICK_HARMFUL, prepare_data

NOUNS = ["lamp", "river", "engine", "garden", "letter", "window", "pencil", "market", "bridge", "violin"]


def rows(count, word, **fields):
    prompts = (f"{word} the {NOUNS[i % 10]} of the {NOUNS[i // 10 % 10]} number {i}" for i in range(count))
    return [{"prompt": prompt} | fields for prompt in prompts]


def write(path, *parts):
    path.write_text("".join(json.dumps(row) + "\n" for part in parts for row in part), encoding="utf-8")
    return str(path)


def prepare(**options):
    options = RunOptions(**{"model": "m", "aligned": "a", "output": "o"} | options)
    return prepare_data(options, options.calibration())


def test_the_demo_uses_the_shipped_prompts():
    options = RunOptions()
    data = prepare_data(options, options.calibration())
    counts = data.calibration.counts()
    assert counts == {"malicious": 122, "benign": 150, "task": 33, "borderline": 100, "text": 0} and data.samples == 272
    assert data.counts()["evaluation harmful"] >= 100 and data.evaluation.task and data.evaluation.texts
    assert data.fingerprint() == prepare_data(options, options.calibration()).fingerprint()


def test_runs_that_ask_the_same_share_the_evaluation_fingerprint():
    def fingerprints(**changes):
        options = RunOptions(**changes)
        data = prepare_data(options, options.calibration())
        return data.fingerprint(), data.evaluation_fingerprint()

    whole, asked = fingerprints()
    fewer, same = fingerprints(samples=100)
    assert whole != fewer and asked == same
    _, other = fingerprints(eval_over_refusal=(str(demo_paths().eval_benign),))
    assert other != asked


def test_labels_decide_who_is_malicious(tmp_path):
    file = write(tmp_path / "mixed.jsonl", rows(80, "break", label=1), rows(80, "paint", label=0))
    data = prepare(safety_data=(file,), benign_data=(file,), samples=40)
    assert all(p.text.startswith("break") and p.label == Label.MALICIOUS for p in data.calibration.malicious)
    assert all(p.text.startswith("paint") for p in (*data.calibration.benign, *data.probe_benign))
    assert len(data.calibration.malicious) == 18 and len(data.calibration.benign) == 22


def test_evaluation_prompts_are_held_out_of_the_users_data(tmp_path):
    file = write(tmp_path / "harmful.jsonl", rows(200, "break"))
    data = prepare(safety_data=(file,), samples=40)
    assert 20 <= len(data.evaluation.harmful) <= 80
    training = [*data.calibration.malicious, *data.probe_malicious]
    assert not find_overlap(training, data.evaluation.harmful)
    assert any("held out" in note for note in data.notes) and any("shipped" in note for note in data.notes)


def test_without_an_evaluation_nothing_is_held_out(tmp_path):
    files = {
        "safety_data": (write(tmp_path / "harmful.jsonl", rows(60, "break")),),
        "benign_data": (write(tmp_path / "benign.jsonl", rows(60, "paint")),),
        "task_data": (write(tmp_path / "task.jsonl", rows(40, "sort", answer="yes")),),
    }
    data = prepare(**files, samples=120, malicious_share=0.5, eval="none")
    assert (len(data.calibration.malicious), len(data.calibration.benign)) == (60, 60)
    assert len(data.probe_malicious) == len(data.probe_benign) == 60
    evaluation = vars(data.evaluation).values()
    assert not any(evaluation) and not data.notes
    one = (write(tmp_path / "one.jsonl", rows(1, "break")),)
    data = prepare(**files | {"safety_data": one}, samples=2, malicious_share=0.5, eval="none")
    assert len(data.calibration.malicious) == 1


def test_without_an_evaluation_test_rows_and_named_prompts_stay_out_of_the_training(tmp_path):
    parts = [rows(30, "train", answer="positive", split="train"), rows(20, "test", answer="negative", split="test")]
    task = (write(tmp_path / "task.jsonl", *parts),)
    data = prepare(task_data=task, samples=200, eval="none")
    assert {p.text.split()[0] for p in data.calibration.task} == {"train"}
    file = (write(tmp_path / "harmful.jsonl", rows(60, "break")),)
    with pytest.raises(DataError, match="--eval-harmful"):  # they were named to be asked later: benchmarks rely on it
        prepare(safety_data=file, eval_harmful=file, samples=40, eval="none")


def test_overlap_with_given_evaluation_prompts_is_refused(tmp_path):
    file = write(tmp_path / "harmful.jsonl", rows(60, "break"))
    with pytest.raises(DataError, match="--eval-harmful"):
        prepare(safety_data=(file,), eval_harmful=(file,), samples=40)


def test_too_few_prompts_name_the_flag(tmp_path):
    file = write(tmp_path / "harmful.jsonl", rows(20, "break"))
    with pytest.raises(DataError, match=r"--safety-data has \d+ usable prompts .* needs 90"):
        prepare(safety_data=(file,))


def test_the_default_amount_fits_the_data_down_to_the_papers(tmp_path):
    def files(malicious, benign):
        return {
            "safety_data": (write(tmp_path / "s.jsonl", rows(malicious, "break")),),
            "benign_data": (write(tmp_path / "b.jsonl", rows(benign, "paint")),),
        }

    assert prepare(**files(1400, 1700)).samples == 2000
    assert 200 <= prepare(**files(320, 600)).samples < 2000
    assert prepare(method="paper", **files(900, 300)).samples == 200
    with pytest.raises(DataError, match="needs 90"):
        prepare(**files(60, 300))


def test_running_text_is_read_for_the_methods_that_use_it_and_kept_apart(tmp_path):
    text = write(tmp_path / "text.jsonl", [{"text": "A river runs through the town. " * 20}])
    other = write(tmp_path / "other.jsonl", [{"text": "The hills are green in spring. " * 20}])
    assert len(prepare(samples=40, text_data=(text,), eval_text=(other,)).calibration.text) == 1
    assert prepare(samples=40, method="paper", text_data=(text,)).calibration.text == []
    with pytest.raises(DataError, match="--text-data are among those of --eval-text"):
        prepare(samples=40, text_data=(text,), eval_text=(text,))


def test_task_rows_keep_to_their_split(tmp_path):
    parts = [rows(30, "train", answer="positive", split="train"), rows(20, "test", answer="negative", split="test")]
    data = prepare(task_data=(write(tmp_path / "task.jsonl", *parts),), samples=40)
    assert {p.text.split()[0] for p in data.calibration.task} == {"train"}
    assert {p.text.split()[0] for p in data.evaluation.task} == {"test"}
    assert data.evaluation.task[0].answer == "negative"


def test_a_task_without_split_is_halved(tmp_path):
    data = prepare(task_data=(write(tmp_path / "task.jsonl", rows(80, "sort", answer="yes")),), samples=40)
    assert len(data.calibration.task) == 18 and 20 <= len(data.evaluation.task) <= 60
    assert not find_overlap(data.calibration.task, data.evaluation.task)
    assert prepare(samples=40).evaluation.task == []


def test_quick_takes_sources_evenly_and_full_takes_all(tmp_path):
    parts = [rows(150, f"break{name}", source=name) for name in ("a", "b", "c")]
    file = write(tmp_path / "harmful.jsonl", *parts)
    quick, full = (prepare(eval_harmful=(file,), eval=size).evaluation.harmful for size in ("quick", "full"))
    assert len(full) == 450 and len(quick) <= QUICK_HARMFUL
    assert {name: sum(p.source == name for p in quick) for name in "abc"} == {"a": 60, "b": 60, "c": 60}


def test_only_realign_sees_task_and_borderline_prompts():
    counts = prepare(method="paper").calibration.counts()
    assert counts["task"] == counts["borderline"] == 0
