"""The architecture table: geometry, sites, discovery."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qrealign.arch import ARCHITECTURES, block_spec
from qrealign.errors import UnsupportedArchitectureError
from tests.helpers import MODEL_TYPES, tiny_config, tiny_model


def test_table_and_test_models_cover_the_same_types():
    assert set(ARCHITECTURES) == set(MODEL_TYPES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_row_points_at_modules_that_exist(model_type):
    model = tiny_model(model_type)
    spec = block_spec(model.config)
    blocks = model.get_submodule(spec.blocks)
    assert spec.known and isinstance(blocks, nn.ModuleList)
    assert model.get_submodule(spec.final_norm) is not None
    names = {name for block in blocks for name, _ in block.named_modules()}
    for site in spec.sites:
        assert names.issuperset((site.producer, *site.consumers)), site


def test_geometry_of_grouped_heads_and_partial_rope():
    heads = block_spec(tiny_config("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=12)).heads
    assert (heads.query, heads.key_value, heads.size, heads.rotary) == (8, 2, 12, 12)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert block_spec(tiny_config("phi3", rope_parameters=rope)).heads.rotary == 8
    assert block_spec(tiny_config("opt")).heads.rotary == 0


def test_opt_variants_lose_the_sites_that_would_not_be_exact():
    def names(**overrides):
        return {site.name for site in block_spec(tiny_config("opt", **overrides)).sites}

    assert names() == {"norm_to_qkv", "v_to_out", "q_to_k", "norm_to_mlp", "up_to_down"}
    assert names(do_layer_norm_before=False) == {"v_to_out", "q_to_k", "up_to_down"}
    assert "up_to_down" not in names(activation_function="gelu")


def test_norm_on_queries_and_keys_offers_no_q_to_k():
    for model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
        assert "q_to_k" not in {site.name for site in block_spec(tiny_config(model_type)).sites}


def test_unknown_architecture_is_discovered():
    model = tiny_model("gpt_neox", num_hidden_layers=3)
    spec = block_spec(model.config, model)
    assert (spec.known, spec.sites, spec.blocks, spec.final_norm) == (
        False,
        (),
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
    )


def test_unknown_architecture_without_blocks_is_refused():
    config = tiny_config("gpt_neox")
    with pytest.raises(UnsupportedArchitectureError, match="no list of 2 equal blocks"):
        block_spec(config, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedArchitectureError, match="gpt_neox"):
        block_spec(config)


def test_skipped_linears_and_fused_groups():
    spec = block_spec(tiny_config("qwen2_moe"))
    assert (
        spec.is_skipped("mlp.shared_expert_gate")
        and spec.is_skipped("mlp.gate")
        and not spec.is_skipped("mlp.gate_proj")
    )
    names = [f"m.0.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
    experts = [
        f"m.0.mlp.experts.{index}.{leaf}" for index in range(2) for leaf in ("gate_proj", "up_proj", "down_proj")
    ]
    assert spec.fused_groups([*names, *experts]) == [
        ("m.0.mlp.experts.0.gate_proj", "m.0.mlp.experts.0.up_proj"),
        ("m.0.mlp.experts.1.gate_proj", "m.0.mlp.experts.1.up_proj"),
        ("m.0.self_attn.q_proj", "m.0.self_attn.k_proj", "m.0.self_attn.v_proj"),
    ]
    assert spec.fused_groups(names[:2]) == []


def test_block_name():
    assert block_spec(tiny_config("opt")).block_name(7) == "model.decoder.layers.7"
    assert torch.is_tensor(tiny_model().get_submodule(block_spec(tiny_config()).block_name(1)).mlp.up_proj.weight)
