"""The product that rounds its weight anew in each pass, against the one that keeps it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qrealign.config import parse_scheme
from qrealign.quant import coded
from qrealign.quant.coded import InputCodes
from qrealign.quant.edits import LowRankEdit
from qrealign.quant.fake_quant import fake_quant_linears, swap_linears

SCHEMES = ["w8a8", "w4a8_g32", "w4a8_g32_asym", "w4a4_channel", "w8a16", "w4a16_g32", "w4a16_g32_asym"]


class Gated(nn.Module):
    """Two linears that read one tensor, and one that reads their product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 32, bias=False)

    def forward(self, x):
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


def edited(name, is_coded, keeps_codes=False):
    torch.manual_seed(0)
    block = Gated().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for layer in swap_linears(block, parse_scheme(name), scale_dtype=torch.bfloat16).values():
        layer.edit = LowRankEdit(layer.weight, rank=3, budget=0.1, generator=generator)
        nn.init.normal_(layer.edit.left, std=0.02, generator=generator)
        layer.coded, layer.keeps_codes = is_coded, keeps_codes
    return block


def run(block, x):
    x = x.clone().requires_grad_(True)
    out = block(x)
    out.square().mean().backward()
    gradients = {name: value.grad for name, value in block.named_parameters() if value.grad is not None}
    return out.detach(), {"x": x.grad, **gradients}


@pytest.mark.parametrize("keeps_codes", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_values_and_gradients_are_those_of_the_kept_weight(name, keeps_codes):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
    (expected, wanted), (found, gradients) = (run(edited(name, *how), x) for how in ((False,), (True, keeps_codes)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert gradients.keys() == wanted.keys() and len(gradients) == 7
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[key], atol=1e-6, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["w8a8", "w4a16_g32_asym"])
def test_frozen_codes_are_those_of_the_product(name):
    kept, anew = edited(name, False), edited(name, True)
    for mine, theirs in zip(fake_quant_linears(anew).values(), fake_quant_linears(kept).values(), strict=True):
        assert mine.is_coded() and not theirs.is_coded()
        assert torch.equal(mine.freeze().codes, theirs.freeze().codes)


def test_linears_that_read_the_same_tensor_quantize_it_once(monkeypatch):
    asked = []
    original = coded.quantize_per_token
    monkeypatch.setattr(coded, "quantize_per_token", lambda x, **kw: asked.append(tuple(x.shape)) or original(x, **kw))
    block, x = edited("w8a8", True), torch.randn(2, 7, 64)
    with torch.no_grad():
        block(x)
    assert asked == [(2, 7, 64), (2, 7, 96)]


def test_codes_are_made_anew_when_a_tensor_was_changed_or_replaced():
    inputs, x = InputCodes(), torch.randn(4, 8)
    first = inputs.of(x, 8)
    assert inputs.of(x, 8)[0] is first[0] and inputs.of(x, 4)[0] is not first[0]
    x.mul_(-1)
    for other in (x, torch.randn(4, 8)):
        assert torch.equal(inputs.of(other, 8)[0], coded.quantize_per_token(other)[0])


@pytest.mark.parametrize("name", SCHEMES)
def test_no_weight_is_kept_between_the_passes(name):
    block, saved = edited(name, True), []
    owned = {value.untyped_storage().data_ptr() for value in block.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t.detach(), lambda t: t):
        block(torch.randn(2, 64))
    new = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in owned]
    assert new and max(tensor.numel() for tensor in new) <= 2 * 96


def test_a_weight_whose_codes_are_kept_is_rounded_once(monkeypatch):
    calls = []
    for name in ("encode_weight", "fake_quant_weight"):
        original = getattr(coded, name)
        monkeypatch.setattr(
            coded, name, lambda *args, name=name, original=original, **kw: calls.append(name) or original(*args, **kw)
        )
    for keeps_codes, expected in (
        (True, ["encode_weight"] * 3),
        (False, ["encode_weight"] * 3 + ["fake_quant_weight"] * 3),
    ):
        calls.clear()
        run(edited("w8a8", True, keeps_codes), torch.randn(2, 64))
        assert sorted(calls) == expected


def test_only_an_edit_that_learns_alone_is_coded():
    block = edited("w8a8", True)
    assert block.down.is_coded()
    block.down.quantize = False
    assert not block.down.is_coded()
    block.down.quantize, block.down.bias_edit = True, nn.Parameter(torch.zeros(32))
    assert not block.down.is_coded()
    assert not edited("w8a8", None).down.is_coded()  # on a CPU the weight is kept unless asked otherwise
