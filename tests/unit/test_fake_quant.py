"""Fake-quantized linears: off = the original, on = exactly what freezing and packing keep."""

import pytest
import torch
from torch import nn

from qrealign.config import parse_scheme
from qrealign.quant.clipping import LearnableWeightClipping
from qrealign.quant.edits import LowRankEdit, project_edits
from qrealign.quant.fake_quant import fake_quant_linears, freeze_linears, quantized_linears, set_quantize, swap_linears
from qrealign.quant.packed import QuantizedLinear

SCHEMES = ["w8a8", "w8a16", "w4a16_g32", "w4a8_g32", "w4a4_channel", "w4a16_g32_asym"]


def small_block(seed=0):
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False)).requires_grad_(False)
    block[0].bias.copy_(block[0].bias.bfloat16())
    return block, torch.randn(5, 7, 64)


def test_swapped_with_grids_off_is_the_original_bit_for_bit():
    block, x = small_block()
    before = block(x)
    layers = swap_linears(block, parse_scheme("w8a8"), scale_dtype=torch.bfloat16)
    assert list(layers) == ["0", "2"] and fake_quant_linears(block) == layers
    set_quantize([block], False)
    assert torch.equal(block(x), before)
    set_quantize([block], True)
    assert not torch.equal(block(x), before)


def test_skipped_names_stay_linear():
    block = nn.ModuleDict({"gate": nn.Linear(8, 4), "gate_proj": nn.Linear(8, 4)})
    assert list(swap_linears(block, parse_scheme("w8a8"), scale_dtype=torch.float32, skip=(".gate",))) == ["gate_proj"]
    assert isinstance(block["gate"], nn.Linear)


@pytest.mark.parametrize("name", SCHEMES)
def test_frozen_layers_compute_what_was_calibrated(name):
    block, x = small_block()
    scheme = parse_scheme(name)
    generator = torch.Generator().manual_seed(1)
    for layer in swap_linears(block, scheme, scale_dtype=torch.bfloat16).values():
        layer.clipping = LearnableWeightClipping((layer.out_features, layer.in_features), scheme.weights, start=1.5)
        layer.edit = LowRankEdit(layer.weight, rank=3, budget=0.1, generator=generator)
        nn.init.normal_(layer.edit.left, std=0.02)
    calibrated = block(x)
    frozen = freeze_linears(block)
    assert torch.equal(block(x), calibrated)
    for layer in frozen.values():
        args = scheme.weights
        assert (
            layer.codes.dtype == torch.int8
            and int(layer.codes.min()) >= args.qmin
            and int(layer.codes.max()) <= args.qmax
        )
        assert torch.equal(layer.scale, layer.scale.bfloat16().float())
        assert (layer.zero_point is None) == args.symmetric
        layer.keep_dense(torch.float32)
    assert torch.equal(block(x), calibrated)


def test_gradients_reach_clipping_and_edit():
    block, x = small_block()
    scheme = parse_scheme("w8a8")
    for layer in swap_linears(block, scheme, scale_dtype=torch.bfloat16).values():
        layer.clipping = LearnableWeightClipping((layer.out_features, layer.in_features), scheme.weights, start=0.0)
        layer.edit = LowRankEdit(layer.weight, rank=2, budget=0.1, generator=torch.Generator())
    block(x).square().mean().backward()
    for layer in fake_quant_linears(block).values():
        assert layer.weight.grad is None
        assert float(layer.edit.left.grad.abs().sum()) > 0
        assert float(layer.clipping.clip_low_logit.grad.abs().sum()) > 0
        assert float(layer.clipping.clip_high_logit.grad.abs().sum()) > 0


def test_edit_gradients_are_those_of_the_straight_through_weight():
    """The product that never forms the weight's gradient agrees with autograd through weight + edit."""
    block, x = small_block()
    layer = swap_linears(block, parse_scheme("w8a16"), scale_dtype=torch.float32)["0"]
    layer.edit = LowRankEdit(layer.weight, rank=3, budget=1.0, generator=torch.Generator().manual_seed(2))
    nn.init.normal_(layer.edit.left, std=0.1)
    found, expected = [], []
    for lean, grads in ((True, found), (False, expected)):
        inputs = x.clone().requires_grad_()
        if not lean:
            layer._only_edit_learns = lambda: False
        layer(inputs).square().sum().backward()
        grads += [inputs.grad, layer.edit.left.grad, layer.edit.right.grad]
        layer.edit.zero_grad()
    for ours, truth in zip(found, expected, strict=True):
        assert torch.allclose(ours, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


def test_edit_starts_at_zero_and_keeps_its_budget():
    weight = torch.randn(48, 80)
    edit = LowRankEdit(weight, rank=4, budget=0.05, generator=torch.Generator().manual_seed(0))
    assert not edit.delta().any()
    nn.init.normal_(edit.left)
    assert torch.allclose(edit.norm(), torch.linalg.matrix_norm(edit.delta()), rtol=1e-5)
    project_edits([edit])
    assert float(edit.norm()) == pytest.approx(0.05 * float(torch.linalg.matrix_norm(weight)), rel=1e-4)
    inside = edit.left.clone()
    edit.left.data.mul_(0.5)
    project_edits([edit])
    assert torch.equal(edit.left, 0.5 * inside)


def test_an_empty_layer_is_filled():
    linear = nn.Linear(64, 8)
    empty = QuantizedLinear.empty(linear, parse_scheme("w4a16_g32_asym"))
    assert empty.codes.is_meta and empty.scale.shape == (8, 2) and empty.zero_point is not None
    block = nn.Sequential(linear)
    swap_linears(block, parse_scheme("w4a16_g32_asym"), scale_dtype=torch.float32)
    full = freeze_linears(block)["0"]
    empty.fill(full.codes, full.scale, full.zero_point, full.bias)
    x = torch.randn(3, 64)
    assert torch.equal(empty(x), full(x))
    assert "w4a16" in repr(empty) and quantized_linears(block) == {"0": full}
