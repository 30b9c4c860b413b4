"""Models for an evaluation: plain, with an adapter, packed; and what is refused."""

from __future__ import annotations

import pytest
import torch

from qrealign.assess import contestants
from qrealign.assess.contestants import open_contestants
from qrealign.assess.options import AssessOptions
from qrealign.errors import ConfigError, ModelError
from qrealign.files import read_json, write_json
from qrealign.pack.source import PackedSource
from qrealign.pipeline.models import ModelPool
from qrealign.quant.packed import QuantizedLinear
from tests.helpers import tiny_adapter, tiny_checkpoint
from tests.unit.pack_helpers import fitted, open_tiny, quantized, write


def test_no_model_is_the_demos_fine_tuned_one():
    (one,) = open_contestants(AssessOptions())
    assert one.key == "model" and one.source.adapter is not None


def test_packed_against_its_source(tmp_path):
    source = open_tiny(tmp_path / "model")
    scheme = fitted("w8a8", source)
    folder = write(source, scheme, quantized(source, scheme), tmp_path / "out")
    found = open_contestants(AssessOptions(model=str(folder), against=str(tmp_path / "model")))
    assert [one.key for one in found] == ["model", "against"]
    assert isinstance(found[0].source, PackedSource)
    pool = ModelPool(torch.device("cpu"))
    assert type(found[0].load(pool).model.layers[0].mlp.up_proj) is QuantizedLinear
    assert type(found[1].load(pool).model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert found[0].identity(pool) != found[1].identity(pool)
    with pytest.raises(ModelError, match="adapter cannot be merged"):
        open_contestants(AssessOptions(model=str(folder), adapter="somewhere"))


def test_two_models_of_one_name_are_told_apart(tmp_path):
    folders = [tiny_checkpoint(tmp_path / name / "model", seed=i) for i, name in enumerate("ab")]
    adapter = tiny_adapter(tmp_path / "adapter", folders[0])
    found = open_contestants(AssessOptions(model=str(folders[0]), against=str(folders[1])))
    assert found[0].title != found[1].title and str(folders[1]) in found[1].title
    merged = open_contestants(AssessOptions(model=str(folders[0]), adapter=str(adapter)))[0]
    assert merged.title == "model+adapter"


def test_a_model_of_the_hub_goes_by_its_id(tmp_path, monkeypatch):
    folder = tiny_checkpoint(tmp_path / "0a1b2c")
    monkeypatch.setattr(contestants, "find_folder", lambda path_or_id, what: folder)
    assert open_contestants(AssessOptions(model="org/name"))[0].title == "org/name"


def test_what_ends_an_answer_is_in_the_identity_and_how_prompts_are_written_is_not(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", max_position_embeddings=100)

    def identity(**options):
        return open_contestants(AssessOptions(model=str(folder), **options))[0].identity(ModelPool(torch.device("cpu")))

    plain = identity()
    assert identity(system="Be kind.") == identity(max_new_tokens=20) == plain
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2]})
    other_stop = identity()
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "eos_token": config["bos_token"]})
    assert len({plain, other_stop, identity()}) == 3


def test_prompts_leave_room_for_the_answer(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", max_position_embeddings=100)
    (one,) = open_contestants(AssessOptions(model=str(folder), max_new_tokens=20))
    assert one.encoder.max_length == 80
    assert open_contestants(AssessOptions(model=str(folder), max_new_tokens=68))[0].encoder.max_length == 32
    with pytest.raises(ConfigError, match=r"--max-new-tokens 300 leaves .*ask for at most 68"):
        open_contestants(AssessOptions(model=str(folder), max_new_tokens=300))
    (one,) = open_contestants(AssessOptions(model=str(folder), system="Be kind."))
    assert one.encoder.system == "Be kind."
