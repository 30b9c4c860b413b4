"""The gradients of a low-rank edit: every backend against the definition, and the definition against autograd."""

from __future__ import annotations

import contextlib

import pytest
import torch

import qrealign_kernels as kernels
from qrealign_kernels import launches
from qrealign_kernels.reference_calibration import low_rank_gradients_ref

SMALL = {
    "low_rank_inner": {"BLOCK_M": 16, "BLOCK_C": 16, "num_warps": 4},
    "low_rank_outer": {"BLOCK_M": 16, "BLOCK_C": 32, "num_warps": 4},
}


def operands(
    tokens: int, rows: int, columns: int, rank: int, dtype: torch.dtype, *, codes: bool
) -> list[torch.Tensor | None]:
    """Return grad, x, left, right and the tokens' scale."""
    x = (
        torch.randint(-128, 128, (tokens, columns), dtype=torch.int8)
        if codes
        else torch.randn(tokens, columns).to(dtype)
    )
    scale = torch.rand(tokens, 1) / 50 + 1e-3 if codes else None
    return [torch.randn(tokens, rows).to(dtype), x, torch.randn(rows, rank), torch.randn(rank, columns), scale]


def test_the_definition_is_the_gradient_of_the_edit() -> None:
    grad, x, left, right, scale = operands(9, 7, 11, 3, torch.float32, codes=True)
    left, right = left.requires_grad_(), right.requires_grad_()
    ((x * scale) @ (left @ right).T).backward(grad)
    for found, factor in zip(low_rank_gradients_ref(grad, x, left, right, scale), (left, right), strict=True):
        torch.testing.assert_close(found, factor.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 5, 40), (37, 67, 21)])
@pytest.mark.parametrize("rank", [2, 3, 9])
@pytest.mark.parametrize(
    ("dtype", "codes"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_gradients_equal_the_definition(
    each_backend: str,
    poisoned_memory: None,
    tokens: int,
    rows: int,
    columns: int,
    rank: int,
    dtype: torch.dtype,
    codes: bool,
) -> None:
    given = operands(tokens, rows, columns, rank, dtype, codes=codes)
    exact = [None if one is None else one if one.dtype == torch.int8 else one.double() for one in given]
    with contextlib.ExitStack() as stack:
        for kernel, launch in SMALL.items():  # tiles that none of the shapes fills
            stack.enter_context(launches.forced(kernel, launch))
        found = kernels.low_rank_gradients(*given)
    for got, want, factor in zip(found, low_rank_gradients_ref(*exact), given[2:4], strict=True):
        assert got.shape == factor.shape and got.dtype == factor.dtype
        limit = (1e-5 if dtype == torch.float32 else 2e-2) * float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=limit)


def test_two_runs_give_the_same_bits(triton_backend: None) -> None:
    given = operands(20, 45, 65, 2, torch.bfloat16, codes=True)
    for first, second in zip(kernels.low_rank_gradients(*given), kernels.low_rank_gradients(*given), strict=True):
        assert torch.equal(first, second)


def test_rows_may_be_strided_and_there_may_be_none(each_backend: str) -> None:
    grad, x, left, right, _ = operands(6, 8, 10, 2, torch.float32, codes=False)
    wide = torch.stack([grad, grad], dim=-1)[..., 0]
    expected = low_rank_gradients_ref(grad, x, left, right)
    torch.testing.assert_close(kernels.low_rank_gradients(wide, x, left, right), expected)
    for found in kernels.low_rank_gradients(grad[:0], x[:0], left, right):
        assert not found.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: [*given[:3], given[3][:1], given[4]], "must be"),
        (lambda given: [given[0][0], *given[1:]], "must be"),
        (lambda given: [*given[:4], None], "scale"),
        (lambda given: [given[0], given[1].float(), *given[2:]], "scale"),
        (lambda given: [*given[:4], given[4][:1]], "scale"),
    ],
)
def test_bad_operands_are_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.low_rank_gradients(*change(operands(4, 5, 6, 2, torch.float32, codes=True)))
