"""Adapters merged tensor by tensor equal peft's merge; what cannot be merged is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qrealign.errors import CheckpointFormatError, ModelError
from qrealign.models.source import open_model
from tests.helpers import tiny_adapter, tiny_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama with biases on disk."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), attention_bias=True, mlp_bias=True)


@pytest.fixture
def adapter(saved, tmp_path):
    """A plain adapter that a test may damage."""
    return tiny_adapter(tmp_path / "lora", saved)


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def merged_by_peft(model_folder, adapter):
    """Return the state of peft's own merge, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def state_of(source):
    """Return every tensor of a source by full name."""
    blocks = {
        f"{source.spec.block_name(index)}.{name}": tensor
        for index in range(source.num_blocks)
        for name, tensor in source.block_state(index).items()
    }
    return {**blocks, **source.outer_state()}


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
        "alpha_pattern": {"v_proj": 32, "layers.0.mlp.down_proj": 3},
    },
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "trained_biases": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "embeddings": {"target_modules": ("embed_tokens", "lm_head", "o_proj")},
    "one_layer": {"layers_to_transform": [1]},
    "all_linears": {
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "rank": 8,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_merge_equals_peft(saved, tmp_path, options):
    adapter = tiny_adapter(tmp_path, saved, **options)
    source = open_model(str(saved), adapter=str(adapter))
    merged, expected, plain = state_of(source), merged_by_peft(saved, adapter), state_of(open_model(str(saved)))
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
        assert torch.equal(merged[name], plain[name]) != source.adapter.touches(name)
    assert source.name == f"{saved.name}+{adapter.name}"


@pytest.mark.parametrize("model_type", ["phi3", "opt", "qwen2", "gemma2"])
def test_merge_on_other_architectures(model_type, tmp_path):
    model = tiny_checkpoint(tmp_path / "model", model_type, tokenizer=False)
    targets = {"phi3": ("qkv_proj", "gate_up_proj"), "opt": ("fc1", "k_proj")}.get(model_type, ("q_proj", "up_proj"))
    adapter = tiny_adapter(tmp_path / "lora", model, target_modules=targets)
    merged, expected = state_of(open_model(str(model), adapter=str(adapter))), merged_by_peft(model, adapter)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_merge_is_rounded_once_to_the_stored_dtype(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    adapter = tiny_adapter(tmp_path / "lora", model)
    name = "self_attn.q_proj.weight"
    merged = open_model(str(model), adapter=str(adapter)).block_state(0)[name]
    factors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weight = load_file(model / "model.safetensors")[f"model.layers.0.{name}"].float()
    exact = weight + 2.0 * (factors[f"{prefix}B.weight"].float() @ factors[f"{prefix}A.weight"].float())
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.to(torch.bfloat16))
    widened = open_model(str(model), adapter=str(adapter)).block_state(0, dtype=torch.float32)[name]
    assert torch.equal(widened, merged.float())


def rename_keys(adapter, change):
    file = adapter / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def test_names_of_older_adapters_and_of_the_base_model(saved, adapter):
    expected = state_of(open_model(str(saved), adapter=str(adapter)))
    rename_keys(adapter, lambda name: name.replace("model.model.", "model.").replace(".weight", ".default.weight"))
    renamed = state_of(open_model(str(saved), adapter=str(adapter)))
    assert all(torch.equal(renamed[name], tensor) for name, tensor in expected.items())


def test_adapter_on_experts_by_their_checkpoint_names(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "mixtral", tokenizer=False)
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2.lora_"
    factors = {f"{name}A.weight": torch.randn(2, 96), f"{name}B.weight": torch.randn(64, 2)}
    (tmp_path / "lora").mkdir()
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))
    merged = open_model(str(model), adapter=str(tmp_path / "lora")).block_state(0)["mlp.experts.1.w2.weight"]
    plain = open_model(str(model)).block_state(0)["mlp.experts.1.w2.weight"]
    torch.testing.assert_close(merged, plain + 2 * factors[f"{name}B.weight"] @ factors[f"{name}A.weight"])


def refuse(saved, adapter, match, error=ModelError):
    with pytest.raises(error, match=match) as caught:
        open_model(str(saved), adapter=str(adapter))
    assert "\n" not in str(caught.value)


def test_adapter_for_another_model(adapter, tmp_path):
    refuse(tiny_checkpoint(tmp_path / "wide", hidden_size=128), adapter, "belongs to another model .* has shape")
    refuse(tiny_checkpoint(tmp_path / "short", num_hidden_layers=1), adapter, "belongs to another model .*layers.1")
    refuse(tiny_checkpoint(tmp_path / "fused", "phi3"), adapter, "which the model does not have")


def test_changing_one_side_of_a_tie_is_refused(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    refuse(
        model,
        tiny_adapter(tmp_path / "lora", model, target_modules=("embed_tokens",)),
        "shares between embedding and head",
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"lora_alpha": None}, "adapter_config.json has None for a number in lora_alpha"),
        ({"lora_alpha": "8"}, "has '8' for a number"),
        ({"alpha_pattern": {"q_proj": "4"}}, "has '4' for a number"),
        ({"alpha_pattern": ["q_proj"]}, "for a number in lora_alpha or alpha_pattern"),
    ],
)
def test_kinds_that_cannot_be_merged(saved, adapter, changes, match):
    edit_config(adapter, **changes)
    refuse(saved, adapter, match)


def test_incomplete_or_damaged_adapters(saved, adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    refuse(saved, adapter, "truncated", CheckpointFormatError)
    file.write_bytes(data)
    factors = load_file(file)
    save_file(
        {name: tensor for name, tensor in factors.items() if "layers.0.self_attn.q_proj.lora_B" not in name}, file
    )
    refuse(saved, adapter, "only half of the factors")
    save_file({}, file)
    refuse(saved, adapter, "holds no tensors")
    file.unlink()
    refuse(saved, adapter, "has no adapter_model.safetensors")
    (adapter / "adapter_model.bin").touch()
    refuse(saved, adapter, "pickle", CheckpointFormatError)
    (adapter / "adapter_config.json").write_text("[")
    refuse(saved, adapter, "no valid JSON")
    (adapter / "adapter_config.json").write_text("{}")
    refuse(saved, adapter, "type NONE")
    shutil.rmtree(adapter)
    adapter.mkdir()
    refuse(saved, adapter, "is no adapter")
    refuse(saved, Path(tmp_path / "absent"), "does not exist")
