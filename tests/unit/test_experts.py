"""Experts as separate linears compute what Hugging Face's fused experts compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qrealign.arch import block_spec
from qrealign.models.experts import ExpertList, split_experts
from tests.helpers import MOE_TYPES, random_batch, tiny_model


@pytest.mark.parametrize("model_type", MOE_TYPES)
@torch.no_grad()
def test_split_model_equals_the_fused_one(model_type):
    model = tiny_model(model_type)
    split = copy.deepcopy(model)
    spec = block_spec(model.config)
    for block in split.get_submodule(spec.blocks):
        split_experts(block, spec)
    input_ids, mask = random_batch(padding="right")
    torch.testing.assert_close(
        split(input_ids, attention_mask=mask).logits, model(input_ids, attention_mask=mask).logits, atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("model_type", MOE_TYPES)
@torch.no_grad()
def test_split_experts_equal_the_eager_ones_bit_for_bit(model_type):
    fused = tiny_model(model_type).get_submodule("model.layers.1.mlp.experts")
    fused.config._experts_implementation = "eager"
    model = tiny_model(model_type)
    block = model.get_submodule("model.layers.1")
    split_experts(block, block_spec(model.config))
    x = torch.randn(11, 64)
    weights, index = torch.rand(11, 4).topk(2, dim=-1)
    assert isinstance(block.mlp.experts, ExpertList)
    assert torch.equal(block.mlp.experts(x, index, weights), fused(x, index, weights))


def test_linears_carry_the_checkpoints_names_and_the_router_is_none_of_them():
    names = {}
    for model_type in MOE_TYPES:
        model = tiny_model(model_type)
        spec = block_spec(model.config)
        block = model.get_submodule("model.layers.1")
        split_experts(block, spec)
        names[model_type] = {
            name
            for name, module in block.mlp.named_modules()
            if isinstance(module, nn.Linear) and not spec.is_skipped(f"mlp.{name}")
        }
    assert "experts.3.w2" in names["mixtral"] and "experts.3.down_proj" in names["qwen3_moe"]
    assert not any(
        "gate" in name.split(".")[-1] and "gate_proj" not in name for group in names.values() for name in group
    )
    assert {name for name in names["qwen2_moe"] if "experts" not in name} == {
        f"shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down")
    }


def test_dense_blocks_stay_and_splitting_twice_is_harmless():
    model = tiny_model("qwen3_moe")
    spec = block_spec(model.config)
    dense, sparse = model.get_submodule("model.layers")
    split_experts(dense, spec)
    assert not hasattr(dense.mlp, "experts")
    split_experts(sparse, spec)
    experts = sparse.mlp.experts
    split_experts(sparse, spec)
    assert sparse.mlp.experts is experts


def test_gradients_reach_the_experts_that_were_chosen():
    model = tiny_model("mixtral")
    block = model.get_submodule("model.layers.0")
    split_experts(block, block_spec(model.config))
    experts = block.mlp.experts.requires_grad_(True)
    x = torch.randn(5, 64)
    experts(x, torch.full((5, 1), 2), torch.ones(5, 1)).sum().backward()
    assert experts[2].w1.weight.grad.abs().sum() > 0 and experts[0].w1.weight.grad is None
