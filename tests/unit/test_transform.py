"""Swapped blocks equal the originals; transforms cancel, attached and folded."""

from __future__ import annotations

import copy

import pytest
import torch

from qrealign.arch import block_spec
from qrealign.config import parse_scheme
from qrealign.data.capture import capture_block_inputs, run_block
from qrealign.models.experts import split_experts
from qrealign.quant.fake_quant import freeze_linears, set_quantize, swap_linears
from qrealign.quant.transform import DEFAULT_SITES, EquivalentTransform, _Spread
from tests.helpers import MODEL_TYPES, random_batch, tiny_model

ALL_SITES = (*DEFAULT_SITES, "up_to_down")
VARIANTS = [(model_type, {}) for model_type in MODEL_TYPES] + [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    ("qwen3", {"attention_bias": True}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"activation_function": "gelu"}),
]
ids = [model_type + "".join(f"-{key}" for key in overrides) for model_type, overrides in VARIANTS]
variants = pytest.mark.parametrize(("model_type", "overrides"), VARIANTS, ids=ids)


def swapped_blocks(model_type, overrides=None, scheme="w8a8"):
    """Yield per block: the original, its swapped copy with the grids off, hidden states, arguments and the row."""
    model = tiny_model(model_type, **(overrides or {}))
    spec = block_spec(model.config)
    blocks = model.get_submodule(spec.blocks)
    hidden, kwargs = capture_block_inputs(model, *random_batch(padding="right"))
    for block, arguments in zip(blocks, kwargs, strict=True):
        split_experts(block, spec)
        copied = copy.deepcopy(block)
        swap_linears(copied, parse_scheme(scheme), scale_dtype=torch.float32, skip=spec.skip)
        set_quantize([copied], False)
        yield block, copied, hidden, arguments, spec
        hidden = run_block(block, hidden, arguments)


def randomise_scales(transform, seed=0):
    """Draw every scale from [1/e, e]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transform.log_scale.values():
            parameter.uniform_(-1, 1, generator=generator)


@variants
@torch.no_grad()
def test_grids_off_equals_the_original_block_bit_for_bit(model_type, overrides):
    for block, swapped, hidden, kwargs, _ in swapped_blocks(model_type, overrides):
        assert torch.equal(run_block(swapped, hidden, kwargs), run_block(block, hidden, kwargs))


@variants
@torch.no_grad()
def test_transform_cancels_attached_and_folded(model_type, overrides):
    for block, swapped, hidden, kwargs, spec in swapped_blocks(model_type, overrides):
        expected = run_block(block, hidden, kwargs)
        names = [*dict(swapped.named_parameters())]
        transform = EquivalentTransform(swapped, spec, sites=ALL_SITES)
        assert len(transform.log_scale) > 0
        randomise_scales(transform)
        transform.attach()
        torch.testing.assert_close(run_block(swapped, hidden, kwargs), expected, atol=3e-5, rtol=2e-5)
        transform.fold()
        torch.testing.assert_close(run_block(swapped, hidden, kwargs), expected, atol=3e-5, rtol=2e-5)
        assert all(
            getattr(module, "column_scale", None) is None and getattr(module, "row_divisor", None) is None
            for module in swapped.modules()
        )
        assert [*dict(swapped.named_parameters())] == names


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt", "phi3"])
@pytest.mark.parametrize("site", ALL_SITES)
@torch.no_grad()
def test_every_site_alone_changes_weights_and_cancels(model_type, site):
    block, swapped, hidden, kwargs, spec = next(iter(swapped_blocks(model_type)))
    transform = EquivalentTransform(swapped, spec, sites=[site])
    assert [key.rstrip("_2") for key in transform.log_scale] == [site]
    before = {name: parameter.clone() for name, parameter in swapped.named_parameters()}
    randomise_scales(transform)
    transform.fold()
    assert any(
        not torch.equal(parameter, before[name]) for name, parameter in swapped.named_parameters() if name in before
    )
    torch.testing.assert_close(
        run_block(swapped, hidden, kwargs), run_block(block, hidden, kwargs), atol=3e-5, rtol=2e-5
    )


def test_values_are_shared_over_query_groups_and_rope_partners():
    _, swapped, _, _, spec = next(iter(swapped_blocks("llama")))
    transform = EquivalentTransform(swapped, spec, sites=ALL_SITES)
    sizes = {key: parameter.numel() for key, parameter in transform.log_scale.items()}
    assert sizes == {"norm_to_qkv": 64, "v_to_out": 32, "q_to_k": 16, "norm_to_mlp": 64, "up_to_down": 96}
    randomise_scales(transform)
    transform.attach()
    key = 1 / swapped.self_attn.k_proj.row_divisor.reshape(2, 16)
    query = swapped.self_attn.q_proj.row_divisor.reshape(2, 2, 16)
    assert torch.equal(key[:, :8], key[:, 8:]) and torch.equal(query[:, 0], query[:, 1])
    torch.testing.assert_close(query[:, 0], key)
    out = swapped.self_attn.o_proj.column_scale.reshape(2, 2, 16)
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0].flatten(), swapped.self_attn.v_proj.row_divisor)


def test_untied_rope_partners_would_not_cancel():
    block, swapped, hidden, kwargs, spec = next(iter(swapped_blocks("llama")))
    transform = EquivalentTransform(swapped, spec, sites=["q_to_k"])
    transform.attach()
    scale = torch.rand(32) + 0.5
    with torch.no_grad():
        swapped.self_attn.k_proj.row_divisor = 1 / scale
        swapped.self_attn.q_proj.row_divisor = scale.reshape(2, 1, 16).expand(2, 2, 16).flatten()
        assert (run_block(swapped, hidden, kwargs) - run_block(block, hidden, kwargs)).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt"])
def test_gradients_reach_every_scale_through_the_grids(model_type):
    _, swapped, hidden, kwargs, spec = next(iter(swapped_blocks(model_type, scheme="w4a8_g32")))
    set_quantize([swapped], True)
    transform = EquivalentTransform(swapped, spec, sites=ALL_SITES)
    randomise_scales(transform)
    for _ in range(2):  # a second step needs a fresh graph
        transform.refresh()
        run_block(swapped, hidden, kwargs).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in transform.parameters())
    assert not any(name.startswith("_block") for name, _ in transform.named_parameters())


@torch.no_grad()
def test_initial_scales_follow_the_rule_and_dead_channels_stay_bounded():
    _, swapped, _, _, spec = next(iter(swapped_blocks("llama")))
    transform = EquivalentTransform(swapped, spec)
    amax = {
        name: torch.rand(module.in_features) + 0.1
        for name, module in swapped.named_modules()
        if hasattr(module, "scheme")
    }
    amax["self_attn.q_proj"][3] = 0.0
    transform.init_from(amax)
    weight = torch.cat([swapped.get_submodule(f"self_attn.{leaf}_proj").weight for leaf in "qkv"]).abs().amax(0)
    scale = transform.scales()["norm_to_qkv"]
    torch.testing.assert_close(scale[4:], (amax["self_attn.q_proj"] / weight)[4:].sqrt())
    assert scale[3] == pytest.approx(1e-2)
    a, w = (
        amax["self_attn.o_proj"].reshape(2, 2, 16).amax(1),
        swapped.self_attn.o_proj.weight.abs().amax(0).reshape(2, 2, 16).amax(1),
    )
    torch.testing.assert_close(transform.scales()["v_to_out"], (a / w).sqrt().flatten())
    assert torch.equal(transform.scales()["q_to_k"], torch.ones(16))
    transform.init_from({})  # no statistics: nothing changes
    torch.testing.assert_close(transform.scales()["norm_to_qkv"], scale)


@torch.no_grad()
def test_fold_rounds_what_stays_in_floating_point_and_keeps_the_codes():
    _, swapped, _, _, spec = next(iter(swapped_blocks("qwen2")))
    swapped.to(torch.bfloat16)
    transform = EquivalentTransform(swapped, spec)
    randomise_scales(transform)
    transform.attach()
    calibrated = {name: module.freeze().codes for name, module in swapped.named_modules() if hasattr(module, "scheme")}
    transform.fold(torch.bfloat16)
    for tensor in (swapped.input_layernorm.weight, swapped.self_attn.v_proj.bias):
        assert torch.equal(tensor, tensor.to(torch.bfloat16).to(tensor.dtype))
    frozen = freeze_linears(swapped)
    assert all(torch.equal(frozen[name].codes, codes) for name, codes in calibrated.items())


def test_detaching_gives_the_untransformed_block_back():
    block, swapped, hidden, kwargs, spec = next(iter(swapped_blocks("mistral")))
    transform = EquivalentTransform(swapped, spec)
    randomise_scales(transform)
    transform.attach()
    transform.detach()
    assert torch.equal(run_block(swapped, hidden, kwargs), run_block(block, hidden, kwargs))


def test_block_with_plain_linears_is_refused():
    model = tiny_model()
    transform = EquivalentTransform(model.get_submodule("model.layers.0"), block_spec(model.config))
    with pytest.raises(TypeError, match="swap the block's linears"):
        transform.attach()


def test_tied_values_get_the_sum_of_their_gradients():
    """As torch's own indexing does it, for values with one, two and no rows."""
    index = torch.tensor([1, 0, 1, 3])
    weights, ours, theirs = torch.randn(4), torch.randn(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    with torch.no_grad():
        theirs.copy_(ours)
    spread = _Spread.of(index, 4, torch.device("cpu"))
    assert torch.equal(spread(ours), theirs[index])
    (spread(ours) * weights).sum().backward()
    (theirs[index] * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert _Spread.of(torch.arange(4), 4, torch.device("cpu"))(ours) is ours
