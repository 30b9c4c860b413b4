"""Norms and gates that quantize their own output compute what the block computed, forward and backward."""

import pytest
import torch

from qrealign.arch import block_spec
from qrealign.config import parse_scheme
from qrealign.data.capture import capture_block_inputs, run_block
from qrealign.quant import fused
from qrealign.quant.fake_quant import FakeQuantLinear, swap_linears
from qrealign.quant.fused import fused_inputs, fused_rotation
from qrealign.quant.transform import EquivalentTransform
from tests.helpers import random_batch, tiny_model

GATED = {"input_layernorm", "post_attention_layernorm", "mlp"}
EXPECTED = {
    "llama": GATED,
    "qwen2": GATED,
    "mistral": GATED,
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm"},  # gated by a GELU
    "phi3": {"input_layernorm", "post_attention_layernorm"},  # gate and up are one linear
    "opt": set(),  # layer norms, no gate
}


def learning_block(model_type):
    """Return a quantized block with a transform, its inputs and the transform's parameters."""
    model = tiny_model(model_type, seed=2)
    ids, mask = random_batch(150, batch=2, length=9)
    hidden, kwargs = capture_block_inputs(model, ids, mask)
    spec = block_spec(model.config, model)
    block = spec.blocks_of(model)[0]
    swap_linears(block, parse_scheme("w8a8"), scale_dtype=torch.float32)
    transform = EquivalentTransform(block, spec)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in transform.parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return block, spec, hidden, kwargs[0], transform


def output_and_gradients(block, hidden, kwargs, transform):
    transform.refresh()
    output = run_block(block, hidden, kwargs)
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    gradients = {name: value.grad.clone() for name, value in transform.named_parameters()}
    transform.zero_grad()
    return output.detach(), gradients


@pytest.mark.parametrize("model_type", list(EXPECTED))
def test_fused_blocks_compute_what_they_computed(model_type):
    block, spec, hidden, kwargs, transform = learning_block(model_type)
    expected, wanted = output_and_gradients(block, hidden, kwargs, transform)
    transform.detach()
    with fused_inputs(block, spec) as names:
        assert set(names) == EXPECTED[model_type]
        found, gradients = output_and_gradients(block, hidden, kwargs, transform)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-3 * float(wanted[name].abs().max()))
    assert not any("forward" in vars(module) for module in block.modules())


def test_inputs_are_quantized_once(monkeypatch):
    block, spec, hidden, kwargs, transform = learning_block("llama")
    calls = []
    module = "qrealign.quant.coded.fake_quant_per_token"
    monkeypatch.setattr(module, lambda x, num_bits: calls.append(x.shape[-1]) or x)
    output_and_gradients(block, hidden, kwargs, transform)
    assert calls == [64, 64, 64, 96]  # for q, k and v; for o; for gate and up; for down
    calls.clear()
    transform.detach()
    with fused_inputs(block, spec):
        output_and_gradients(block, hidden, kwargs, transform)
    assert calls == [64]  # for o


def test_linears_without_rounded_inputs_are_left_alone():
    block, spec, *_ = learning_block("llama")
    for layer in block.modules():
        if isinstance(layer, FakeQuantLinear):
            layer.scheme = parse_scheme("w4a16_g32")
    with fused_inputs(block, spec) as names:
        assert names == []


@pytest.mark.parametrize(
    ("model_type", "fits"), [("llama", True), ("qwen2", True), ("gemma2", True), ("phi3", True), ("opt", False)]
)
def test_queries_and_keys_are_turned_in_one_pass_with_the_same_bits(model_type, fits, monkeypatch):
    turned, original = [], fused.rotate_heads
    monkeypatch.setattr(fused, "rotate_heads", lambda x, *rest: turned.append(x.shape[1]) or original(x, *rest))
    block, _, hidden, kwargs, transform = learning_block(model_type)
    expected, wanted = output_and_gradients(block, hidden, kwargs, transform)
    with fused_rotation(block) as found:
        assert found == fits
        output, gradients = output_and_gradients(block, hidden, kwargs, transform)
    assert len(turned) == (2 if fits else 0)
    assert torch.equal(output, expected)
    assert all(torch.equal(gradients[name], value) for name, value in wanted.items())
    output_and_gradients(block, hidden, kwargs, transform)
    assert len(turned) == (2 if fits else 0)  # as before, at the end


def test_a_function_that_turns_otherwise_is_left_alone(monkeypatch):
    block = learning_block("llama")[0]
    module = fused.inspect.getmodule(type(block))
    for other in (lambda q, k, cos, sin: (q, k), lambda q: q, lambda q, k, cos, sin: (q,)):
        monkeypatch.setattr(module, "apply_rotary_pos_emb", other)
        with fused_rotation(block) as found:
            assert not found and module.apply_rotary_pos_emb is other


def test_what_is_asked_for_otherwise_is_left_to_the_model():
    calls, x = [], torch.randn(1, 2, 3, 8)

    def own(*args, **named):
        calls.append(named)
        return args[:2]

    angles = torch.randn(1, 3, 8)
    fused._rotate(own, x, x, angles, angles, unsqueeze_dim=2)
    fused._rotate(own, x, x, angles[..., :4], angles[..., :4])
    fused._rotate(own, x, x, angles.double(), angles)
    assert len(calls) == 3
    fused._rotate(own, x, x, angles, angles)
    assert len(calls) == 3
