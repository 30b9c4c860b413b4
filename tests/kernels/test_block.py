"""A decoder block beside its products and its attention: every backend against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import reference_block
from qrealign_kernels import reference_calibration as definitions

EPS = 1e-5


@pytest.mark.parametrize("shape", [(1, 67), (2, 3, 130)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_behind_a_sum_equals_the_definition(
    each_backend: str, poisoned_memory: None, shape: tuple[int, ...], offset: float, dtype: torch.dtype
) -> None:
    x, branch = (torch.randn(shape).to(dtype) for _ in range(2))
    weight = (torch.rand(shape[-1]) + 0.5).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # one rounding may fall the other way
    for given in (branch, None):
        found = kernels.add_rms_norm(x, given, weight, EPS, offset=offset)
        expected = reference_block.add_rms_norm_ref(x, given, weight, EPS, offset=offset)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_equals_the_definition(each_backend: str, poisoned_memory: None, tokens: int, dtype: torch.dtype) -> None:
    gate, up = torch.randn(tokens, 2 * 131).to(dtype).split(131, dim=-1)  # strided rows, as a joined product's are
    found = kernels.silu_mul(gate, up)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, definitions.silu_mul_ref(gate, up), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("num_bits", [8, 4])
def test_codes_behind_a_sum_equal_the_definition(
    each_backend: str, poisoned_memory: None, offset: float, num_bits: int
) -> None:
    x, branch, weight = torch.randn(2, 3, 130), torch.randn(2, 3, 130), torch.rand(130) + 0.5
    total, found = kernels.add_rms_norm_quantize(x, branch, weight, EPS, offset=offset, num_bits=num_bits)
    expected = reference_block.add_rms_norm_quantize_ref(x, branch, weight, EPS, offset=offset, num_bits=num_bits)
    torch.testing.assert_close(total, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found.scale, expected[2], rtol=1e-5, atol=0)
    difference = (found.codes.int() - expected[1].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.003 and found.dtype == x.dtype


def test_a_branch_of_another_shape_is_refused() -> None:
    x: Tensor = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="branch must be"):
        kernels.add_rms_norm(x, torch.zeros(1, 8), torch.ones(8), EPS)


def test_rows_of_a_table_are_gathered(each_backend: str, poisoned_memory: None) -> None:
    table, indices = torch.randn(7, 1030).bfloat16(), torch.tensor([[3, 0], [6, 3]])
    assert torch.equal(kernels.gather_rows(table, indices), table[indices])
    assert kernels.gather_rows(table, indices[:0]).shape == (0, 2, 1030)


@pytest.mark.gpu
def test_rows_are_gathered_from_the_memory_of_the_host(triton_backend: None) -> None:
    table, indices = torch.randn(7, 1030, device="cpu").pin_memory(), torch.tensor([3, 0, 6], device="cuda")
    assert torch.equal(kernels.gather_rows(table, indices).cpu(), table[indices.cpu()])


@pytest.mark.parametrize(
    ("table", "indices", "error", "words"),
    [
        (torch.zeros(4, 6).t(), torch.zeros(2, dtype=torch.int64), ValueError, "contiguous"),
        (torch.zeros(4, 6), torch.zeros(2, dtype=torch.int32), TypeError, "int64"),
        (torch.zeros(4, 6), torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "pinned"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(
    table: Tensor, indices: Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        kernels.gather_rows(table, indices)
