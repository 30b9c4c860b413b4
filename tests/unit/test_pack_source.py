"""A packed checkpoint is opened from its folder alone, and computes what was packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qrealign.errors import CheckpointFormatError, ModelError
from qrealign.pack.source import is_packed, open_packed
from qrealign.pipeline.models import ModelPool
from tests.helpers import tiny_checkpoint
from tests.unit.pack_helpers import fitted, open_tiny, quantized, rewrite, write


def packed(tmp_path: Path, name: str = "w8a8", model_type: str = "llama"):
    """Return the quantized model and the folder it was written to."""
    source = open_tiny(tmp_path / "model", model_type)
    scheme = fitted(name, source)
    model = quantized(source, scheme)
    return model, write(source, scheme, model, tmp_path / "out")


@pytest.mark.parametrize(("model_type", "name"), [("llama", "w8a8"), ("mixtral", "w4a16_asym"), ("phi3", "w4a16")])
def test_the_folder_alone_gives_the_packed_model(tmp_path, model_type, name):
    model, folder = packed(tmp_path, name, model_type)
    assert is_packed(folder) and not is_packed(tmp_path / "model")
    source = open_packed(str(folder))
    loaded = ModelPool(torch.device("cpu")).packed("it", source)
    input_ids = torch.randint(3, 259, (2, 12))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert source.storage_dtype == torch.bfloat16
    assert source.total_bytes == open_tiny(tmp_path / "again", model_type).total_bytes


def dequantized(tensors, layer):
    codes, scale = tensors.pop(f"{layer}.weight"), tensors.pop(f"{layer}.weight_scale")
    tensors[f"{layer}.weight"] = codes.to(scale.dtype) * scale


def test_a_layer_left_in_floating_point_in_every_block_is_no_problem(tmp_path):
    _, folder = packed(tmp_path)
    rewrite(folder, lambda t: [dequantized(t, f"model.layers.{i}.mlp.down_proj") for i in (0, 1)])
    source = open_packed(str(folder))
    loaded = ModelPool(torch.device("cpu")).packed("it", source)
    assert type(loaded.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert type(loaded.model.layers[1].mlp.up_proj) is not torch.nn.Linear
    assert not any("down_proj" in name for name in source.linear_shapes())


def test_a_layer_left_in_floating_point_in_one_block_is_no_problem(tmp_path):
    _, folder = packed(tmp_path)
    rewrite(folder, lambda t: dequantized(t, "model.layers.0.mlp.down_proj"))
    source = open_packed(str(folder))
    loaded = ModelPool(torch.device("cpu")).packed("it", source)
    assert type(loaded.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(loaded.model.layers[1].mlp.down_proj) is not torch.nn.Linear
    assert "model.layers.0.mlp.down_proj" not in source.linear_shapes()


def test_a_quantized_layer_that_the_configuration_ignores_is_refused(tmp_path):
    _, folder = packed(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*down_proj")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointFormatError, match="leaves it out"):
        open_packed(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: [dequantized(t, n.removesuffix(".weight_scale")) for n in list(t) if n.endswith("_scale")],
            "no quant",
        ),
        (lambda t: t.pop("model.layers.0.mlp.down_proj.weight"), "lacks weight"),
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensor"),
        (lambda t: t.update({"lm_head.weight_scale": torch.ones(272, 1)}), "only linears of the decoder blocks"),
        (lambda t: t.update({"model.layers.0.input_layernorm.weight_scale": torch.ones(64, 1)}), "no linear"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, change, message):
    _, folder = packed(tmp_path)
    rewrite(folder, change)
    with pytest.raises(CheckpointFormatError, match=message):
        open_packed(str(folder))


def test_other_schemes_and_plain_folders_are_refused(tmp_path):
    _, folder = packed(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "float"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointFormatError, match="weights in 8-bit floating point"):
        open_packed(str(folder))
    with pytest.raises(CheckpointFormatError, match="no compressed-tensors checkpoint"):
        open_packed(str(tiny_checkpoint(tmp_path / "plain")))
    with pytest.raises(ModelError, match="does not exist"):
        open_packed(str(tmp_path / "absent"))
