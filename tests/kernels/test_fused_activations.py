"""Norms and gates with the quantization behind them: every backend against the definition and Hugging Face's norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import reference
from qrealign_kernels import reference_calibration as definitions

SHAPES = [(1, 67), (2, 3, 130), (9, 300)]
EPS = 1e-5


def assert_codes_agree(actual: kernels.QuantizedActivations, expected: tuple[Tensor, Tensor]) -> None:
    """Codes are the same but for the odd one whose rounding hangs on the last bit of a sum."""
    codes, scale = expected
    assert actual.codes.dtype == torch.int8
    difference = (actual.codes.int() - codes.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.003
    torch.testing.assert_close(actual.scale, scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("num_bits", [8, 4])
def test_norm_equals_the_definition(each_backend: str, shape: tuple[int, ...], offset: float, num_bits: int) -> None:
    x, weight = torch.randn(shape) * 3, torch.rand(shape[-1]) + 0.5
    found = kernels.rms_norm_quantize(x, weight, EPS, offset=offset, num_bits=num_bits)
    assert_codes_agree(found, definitions.rms_norm_quantize_ref(x, weight, EPS, offset=offset, num_bits=num_bits))
    assert found.dtype == x.dtype
    x.requires_grad_()
    weight.requires_grad_()
    fake = kernels.rms_norm_fake_quant(x, weight, EPS, offset=offset, num_bits=num_bits)
    expected = definitions.rms_norm_fake_quant_ref(x, weight, EPS, offset=offset, num_bits=num_bits)
    torch.testing.assert_close(fake, found.codes * found.scale)
    grad = torch.randn_like(x)
    pairs = zip(
        torch.autograd.grad(fake, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_bits", [8, 4])
def test_gate_equals_the_definition(each_backend: str, shape: tuple[int, ...], num_bits: int) -> None:
    columns = shape[-1]
    gate, up = torch.randn(*shape[:-1], 2 * columns).split(columns, dim=-1)  # strided rows, as a joined product's are
    found = kernels.silu_mul_quantize(gate, up, num_bits=num_bits)
    assert_codes_agree(found, definitions.silu_mul_quantize_ref(gate, up, num_bits=num_bits))
    assert found.dtype == gate.dtype
    gate, up = gate.requires_grad_(), up.requires_grad_()
    fake = kernels.silu_mul_fake_quant(gate, up, num_bits=num_bits)
    expected = definitions.silu_mul_fake_quant_ref(gate, up, num_bits=num_bits)
    torch.testing.assert_close(fake, found.codes * found.scale)
    grad = torch.randn(shape)
    pairs = zip(
        torch.autograd.grad(fake, (gate, up), grad), torch.autograd.grad(expected, (gate, up), grad), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_norm_rounds_where_the_model_rounds(each_backend: str, weight_dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 120).half(), (torch.rand(120) + 0.5).to(weight_dtype)
    for offset, dtype in ((0.0, weight_dtype), (1.0, torch.float16)):
        found = kernels.rms_norm_quantize(x, weight, EPS, offset=offset)
        assert found.dtype == dtype
        assert kernels.rms_norm_fake_quant(x, weight, EPS, offset=offset).dtype == dtype
        assert_codes_agree(found, definitions.rms_norm_quantize_ref(x, weight, EPS, offset=offset))


def test_gate_rounds_where_the_model_rounds(each_backend: str) -> None:
    gate, up = torch.randn(4, 120).half(), torch.randn(4, 120).half()
    assert_codes_agree(kernels.silu_mul_quantize(gate, up), definitions.silu_mul_quantize_ref(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_definition_is_hugging_faces(dtype: torch.dtype) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for norm, offset in ((LlamaRMSNorm(48, eps=EPS), 0.0), (Gemma2RMSNorm(48, eps=EPS), 1.0)):
        norm.weight.data = torch.rand(48) - 0.5
        norm, x = norm.to(dtype), torch.randn(5, 48).to(dtype)
        assert torch.equal(definitions.rms_norm_ref(x, norm.weight, EPS, offset=offset), norm(x))


def test_tokens_of_zeros_and_no_tokens(each_backend: str) -> None:
    weight = torch.rand(40)
    found = kernels.rms_norm_quantize(torch.zeros(2, 40), weight, EPS)
    assert not found.codes.any()
    assert torch.equal(found.scale, torch.full((2, 1), reference.ZERO_SCALE_REPLACEMENT))
    assert kernels.rms_norm_quantize(torch.zeros(0, 40), weight, EPS).codes.shape == (0, 40)
    assert kernels.silu_mul_quantize(torch.zeros(0, 40), torch.zeros(0, 40)).scale.shape == (0, 1)
    x = torch.zeros(0, 40, requires_grad=True)
    kernels.rms_norm_fake_quant(x, weight, EPS).sum().backward()
    kernels.silu_mul_fake_quant(x, x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 40)


def test_tokens_wider_than_a_tile_equal_the_definition(each_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if each_backend == "triton":
        from qrealign_kernels import triton_activations

        monkeypatch.setattr(triton_activations, "LARGEST_WIDTH", 64)
    x, up, weight = torch.randn(2, 100, requires_grad=True), torch.randn(2, 100), torch.rand(100)
    assert_codes_agree(kernels.rms_norm_quantize(x, weight, EPS), definitions.rms_norm_quantize_ref(x, weight, EPS))
    assert_codes_agree(kernels.silu_mul_quantize(x, up), definitions.silu_mul_quantize_ref(x, up))
    codes, scale = kernels.quantize_per_token(x)
    assert torch.equal(kernels.fake_quant_per_token(x), codes * scale)
    kernels.rms_norm_fake_quant(x, weight, EPS).sum().backward()
    kernels.silu_mul_fake_quant(x, up).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_alone_are_those_of_the_rounded_tokens(each_backend: str, offset: float) -> None:
    x, weight, up, grad = torch.randn(5, 70), torch.rand(70), torch.randn(5, 70), torch.randn(5, 70)
    for operands, fake, gradients in (
        (
            (x, weight),
            lambda x, weight: kernels.rms_norm_fake_quant(x, weight, EPS, offset=offset),
            lambda *given: kernels.rms_norm_gradients(*given, EPS, offset=offset),
        ),
        ((x, up), kernels.silu_mul_fake_quant, kernels.silu_mul_gradients),
    ):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        expected = torch.autograd.grad(fake(*leaves), leaves, grad)
        for found, wanted in zip(gradients(grad, *operands), expected, strict=True):
            assert torch.equal(found, wanted)
        with pytest.raises(ValueError, match="grad must be"):
            gradients(grad[1:], *operands)


def test_every_element_is_written(each_backend: str, poisoned_memory: None) -> None:
    x, weight = torch.randn(5, 70, requires_grad=True), torch.rand(70, requires_grad=True)
    up = torch.randn(5, 70, requires_grad=True)
    for fake, leaves in (
        (kernels.rms_norm_fake_quant(x, weight, EPS, num_bits=4), (x, weight)),
        (kernels.silu_mul_fake_quant(x, up, num_bits=4), (x, up)),
        (kernels.fake_quant_per_token(x, num_bits=4), (x,)),
    ):
        assert all(torch.isfinite(tensor).all() for tensor in (fake, *torch.autograd.grad(fake.sum(), leaves)))
    for codes, scale, *_ in (
        kernels.rms_norm_quantize(x, weight, EPS, num_bits=4),
        kernels.silu_mul_quantize(x, up, num_bits=4),
        kernels.quantize_per_token(x, num_bits=4),
    ):
        assert codes.max() <= 7  # memory that no kernel wrote holds 85
        assert torch.isfinite(scale).all()


def test_torch_compile_sees_one_operator_each() -> None:
    weight = torch.rand(32)

    def tokens(x: Tensor) -> list[Tensor]:
        normed, gated = kernels.rms_norm_quantize(x, weight, EPS), kernels.silu_mul_quantize(x, x)
        return [*normed[:2], *gated[:2], *kernels.quantize_per_token(x)]

    x = torch.randn(3, 32)
    with kernels.use_backend("reference"):
        compiled = torch.compile(tokens, backend="eager", fullgraph=True)(x)
        assert all(torch.equal(one, other) for one, other in zip(compiled, tokens(x), strict=True))


TOKENS = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: kernels.rms_norm_quantize(TOKENS, torch.ones(4), EPS),
            ValueError,
            r"weight must be \(8,\)",
        ),
        (
            lambda: kernels.rms_norm_quantize(TOKENS, torch.ones(8).int(), EPS),
            TypeError,
            "weight must be floating point",
        ),
        (
            lambda: kernels.rms_norm_fake_quant(torch.zeros(2, 0), torch.ones(0), EPS),
            ValueError,
            r"x must be",
        ),
        (lambda: kernels.silu_mul_quantize(TOKENS, torch.zeros(2, 4)), ValueError, "gate and up disagree"),
        (lambda: kernels.silu_mul_fake_quant(TOKENS, TOKENS.half()), TypeError, "one dtype"),
        (lambda: kernels.silu_mul_quantize(TOKENS, TOKENS, num_bits=9), ValueError, "num_bits"),
    ],
)
def test_bad_arguments_are_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
