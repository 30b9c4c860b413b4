"""Per-token activation quantization: every backend against the definition and against the checkpoint format's
package."""

from __future__ import annotations

import pytest
import torch

import qrealign_kernels as kernels
from qrealign_kernels import reference

pytestmark = pytest.mark.usefixtures("each_backend")


def awkward_tokens() -> torch.Tensor:
    """Return `[2, 6, 75]` float32: zeros, one entry, subnormals, large and one-sided tokens."""
    x = torch.randn(2, 6, 75)
    x[0, 0] = 0
    x[0, 1] = 0
    x[0, 1, 70] = -3.0
    x[0, 2] *= 1e-42
    x[0, 3] *= 1e30
    x[0, 4] = x[0, 4].abs()
    x[0, 5] = -x[0, 5].abs()
    x[1, 0] = torch.linspace(-127.5, 127.5, 75)  # many ties
    return x


@pytest.mark.parametrize("num_bits", [8, 4])
def test_equals_the_package_exactly(num_bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=num_bits, type="int", symmetric=True, strategy="token", dynamic=True)
    x = awkward_tokens()
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(kernels.fake_quant_per_token(x, num_bits=num_bits), fake_quantize(x, scale, zero_point, args))
    assert torch.equal(kernels.quantize_per_token(x, num_bits=num_bits)[1], scale)


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 67), (1, 2100), (0, 8)], ids=str)
@pytest.mark.parametrize("num_bits", [8, 4])
def test_equals_reference(shape: tuple[int, ...], num_bits: int) -> None:
    x = torch.randn(shape)
    codes, scale = kernels.quantize_per_token(x, num_bits=num_bits)
    expected_codes, expected_scale = reference.quantize_per_token_ref(x, num_bits=num_bits)
    assert codes.dtype == torch.int8
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    fake = kernels.fake_quant_per_token(x, num_bits=num_bits)
    assert torch.equal(fake, reference.fake_quant_per_token_ref(x, num_bits=num_bits))
    assert torch.equal(fake, codes * scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 40])
def test_numbers_that_are_none_stay_visible(bad: float, place: int) -> None:
    x = torch.ones(2, 41)
    x[0, place] = bad
    scale = kernels.quantize_per_token(x)[1]
    torch.testing.assert_close(scale, reference.quantize_per_token_ref(x)[1], rtol=0, atol=0, equal_nan=True)
    assert not torch.isfinite(scale[0]) and torch.isfinite(scale[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, each_backend: str) -> None:
    if each_backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter truncates when it stores bfloat16")
    x = torch.randn(3, 50).to(dtype)
    fake = kernels.fake_quant_per_token(x)
    assert fake.dtype == dtype
    assert torch.equal(fake, reference.fake_quant_per_token_ref(x.float()).to(dtype))


def test_gradient_passes_straight_through() -> None:
    x, grad = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
    assert torch.equal(torch.autograd.grad(kernels.fake_quant_per_token(x), x, grad)[0], grad)


def test_reference_gradient_passes_straight_through() -> None:
    x, grad = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    assert torch.equal(torch.autograd.grad(reference.fake_quant_per_token_ref(x), x, grad)[0], grad)


@pytest.mark.parametrize(
    ("x", "num_bits", "error"),
    [
        (torch.zeros(2, 0), 8, ValueError),
        (torch.tensor(1.0), 8, ValueError),
        (torch.zeros(2, 3), 1, ValueError),
        (torch.zeros(2, 3, dtype=torch.int8), 8, TypeError),
    ],
)
def test_bad_arguments(x: torch.Tensor, num_bits: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        kernels.fake_quant_per_token(x, num_bits=num_bits)


def test_strided_input_is_read_as_it_looks() -> None:
    x = torch.randn(6, 40).t()
    assert torch.equal(kernels.fake_quant_per_token(x), reference.fake_quant_per_token_ref(x.contiguous()))
