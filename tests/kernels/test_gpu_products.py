"""The quantized products on a GPU, at the sizes of real layers: tuned launches, graphs, kernels that overlap."""

from __future__ import annotations

import pytest
import torch

import qrealign_kernels as kernels
from qrealign_kernels import reference_linear
from qrealign_kernels.quantized import PackedWeight

pytestmark = pytest.mark.gpu
ROWS, COLUMNS = 4096, 11008
RECIPES = [(8, 8, None), (4, None, 128), (4, 8, 128)]  # bits, bits of activations, group size
TOKENS = (1, 2, 8, 16, 40, 64, 200, 300, 2050)


def weights(bits: int, activation_bits: int | None, group: int | None) -> tuple[PackedWeight, PackedWeight]:
    """Return a random layer as the kernels and as the definition hold it."""
    weight = torch.randn(ROWS, COLUMNS, device="cuda") * 0.02
    codes, scale, _ = kernels.quantize_weight(weight, num_bits=bits, group_size=group)
    kind = {"num_bits": bits, "activation_bits": activation_bits}
    return kernels.repack_weight(codes, scale, **kind), reference_linear.repack_weight_ref(codes, scale, None, **kind)


@pytest.mark.parametrize(("bits", "activation_bits", "group"), RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_layer_equals_definition(
    bits: int, activation_bits: int | None, group: int | None, dtype: torch.dtype
) -> None:
    packed, plain = weights(bits, activation_bits, group)
    bias = torch.randn(ROWS, device="cuda", dtype=dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, COLUMNS, device="cuda", dtype=dtype)
        out = kernels.packed_linear(x, packed, bias, out_dtype=torch.float32)
        truth = reference_linear.packed_linear_ref(x, plain, bias, torch.float32)
        # Integers are exact; elsewhere the weight may be rounded to x's dtype, and codes of x never differ.
        assert (out - truth).norm() / truth.norm() < (4e-3 if activation_bits is None else 1e-5), tokens
        assert torch.equal(out, kernels.packed_linear(x, packed, bias, out_dtype=torch.float32)), "two runs differ"


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize(("bits", "activation_bits", "group"), RECIPES)
def test_kernels_that_overlap_wait_for_their_inputs(
    bits: int, activation_bits: int | None, group: int | None, tokens: int
) -> None:
    """A chain in a CUDA graph, replayed on changing inputs: each product reads what the one before has just written."""
    wide, _ = weights(bits, activation_bits, group)
    codes, scale, _ = kernels.quantize_weight(
        torch.randn(COLUMNS, ROWS, device="cuda") * 0.02, num_bits=bits, group_size=group
    )
    narrow = kernels.repack_weight(codes, scale, num_bits=bits, activation_bits=activation_bits)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = kernels.packed_linear(kernels.packed_linear(x, wide), narrow)
            x = x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
        return x

    still = torch.randn(tokens, COLUMNS, device="cuda", dtype=torch.bfloat16)
    chain(still)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(still)
    for _ in range(5):
        still.copy_(torch.randn_like(still))
        graph.replay()
        torch.cuda.synchronize()
        with_waits = still
        for _ in range(8):
            with_waits = kernels.packed_linear(with_waits, wide)
            torch.cuda.synchronize()
            with_waits = kernels.packed_linear(with_waits, narrow)
            torch.cuda.synchronize()
            with_waits = with_waits / with_waits.float().square().mean(-1, keepdim=True).sqrt().to(with_waits.dtype)
        assert torch.equal(out, with_waits)


@pytest.mark.parametrize(("bits", "activation_bits", "group"), RECIPES[:2])
def test_compiled_for_the_gpu(bits: int, activation_bits: int | None, group: int | None) -> None:
    packed, _ = weights(bits, activation_bits, group)
    compiled = torch.compile(lambda x: kernels.packed_linear(x, packed) + 1, fullgraph=True)
    x = torch.randn(1, COLUMNS, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(x), kernels.packed_linear(x, packed) + 1)


def test_calibration_products_of_a_real_layer() -> None:
    weight = torch.randn(ROWS, COLUMNS, device="cuda") * 0.02
    codes, scale, _ = kernels.quantize_weight(weight, num_bits=8)
    x, grad = torch.randn(1024, COLUMNS, device="cuda").bfloat16(), torch.randn(1024, ROWS, device="cuda").bfloat16()
    x_codes, x_scale = kernels.quantize_per_token(x)
    out = kernels.int8_matmul(x_codes, x_scale, codes, scale, None, torch.float32)
    truth = reference_linear.int8_matmul_ref(x_codes, x_scale, codes, scale, out_dtype=torch.float32)
    assert (out - truth).norm() / truth.norm() < 1e-6
    truth = reference_linear.int8_matmul_dx_ref(grad.float(), codes, scale)
    assert (kernels.int8_matmul_dx(grad, codes, scale).float() - truth).norm() / truth.norm() < 5e-3
