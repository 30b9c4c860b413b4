"""Norms and gates that hand codes to the linears behind them: values and gradients of the block stay what they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qrealign.arch import block_spec
from qrealign.config import parse_scheme
from qrealign.data.capture import capture_block_inputs, run_block
from qrealign.quant.edits import LowRankEdit
from qrealign.quant.fake_quant import fake_quant_linears, set_quantize, swap_linears
from qrealign.quant.fused import fused_inputs
from tests.helpers import random_batch, tiny_model
from tests.unit.test_fused import EXPECTED


def coded_block(model_type, scheme="w8a8"):
    """Return a block whose linears learn an edit each by codes, its architecture's row, and its inputs."""
    model = tiny_model(model_type, seed=2)
    hidden, kwargs = capture_block_inputs(model, *random_batch(150, batch=2, length=9))
    spec = block_spec(model.config, model)
    block, generator = spec.blocks_of(model)[0], torch.Generator().manual_seed(4)
    for layer in swap_linears(block, parse_scheme(scheme), scale_dtype=torch.float32).values():
        layer.edit = LowRankEdit(layer.weight, rank=2, budget=0.1, generator=generator)
        nn.init.normal_(layer.edit.left, std=0.02, generator=generator)
        layer.coded = True
    return block, spec, hidden, kwargs[0]


def run(block, hidden, kwargs):
    hidden = hidden.clone().requires_grad_(True)
    output = run_block(block, hidden, kwargs)
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    gradients = {name: value.grad.clone() for name, value in block.named_parameters() if value.grad is not None}
    block.zero_grad()
    return output.detach(), {"hidden": hidden.grad, **gradients}


@pytest.mark.parametrize("model_type", list(EXPECTED))
def test_a_block_of_codes_computes_what_it_computed(model_type):
    block, spec, hidden, kwargs = coded_block(model_type)
    expected, wanted = run(block, hidden, kwargs)
    with fused_inputs(block, spec) as names:
        assert set(names) == EXPECTED[model_type]
        found, gradients = run(block, hidden, kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-3 * float(wanted[name].abs().max()))


def test_what_stands_for_the_codes_takes_no_memory():
    block, spec, hidden, kwargs = coded_block("llama")
    seen = []
    block.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with fused_inputs(block, spec):
        run_block(block, hidden, kwargs)
    assert seen[0].shape == hidden.shape and seen[0].untyped_storage().nbytes() == hidden.element_size()
    assert bool(seen[0].isnan().all())  # read by somebody else, it would be noticed


def test_a_block_in_floating_point_is_left_alone():
    block, spec, _, _ = coded_block("llama")
    set_quantize([block], False)
    with fused_inputs(block, spec) as names:
        assert not names
    with fused_inputs(*coded_block("llama", "w8a16")[:2]) as names:
        assert not names
    assert len(fake_quant_linears(block)) == 7
