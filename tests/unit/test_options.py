"""Options: defaults, configuration file under flags, and one clear sentence for what is wrong."""

import json

import pytest

from qrealign.cli import parse_options
from qrealign.errors import ConfigError, SchemeError
from qrealign.pipeline.options import RunOptions, resolved, used_options

MODEL = ["--model", "m", "--aligned", "a", "--output", "o"]


def test_no_arguments_is_the_demo():
    options = parse_options([])
    assert options.is_demo and str(options.directory) == "out/demo" and options.calibration().engine == "endtoend"


def test_runs_to_compare_with_need_scores():
    assert parse_options(["--compare-with", "one", "two"]).compare_with == ("one", "two")
    with pytest.raises(ConfigError, match="--compare-with needs scores"):
        parse_options(["--compare-with", "one", "--eval", "none"])


def test_flags_win_over_the_configuration_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(
            {"scheme": "w4a16", "seed": 3, "safety_data": "a.jsonl", "model": "m", "aligned": "a", "output": "o"}
        )
    )
    options = parse_options(["--config", str(file), "--seed", "5", "--benign-data", "b.jsonl", "c.jsonl"])
    assert (options.scheme, options.seed, options.safety_data, options.benign_data) == (
        "w4a16",
        5,
        ("a.jsonl",),
        ("b.jsonl", "c.jsonl"),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"shceme": "w8a8"}', "no such option: shceme"),
        ("[1]", "one JSON object"),
        ("{", "cannot be read"),
        ('{"samples": "many"}', "wrong type: samples"),
        ('{"scheme": 8}', "wrong type: scheme"),
        ('{"safety_data": [1]}', "wrong type"),
        ('{"fresh": 1}', "wrong type"),
        ('{"eval": "some"}', "wrong type"),
    ],
)
def test_bad_configuration_files(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_options(["--config", str(file)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aligned", "a"], "need --model"),
        (["--model", "m"], "--output is missing"),
        (["--model", "m", "--output", "o"], "name it with --aligned"),
        ([*MODEL, "--method", "paper", "--engine", "endtoend"], "'paper' has no --engine endtoend: it"),
        ([*MODEL, "--method", "rtn", "--edit", "lowrank"], "'rtn' has no --edit lowrank: it offers --engine none"),
        ([*MODEL, "--engine", "blockwise", "--steps", "5"], "--steps belongs to the end-to-end engine"),
        ([*MODEL, "--method", "interpolate", "--polish", "5", "--epochs", "7"], "--epochs belongs to a quantization"),
        ([*MODEL, "--method", "rtn", "--batch-size", "3"], "--batch-size belongs to a quantization or a polish"),
        ([*MODEL, "--edit", "none", "--edit-rank", "7"], "--edit-rank belongs to the low-rank edit"),
        ([*MODEL, "--method", "paper", "--edit-rank", "7"], "--edit-rank belongs to the low-rank edit"),
        ([*MODEL, "--steps", "5", "--epochs", "3"], "--steps and --epochs both"),
        ([*MODEL[:-1], ""], "--output is empty"),
        ([*MODEL, "--adapter", ""], "--adapter is empty"),
        ([*MODEL, "--fresh", "--resume"], "exclude each other"),
        ([*MODEL, "--samples", "0"], "--samples must be at least 1 "),
        ([*MODEL, "--epochs", "nan"], "--epochs must be above 0"),
        ([*MODEL, "--epochs", "inf"], "--epochs must be above 0"),
        ([*MODEL, "--epochs", "1e8"], "steps must be at least 1 and at most 1,000,000,000"),
        ([*MODEL, "--seed", "99999999999999999"], "--seed must be at least 0 and at most 4,294,967,295"),
        ([*MODEL, "--seed", "-1"], "--seed must be at least 0"),
        ([*MODEL, "--malicious-share", "1.5"], "--malicious-share must be at least 0 and at most 1,"),
        ([*MODEL, "--sequence-length", "4"], "at least 16"),
    ],
)
def test_wrong_flags_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(arguments)


def test_unknown_scheme():
    with pytest.raises(SchemeError, match="w3a16"):
        parse_options([*MODEL, "--scheme", "w3a16"])


def test_methods_that_need_no_aligned_model():
    for method in ("rtn", "reconstruction"):
        assert parse_options(["--model", "m", "--output", "o", "--method", method]).aligned is None


def test_overrides_reach_the_calibration():
    settings = parse_options(
        [*MODEL, "--samples", "40", "--epochs", "3", "--batch-size", "8", "--edit-rank", "2"]
    ).calibration()
    assert (settings.samples, settings.steps, settings.batch_size, settings.edit_rank) == (40, 15, 8, 2)
    clipping = parse_options([*MODEL, "--edit", "none"]).calibration()
    assert clipping.edit_learning_rate == 0 and clipping.clip_learning_rate > 0
    assert resolved(RunOptions())["calibration"]["method"] == "realign"


def test_a_polish_takes_its_batch_size_and_rank_from_the_flags():
    flags = ["--method", "rtn", "--polish", "5", "--batch-size", "4", "--edit-rank", "3"]
    polish = parse_options([*MODEL, *flags]).spec().polish
    assert (polish.steps, polish.batch_size, polish.edit_rank) == (5, 4, 3)
    blockwise = ["--engine", "blockwise", "--epochs", "0.5", "--edit-rank", "3", "--polish", "5"]
    assert parse_options([*MODEL, *blockwise]).spec().settings.epochs == 0.5


def test_options_for_many_methods_are_kept_where_they_mean_something():
    alike = {"samples": 9, "steps": 5, "batch_size": 4}
    assert used_options({"method": "realign", **alike}) == {"method": "realign", **alike}
    assert used_options({"method": "rtn", **alike}) == {"method": "rtn", "samples": 9}
