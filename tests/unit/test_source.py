"""Opening models: what comes out equals transformers' own loading, and bad input is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qrealign.config import parse_scheme
from qrealign.errors import CheckpointFormatError, ModelError, UnsupportedArchitectureError
from qrealign.models.source import check_same_shape, open_model
from qrealign.quant.clipping import LearnableWeightClipping
from qrealign.quant.fake_quant import swap_linears
from tests.helpers import (
    MODEL_TYPES,
    TOKENIZER_VOCAB,
    random_batch,
    tiny_adapter,
    tiny_checkpoint,
    tiny_config,
    tiny_model,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama on disk; tests that change it copy it first."""
    return tiny_checkpoint(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder, **changes):
    """Change fields of a folder's config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def logits(model):
    input_ids, mask = random_batch(padding="right")
    with torch.no_grad():
        return model(input_ids=input_ids, attention_mask=mask).logits


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "gpt_neox"])
def test_loaded_model_equals_transformers_loading(model_type, tmp_path):
    folder = tiny_checkpoint(tmp_path, model_type, tokenizer=False, max_shard_size="60KB")
    source = open_model(str(folder))
    assert len(source.files.files) > 1
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert torch.allclose(logits(source.load_model("cpu")), expected, atol=1e-5 if source.spec.experts else 0, rtol=0)


def test_description_and_skeleton(saved):
    source = open_model(str(saved))
    assert (source.num_blocks, source.storage_dtype, source.name) == (2, torch.float32, saved.name)
    assert source.total_bytes == sum(tensor.numel() * 4 for tensor in load_file(saved / "model.safetensors").values())
    skeleton = source.skeleton(dtype=torch.bfloat16)
    assert all(
        parameter.is_meta and parameter.dtype == torch.bfloat16 and not parameter.requires_grad
        for parameter in skeleton.parameters()
    )
    assert not any(buffer.is_meta for buffer in skeleton.buffers()) and not skeleton.training
    assert source.config.dtype == torch.float32
    assert source.linear_shapes()["model.layers.1.mlp.down_proj"] == (64, 96) and len(source.linear_shapes()) == 14


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_linears_of_experts_are_listed_and_routers_are_not(model_type, tmp_path):
    source = open_model(str(tiny_checkpoint(tmp_path, model_type, tokenizer=False)))
    shapes = source.linear_shapes()
    leaf = "w2" if model_type == "mixtral" else "down_proj"
    assert shapes[f"model.layers.1.mlp.experts.3.{leaf}"][0] == 64
    assert not any(name.endswith("gate") for name in shapes)
    inner = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    assert (
        source.stored_names[f"model.layers.1.mlp.experts.3.{leaf}.weight"]
        == f"model.layers.1.{inner}.experts.3.{leaf}.weight"
    )


def test_block_and_outer_state_cover_every_tensor_once(tmp_path):
    source = open_model(str(tiny_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)))
    states = {
        f"model.layers.{index}.{name}": tensor
        for index in range(2)
        for name, tensor in source.block_state(index).items()
    }
    outer = source.outer_state()
    stored = load_file(tmp_path / "model.safetensors")
    assert states.keys() | outer.keys() == stored.keys() and not states.keys() & outer.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in {**states, **outer}.items())
    assert all(tensor.dtype == torch.float32 for tensor in source.block_state(0, dtype=torch.float32).values())


def test_tied_embeddings_stay_one_tensor(tmp_path):
    source = open_model(str(tiny_checkpoint(tmp_path, "gemma2")))
    assert "lm_head.weight" not in source.outer_state()
    model = source.load_model("cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_head_stored_beside_a_tie_that_is_not_one(folder):
    edit_config(folder, tie_word_embeddings=True)
    source = open_model(str(folder))
    assert source.tied == {} and not source.config.tie_word_embeddings
    assert torch.equal(logits(source.load_model("cpu")), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_equal_head_stored_beside_the_embeddings_is_tied(folder):
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, tie_word_embeddings=True)
    source = open_model(str(folder))
    assert source.tied and "lm_head.weight" not in source.outer_state()
    del state["model.embed_tokens.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    only_head = open_model(str(folder)).load_model("cpu")
    assert torch.equal(only_head.model.embed_tokens.weight, state["lm_head.weight"])


def test_checkpoint_of_the_base_model_and_other_file_names(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    source = open_model(str(tmp_path))
    assert source.stored_names["model.norm.weight"] == "norm.weight"
    assert torch.equal(logits(source.load_model("cpu")), logits(model))


def test_changing_loaded_weights_leaves_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    source = open_model(str(folder))
    model = source.skeleton()
    block = source.load_block(model, 0, "cpu")
    with torch.no_grad():
        block.mlp.up_proj.weight.mul_(3)
    assert (folder / "model.safetensors").read_bytes() == before


def test_load_block_fills_swapped_linears_and_keeps_what_is_learned(saved):
    source = open_model(str(saved))
    model = source.skeleton()
    block = model.get_submodule("model.layers.1")
    swap_linears(block, parse_scheme("w8a8"), scale_dtype=torch.float32)
    block.mlp.up_proj.clipping = clipping = LearnableWeightClipping((96, 64), parse_scheme("w8a8").weights)
    assert source.load_block(model, 1, "cpu", torch.float64) is block
    assert block.mlp.up_proj.clipping is clipping and block.mlp.up_proj.weight.dtype == torch.float64
    assert not any(parameter.is_meta for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in model.get_submodule("model.layers.0").parameters())


def test_generation_settings_come_with_the_model(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert open_model(str(folder)).skeleton().generation_config.eos_token_id == [2, 7]


def test_fingerprint_follows_weights_config_and_adapter(folder, tmp_path):
    first = open_model(str(folder)).fingerprint()
    assert open_model(str(folder)).fingerprint() == first
    adapter = tiny_adapter(tmp_path / "lora", folder)
    assert open_model(str(folder), adapter=str(adapter)).fingerprint() != first
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"] *= 1.01
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    second = open_model(str(folder)).fingerprint()
    edit_config(folder, rms_norm_eps=1e-5)
    assert len({first, second, open_model(str(folder)).fingerprint()}) == 3


def test_tokenizer(saved):
    assert len(open_model(str(saved)).tokenizer()("abc").input_ids) == 4


def test_tokenizer_missing_or_broken(folder):
    source = open_model(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        source.tokenizer()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        source.tokenizer()


def refuse(path, error, match, **kwargs):
    """Check that a model is refused in one line."""
    with pytest.raises(error, match=match) as caught:
        open_model(str(path), **kwargs)
    assert "\n" not in str(caught.value)


def test_missing_paths(tmp_path):
    refuse(tmp_path / "nothing", ModelError, "does not exist")
    refuse(tmp_path / ("x" * 300), ModelError, "does not exist")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", ModelError, "is a file")


def test_folder_that_is_no_model(tmp_path, folder):
    refuse(tmp_path, ModelError, "no config.json")
    refuse(tiny_adapter(tmp_path / "lora", folder), ModelError, "pass it with --adapter")


@pytest.mark.parametrize(("text", "match"), [("{", "no valid JSON"), ("[]", "no model_type"), ("{}", "no model_type")])
def test_broken_config(folder, text, match):
    (folder / "config.json").write_text(text)
    refuse(folder, ModelError, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "martian"}, "'martian'"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "vit"}, "no decoder-only language model"),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 64}}, "multimodal"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "code of its own"),
        ({"hidden_size": "many"}, "cannot build"),
    ],
)
def test_architectures_outside(folder, changes, match):
    edit_config(folder, **changes)
    refuse(folder, UnsupportedArchitectureError, match)


@pytest.mark.parametrize(
    ("changes", "match"), [({"hidden_act": "warp"}, "KeyError: 'warp'"), ({"pad_token_id": 99999}, "AssertionError")]
)
def test_configurations_that_build_no_model(folder, changes, match):
    edit_config(folder, **changes)
    refuse(folder, ModelError, f"{folder}/config.json has a value .*{match}")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_generation_settings(folder, text):
    (folder / "generation_config.json").write_text(text)
    refuse(folder, ModelError, "generation_config.json cannot be read")


def test_quantized_input(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(folder, ModelError, "quantized already .gptq.")
    edit_config(folder, quantization_config=None)
    state = {name: tensor.to(torch.int8) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    refuse(folder, ModelError, "weights as I8")
    save_file({name: tensor.double() for name, tensor in state.items()}, folder / "model.safetensors")
    refuse(folder, ModelError, "weights as F64")


def test_truncated_and_corrupted_weights(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    corrupted = data[:8] + b"x" + data[9:]
    for content, match in [
        (data[:-100], "truncated"),
        (data[:50], "truncated"),
        (b"", "truncated"),
        (data + b"12", "longer"),
        (corrupted, "corrupted header"),
        (data.replace(b'"F32"', b'"F16"', 1), "corrupted header"),
    ]:
        file.write_bytes(content)
        refuse(folder, CheckpointFormatError, match)
        refuse(folder, CheckpointFormatError, "model.safetensors")


def test_shards(tmp_path):
    folder = tiny_checkpoint(tmp_path, max_shard_size="60KB", tokenizer=False)
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    refuse(folder, CheckpointFormatError, shard.name)
    shard.unlink()
    refuse(folder, CheckpointFormatError, f"{shard.name} is missing")
    for index in ({}, {"weight_map": {}}, {"weight_map": {"a": 3}}, {"weight_map": {"a": ["b"]}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refuse(folder, CheckpointFormatError, "index.json is corrupted")


def test_pickle_and_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refuse(folder, CheckpointFormatError, "holds no weights")
    (folder / "pytorch_model.bin").touch()
    refuse(folder, CheckpointFormatError, "pickle weights only .pytorch_model.bin.")


def test_weights_and_config_of_different_models(folder):
    state = load_file(folder / "model.safetensors")
    edit_config(folder, intermediate_size=112)
    refuse(folder, CheckpointFormatError, "different models")
    edit_config(folder, intermediate_size=96, num_hidden_layers=3)
    refuse(folder, CheckpointFormatError, r"lacks 9 tensor\(s\)")
    edit_config(folder, num_hidden_layers=2)
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    refuse(folder, CheckpointFormatError, "lm_head.weight")


def test_weights_that_are_not_finite(folder):
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(state, folder / "model.safetensors")
    source = open_model(str(folder))
    source.block_state(1)
    with pytest.raises(CheckpointFormatError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN"):
        source.block_state(0)


def test_hub_id_is_downloaded(monkeypatch, saved):
    import huggingface_hub

    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_model("someone/some-model").path == saved
    assert asked["name"] == "someone/some-model" and "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


def test_hub_id_that_cannot_be_had(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refuse("someone/not-there", ModelError, "neither a folder here nor a model")


def test_same_shape(saved, tmp_path):
    source = open_model(str(saved))
    check_same_shape(source, open_model(str(saved)))
    for number, (model_type, overrides, match) in enumerate(
        [
            ("mistral", {}, "of type mistral"),
            ("llama", {"num_hidden_layers": 3}, "num_hidden_layers 3"),
            ("llama", {"vocab_size": TOKENIZER_VOCAB + 8}, "vocab_size"),
            ("llama", {"intermediate_size": 112}, "down_proj.weight has shape"),
            ("llama", {"attention_bias": True}, "bias has shape .* none in"),
        ]
    ):
        other = open_model(str(tiny_checkpoint(tmp_path / str(number), model_type, tokenizer=False, **overrides)))
        with pytest.raises(ModelError, match=match):
            check_same_shape(source, other)


def test_tied_and_untied_models_have_the_same_shape(saved, tmp_path):
    tied = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    check_same_shape(open_model(str(saved)), open_model(str(tied)))
    assert tiny_config().tie_word_embeddings is False
