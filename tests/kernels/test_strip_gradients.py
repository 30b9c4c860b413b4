"""The backward that walks down strips of columns, against the definition: strips, ties, edge cases, the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import launches, triton_common
from qrealign_kernels import reference_calibration as definitions
from qrealign_kernels.reference_calibration import WeightTransform

if (reason := triton_common.unavailable_reason()) is not None:
    pytest.skip(reason, allow_module_level=True)
from qrealign_kernels import triton_weight_gradients

pytestmark = pytest.mark.usefixtures("triton_backend")
ALL = ("low_logit", "high_logit", "column_scale", "row_divisor")
STRIP = {"BLOCK_N": 2, "PIECES": 2, "AHEAD": 2, "PROGRAMS": 6, "COLUMNS": 1, "num_warps": 2}


@contextlib.contextmanager
def in_strips(**launch: int) -> Iterator[None]:
    """Let every weight of whole-row groups go that way, and fail where one does not."""
    ends = {"BLOCK_R": 16, "num_warps": 4}
    with (
        launches.forced("strip_gradients_bwd", STRIP | launch),
        launches.forced("extreme_gradients_bwd", ends),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delattr(triton_weight_gradients, "_reduce_stored")
        yield


def leaves(weight: Tensor, given: tuple[str, ...]) -> dict[str, Tensor]:
    rows, columns = weight.shape
    tensors = {
        "low_logit": torch.randn(rows, 1),
        "high_logit": torch.randn(rows, 1),
        "column_scale": torch.rand(columns) + 0.5,
        "row_divisor": torch.rand(rows) + 0.5,
    }
    return {name: tensors[name].requires_grad_() for name in given}


def gradients(weight: Tensor, given: dict[str, Tensor], grad: Tensor, **grid: Any) -> list[Tensor]:
    fake = kernels.fake_quant_weight(weight, **given, **grid)
    return list(torch.autograd.grad(fake, list(given.values()), grad))


def assert_equal_the_definition(weight: Tensor, given: dict[str, Tensor], **grid: Any) -> None:
    grad = torch.randn(weight.shape)
    transform = WeightTransform(given.get("column_scale"), given.get("row_divisor"))
    logits = {name: given.get(name) for name in ("low_logit", "high_logit")}
    fake = definitions.fake_quant_edited_weight_ref(weight, **logits, transform=transform, **grid)
    expected = torch.autograd.grad(fake, list(given.values()), grad)
    for name, one, other in zip(given, gradients(weight, given, grad, **grid), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "symmetric", "scale_dtype", "given", "launch"),
    [
        pytest.param(8, 512, 8, True, torch.bfloat16, ALL, {}, id="full"),
        pytest.param(19, 700, 8, True, torch.bfloat16, ALL[:3], {}, id="odd"),
        pytest.param(9, 261, 4, False, torch.float32, ALL, {"PIECES": 1, "BLOCK_N": 4}, id="asymmetric"),
        pytest.param(9, 512, 4, True, torch.float16, ("low_logit", "column_scale"), {"AHEAD": 1}, id="low-alone"),
        pytest.param(3, 4360, 8, False, torch.bfloat16, ("high_logit", "column_scale"), {"PIECES": 4}, id="long"),
    ],
)
def test_gradients_equal_the_definition(
    rows: int,
    columns: int,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    given: tuple[str, ...],
    launch: dict[str, int],
) -> None:
    weight = torch.randn(rows, columns) * 0.05
    weight[0] = weight[0].abs()  # nothing below zero
    with in_strips(**launch):
        assert_equal_the_definition(
            weight, leaves(weight, given), num_bits=bits, symmetric=symmetric, scale_dtype=scale_dtype
        )


def test_ties_share_what_an_extreme_gets() -> None:
    """Within a lane, in two lanes, in two strips, of half a row, of a whole row, and of zeros."""
    weight = torch.randn(9, 700).clamp(-3.0, 3.0) * 0.05
    weight[1, [8, 9]] = 1.0
    weight[2, [8, 17]] = -1.0
    weight[3, [8, 690]] = 1.0
    weight[8, [5, 699]] = -1.0
    weight[4, :350] = -1.0
    weight[5] = 0.25
    weight[6] = 0.0
    given = leaves(weight, ALL)
    with torch.no_grad():
        given["column_scale"].fill_(1.0)
    with in_strips():
        assert_equal_the_definition(weight, given, num_bits=8)


def test_the_bits_are_the_same_every_time() -> None:
    weight, grad = torch.randn(9, 600), torch.randn(9, 600)
    weight[3, 5] = weight[3, 590] = 9.0
    given = leaves(weight, ALL)
    with in_strips():
        first, second = (gradients(weight, given, grad, num_bits=4) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_every_sum_is_written(poisoned_memory: None) -> None:
    weight = torch.randn(5, 700)
    given = leaves(weight, ALL)
    with in_strips():
        found = gradients(weight, given, torch.ones(5, 700), num_bits=8)
    assert all(torch.isfinite(gradient).all() for gradient in found)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [ALL[:3], ALL])
def test_a_real_layer_equals_the_definition_as_launched_there(given: tuple[str, ...]) -> None:
    weight = (torch.randn(11008, 4096) * 0.02).bfloat16()
    tensors = leaves(weight, given)
    with torch.no_grad():
        for name in ("low_logit", "high_logit"):
            tensors[name] += 4
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(triton_weight_gradients, "_reduce_stored")
        assert_close_to_the_definition(weight, tensors)


def assert_close_to_the_definition(weight: Tensor, given: dict[str, Tensor]) -> None:
    """Compare by the error's norm: at this size single values of a sum cancel."""
    grad = torch.randn(weight.shape)
    transform = WeightTransform(given.get("column_scale"), given.get("row_divisor"))
    fake = definitions.fake_quant_edited_weight_ref(
        weight, given["low_logit"], given["high_logit"], transform=transform, num_bits=8
    )
    expected = torch.autograd.grad(fake, list(given.values()), grad)
    for one, other in zip(gradients(weight, given, grad, num_bits=8), expected, strict=True):
        assert (one - other).norm() / other.norm() < 1e-5
