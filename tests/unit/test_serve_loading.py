"""What is served, and what is refused before it is: options, folders, reports, addresses."""

from __future__ import annotations

import json
import socket

import pytest
import torch

from qrealign.config import parse_scheme
from qrealign.deploy.layers import PackedLinear
from qrealign.errors import CheckpointFormatError, ConfigError, DeviceError, ModelError
from qrealign.serve.__main__ import main
from qrealign.serve.loading import load_served, name_of, read_verdict
from qrealign.serve.options import KEY_VARIABLE, ServeOptions, build_parser, parse_options
from qrealign.serve.server import open_runner
from tests.helpers import tiny_checkpoint
from tests.unit.pack_helpers import open_tiny, quantized, write
from tests.unit.serve_helpers import served_model

CPU = torch.device("cpu")


def report(harmful: float | None) -> dict:
    column = None if harmful is None else {"harmful_score": {"value": harmful}}
    return {
        "models": {"finetuned": {"harmful_score": {"value": 90.0}}, "realigned": column, "quantized": None},
        "verdict": {"passed": harmful is not None, "reasons": ["one"]},
    }


def test_a_packed_folder_is_served_with_its_verdict(tmp_path):
    source = open_tiny(tmp_path / "tuned")
    folder = write(source, parse_scheme("w8a8"), quantized(source, parse_scheme("w8a8")), tmp_path / "mine" / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tmp_path / "tuned" / name).read_bytes())
    (tmp_path / "mine" / "report.json").write_text(json.dumps(report(2.0)))
    served = load_served(str(folder), device=CPU, dtype=None, max_length=64)
    assert (served.name, served.scheme, served.encoder.max_length) == ("mine", "w8a8", 64)
    assert served.verdict is not None and served.verdict.headline == "harmful score 90.0 % → 2.0 %"
    assert served.stop_ids == {2}
    open_runner(served, ServeOptions(model="x", max_slots=2))
    small = load_served(str(folder), device=CPU, dtype=None, max_length=64, head_bits=8, embedding_on_host=True)
    assert type(small.model.get_output_embeddings()) is PackedLinear
    open_runner(small, ServeOptions(model="x", max_slots=2, cache_bits=8))


def test_a_hub_id_is_served_under_its_name(tmp_path):
    folder = tmp_path / "snapshots" / "0123abcd"  # as the Hub's cache names it
    folder.mkdir(parents=True)
    assert name_of("org/tiny", folder) == "org/tiny"
    assert name_of(str(folder), folder) == "0123abcd"


def test_a_plain_folder_is_served_in_the_dtype_asked_for(tmp_path):
    folder = tiny_checkpoint(tmp_path / "plain", "qwen2")
    served = load_served(str(folder), device=CPU, dtype="bfloat16", max_length=None, name="given")
    assert (served.name, served.scheme, served.verdict) == ("given", "bfloat16", None)
    assert served.encoder.max_length == served.model.config.max_position_embeddings == 256
    assert served.model.dtype == torch.bfloat16
    for length, words in ((257, "256 positions"), (9, "10 or more")):
        with pytest.raises(ConfigError, match=words):
            load_served(str(folder), device=CPU, dtype=None, max_length=length)
    with pytest.raises(ConfigError, match="is not packed"):
        load_served(str(folder), device=CPU, dtype=None, max_length=None, head_bits=8)
    assert open_runner(served_model(max_length=10), ServeOptions(model="x")).max_length == 10


def test_folders_that_are_no_model_are_refused_in_a_sentence(tmp_path, capsys):
    empty, broken = tmp_path / "empty", tiny_checkpoint(tmp_path / "broken")
    empty.mkdir()
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointFormatError):
        load_served(str(broken), device=CPU, dtype=None, max_length=None)
    bare = tiny_checkpoint(tmp_path / "bare", tokenizer=False)
    capsys.readouterr()
    for folder, status in ((empty, 2), (tmp_path / "absent", 2), (bare, 2)):
        assert main([str(folder), "--port", "0", "--device", "cpu"]) == status
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("error: ") and len(said) == 2, said


def test_reports_tell_what_they_know(tmp_path):
    path = tmp_path / "report.json"
    assert read_verdict(path) is None
    path.write_text(json.dumps(report(None)))
    found = read_verdict(path)
    assert found is not None and not found.passed and "not measured" in found.headline
    for text in ("{", "[]", '{"models": {}}', "7"):
        path.write_text(text)
        with pytest.raises(ModelError, match="no report"):
            read_verdict(path)


def test_slots_that_do_not_fit_are_refused_or_fewer(monkeypatch):
    served = served_model()
    monkeypatch.setattr("qrealign.serve.runner.free_bytes", lambda _: 4 * 512 * 161)
    assert open_runner(served, ServeOptions(model="x")).slots == 3
    with pytest.raises(DeviceError, match="3 do"):
        open_runner(served, ServeOptions(model="x", max_slots=4))


def test_the_command_line_fills_the_options(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    assert parse_options(["folder"]) == ServeOptions(model="folder", api_key="from the environment")
    found = parse_options(["folder", "--api-key", "k", "--allowed-hosts", "a", "b", "--no-cuda-graphs", "--port", "1"])
    assert (found.api_key, found.hosts, found.cuda_graphs, found.port) == ("k", ("a", "b"), False, 1)
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert parse_options(["folder"]).api_key is None
    assert ServeOptions(model="x").hosts and ServeOptions(model="x", host="0.0.0.0").hosts is None
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    names = {f"--{name.replace('_', '-')}" for name in ServeOptions.__dataclass_fields__ if name != "model"}
    assert names <= flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "70000"], "65535"),
        (["--max-slots", "0"], "--max-slots must be 1"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--request-timeout", "nan"], "above 0"),
        (["--grace", "-1"], "--grace"),
        (["--api-key", " "], "API key"),
        (["--api-key", "from-a-file\n"], "no white space around it"),
        (["--device", "cuda:77"], "--device"),
        (["--grace", "nan"], "--grace"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["--host", "a..b"], "cannot listen on a..b"),
    ],
)
def test_options_out_of_range_are_refused(flags, words, capsys):
    assert main(["folder", *flags]) != 0
    assert words in capsys.readouterr().err


def test_an_address_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["folder", "--port", str(taken.getsockname()[1]), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "cannot listen" in said and "loading" not in said


def test_a_missing_extra_is_named(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "qrealign.serve.server")
    assert main(["folder"]) == 2
    assert "uvicorn: install it with pip install 'qrealign[serve]'" in capsys.readouterr().err
