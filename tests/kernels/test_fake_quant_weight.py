"""Weight fake-quantization: every backend against the definition, and the definition against its own promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import reference

SHAPES = [
    pytest.param(3, 97, None, id="N3-K97-channel"),
    pytest.param(2, 2049, None, id="N2-K2049-channel"),
    pytest.param(5, 96, 32, id="N5-K96-g32"),
    pytest.param(2, 66, 33, id="N2-K66-g33"),
]
SCHEMES = [
    pytest.param(8, True, torch.bfloat16, id="w8"),
    pytest.param(4, True, torch.float16, id="w4"),
    pytest.param(4, False, torch.bfloat16, id="w4-asym"),
    pytest.param(8, False, torch.float32, id="w8-asym"),
]


def make_case(
    rows: int, columns: int, group_size: int | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Return a weight with awkward rows, and logits that clip a good part of it."""
    weight = torch.randn(rows, columns) * 0.05
    weight[0] = weight[0].abs()  # nothing below zero
    weight[1, : columns // 2] = weight[1].max()  # ties at the maximum
    if rows > 2:
        weight[2] = 0
    groups = columns // (group_size or columns)
    return weight.to(dtype), torch.randn(rows, groups), torch.randn(rows, groups)


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize(("num_bits", "symmetric", "scale_dtype"), SCHEMES)
@pytest.mark.parametrize("clips", ["none", "low", "high", "both"])
def test_fake_quant_weight_equals_reference(
    each_backend: str,
    rows: int,
    columns: int,
    group_size: int | None,
    num_bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    clips: str,
) -> None:
    weight, low_logit, high_logit = make_case(rows, columns, group_size)
    low = low_logit.requires_grad_() if clips in ("low", "both") else None
    high = high_logit.requires_grad_() if clips in ("high", "both") else None
    weight.requires_grad_()
    recipe = {"num_bits": num_bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}

    fake = kernels.fake_quant_weight(weight, low, high, **recipe)
    truth = reference.fake_quant_weight_ref(weight, low, high, **recipe)
    codes, scale, zero_point = kernels.quantize_weight(weight, low, high, **recipe)

    assert torch.equal(fake, truth)
    assert torch.equal(fake, kernels.dequantize_weight(codes, scale, zero_point))
    assert torch.equal(scale, scale.to(scale_dtype).float())
    assert (zero_point is None) == symmetric
    grad = torch.randn_like(fake)
    inputs = [tensor for tensor in (weight, low, high) if tensor is not None]
    for actual, expected in zip(
        torch.autograd.grad(fake, inputs, grad), torch.autograd.grad(truth, inputs, grad), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_the_codes_of_their_values(each_backend: str, dtype: torch.dtype) -> None:
    weight, low, high = make_case(4, 64, None, dtype)
    weight.requires_grad_()
    fake = kernels.fake_quant_weight(weight, low, high, num_bits=8)
    assert torch.equal(fake, reference.fake_quant_weight_ref(weight.float(), low, high, num_bits=8))
    (grad,) = torch.autograd.grad(fake.sum(), weight)
    assert grad.dtype == dtype


def test_gradients_are_deterministic(each_backend: str) -> None:
    weight, low, high = (tensor.requires_grad_() for tensor in make_case(4, 300, None))
    grad = torch.randn(4, 300)
    first, second = (
        torch.autograd.grad(kernels.fake_quant_weight(weight, low, high, num_bits=4), (weight, low, high), grad)
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_every_element_is_written(each_backend: str, poisoned_memory: None) -> None:
    weight, low, high = (tensor.requires_grad_() for tensor in make_case(5, 70, 35))
    fake = kernels.fake_quant_weight(weight, low, high, num_bits=4, group_size=35)
    grads = torch.autograd.grad(fake.sum(), (weight, low, high))
    assert all(torch.isfinite(tensor).all() for tensor in (fake, *grads))


def test_nothing_clipped_passes_the_gradient_unchanged() -> None:
    weight = torch.randn(4, 32, requires_grad=True)
    grad = torch.randn(4, 32)
    fake = kernels.fake_quant_weight(weight, num_bits=4, group_size=16)
    assert torch.equal(torch.autograd.grad(fake, weight, grad)[0], grad)


def test_logit_gradients_approach_those_of_plain_clipping() -> None:
    """On a fine grid the op is nearly clipping alone, whose gradients torch knows."""
    weight = torch.randn(1, 4096)
    low, high = torch.full((1, 1), 0.7, requires_grad=True), torch.full((1, 1), 0.3, requires_grad=True)
    fake = kernels.fake_quant_weight(weight, low, high, num_bits=8, scale_dtype=torch.float32)
    clipped = weight.clamp(weight.min() * low.sigmoid(), weight.max() * high.sigmoid())
    actual = torch.autograd.grad(fake.square().mean(), (low, high))
    expected = torch.autograd.grad(clipped.square().mean(), (low, high))
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0)


def test_nan_weights_stay_visible(each_backend: str) -> None:
    weight = torch.randn(2, 40)
    weight[1, 3] = float("nan")
    fake = kernels.fake_quant_weight(weight, num_bits=8)
    assert torch.isnan(fake[1, 3])
    assert torch.isfinite(fake[0]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_bits": 9}, ValueError, "num_bits must be 2 to 8, got 9"),
        ({"group_size": 7}, ValueError, "group_size must divide K, got 7 for K = 32"),
        ({"scale_dtype": torch.float64}, TypeError, "scale_dtype must be"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be \[N, K\]"),
        ({"weight": torch.zeros(4, 32, dtype=torch.int8)}, TypeError, "weight must be floating point"),
        ({"low_logit": torch.zeros(4, 2)}, ValueError, r"low_logit must be \(4, 1\)"),
        ({"high_logit": torch.zeros(1)}, ValueError, r"high_logit must be \(4, 1\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"weight": torch.zeros(4, 32), "num_bits": 8} | change
    with pytest.raises(error, match=message):
        kernels.fake_quant_weight(**arguments)


@pytest.mark.parametrize(
    ("codes", "scale", "zero_point", "error"),
    [
        (torch.zeros(2, 4), torch.ones(2, 1), None, TypeError),
        (torch.zeros(8, dtype=torch.int8), torch.ones(2, 1), None, ValueError),
        (torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 3), None, ValueError),
        (torch.zeros(2, 4, dtype=torch.int8), torch.ones(3, 1), None, ValueError),
        (torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1), torch.zeros(2, 1), TypeError),
        (torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 2), torch.zeros(2, 1, dtype=torch.int8), ValueError),
    ],
)
def test_dequantize_checks_its_arguments(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, error: type[Exception]
) -> None:
    with pytest.raises(error):
        kernels.dequantize_weight(codes, scale, zero_point)


def test_dequantize_returns_the_dtype_asked_for() -> None:
    codes, scale, _ = kernels.quantize_weight(torch.randn(2, 8), num_bits=8)
    half = kernels.dequantize_weight(codes, scale, out_dtype=torch.bfloat16)
    assert torch.equal(half, kernels.dequantize_weight(codes, scale).bfloat16())
