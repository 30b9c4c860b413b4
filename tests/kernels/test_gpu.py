"""The Triton kernels on a GPU, at the sizes of real layers: codes equal the reference's, gradients within rounding."""

from __future__ import annotations

import pytest
import torch

import qrealign_kernels as kernels
from qrealign_kernels import reference

pytestmark = pytest.mark.gpu
ROWS, COLUMNS = 4096, 11008


@pytest.mark.parametrize(("num_bits", "group_size", "symmetric"), [(8, None, True), (4, 128, True), (4, 128, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_layer_equals_reference(
    num_bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = (torch.randn(ROWS, COLUMNS, device="cuda") * 0.02).to(dtype).requires_grad_()
    shape = (ROWS, COLUMNS // (group_size or COLUMNS))
    low, high = (torch.randn(shape, device="cuda", requires_grad=True) for _ in range(2))
    recipe = {"num_bits": num_bits, "group_size": group_size, "symmetric": symmetric}
    with kernels.use_backend("triton"):
        fake = kernels.fake_quant_weight(weight, low, high, **recipe)
        truth = reference.fake_quant_weight_ref(weight, low, high, **recipe)
        assert torch.equal(fake, truth)
        grad = torch.randn_like(fake)
        actual = torch.autograd.grad(fake, (weight, low, high), grad)
        expected = torch.autograd.grad(truth, (weight, low, high), grad)
    for one, other in zip(actual, expected, strict=True):
        error = (one.float() - other.float()).norm() / other.float().norm()
        assert error < (1e-3 if one.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_activations_equal_reference(dtype: torch.dtype) -> None:
    x = torch.randn(8, 128, COLUMNS, device="cuda").to(dtype)
    with kernels.use_backend("triton"):
        assert torch.equal(kernels.fake_quant_per_token(x), reference.fake_quant_per_token_ref(x))
        codes, scale = kernels.quantize_per_token(x)
    expected_codes, expected_scale = reference.quantize_per_token_ref(x)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)


def test_gpu_and_cpu_scales_agree() -> None:
    """Without logits there is no sigmoid, whose last bit differs between devices: everything is equal."""
    weight = torch.randn(64, 256)
    on_cpu = kernels.quantize_weight(weight, num_bits=4, group_size=128, symmetric=False)
    on_gpu = kernels.quantize_weight(weight.cuda(), num_bits=4, group_size=128, symmetric=False)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(on_cpu, on_gpu, strict=True))
