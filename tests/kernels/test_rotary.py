"""Turning heads by their positions: every backend has the bits of the operations one by one, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels.reference_calibration import rotate_heads_ref


def operands(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype, angles: int) -> list[Tensor]:
    """Return heads as a model's projection gives them, which lie token by token, and the angles' cosine and sine."""
    x = torch.randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)
    return [x, *(torch.randn(angles, tokens, width).to(dtype) for _ in range(2))]


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (5, 24), (20, 64)])
@pytest.mark.parametrize("angles", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_have_the_bits_of_the_definition(
    each_backend: str, poisoned_memory: None, heads: int, width: int, angles: int, dtype: torch.dtype
) -> None:
    x, cos, sin = operands(2, heads, 3, width, dtype, angles)
    grad = torch.randn(2, heads, width, 3).to(dtype).transpose(2, 3)  # strided in its last dimension
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    turned, wanted = kernels.rotate_heads(found, cos, sin), rotate_heads_ref(expected, cos, sin)
    assert torch.equal(turned, wanted) and turned.dtype == dtype
    turned.backward(grad)
    wanted.backward(grad)
    assert torch.equal(found.grad, expected.grad)


def test_no_tokens_are_no_heads(each_backend: str) -> None:
    assert kernels.rotate_heads(*operands(1, 2, 0, 4, torch.float32, 1)).shape == (1, 2, 0, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, cos, sin: (x[0], cos, sin),
        lambda x, cos, sin: (x[..., :3], cos[..., :3], sin[..., :3]),
        lambda x, cos, sin: (x, cos[:, :2], sin),
        lambda x, cos, sin: (x, cos, sin.bfloat16()),
        lambda x, cos, sin: (x.int(), cos.int(), sin.int()),
    ],
)
def test_bad_operands_are_refused(change) -> None:
    with pytest.raises(ValueError, match="heads must be"):
        kernels.rotate_heads(*change(*operands(2, 3, 4, 8, torch.float32, 2)))
