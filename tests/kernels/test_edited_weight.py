"""Weights that are transformed and edited before they are rounded: every backend against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import reference, triton_common
from qrealign_kernels import reference_calibration as definitions
from qrealign_kernels.reference_calibration import WeightTransform

NAMES = ("weight", "low_logit", "high_logit", "column_scale", "row_divisor", "left", "right")
CASES = [
    # rows, columns, group size, bits, symmetric, scale dtype, what is given besides the weight
    pytest.param(5, 97, None, 8, True, torch.bfloat16, NAMES[1:], id="all"),
    pytest.param(5, 96, 32, 4, False, torch.float16, NAMES[1:], id="all-g32-asym"),
    pytest.param(3, 130, None, 4, False, torch.float32, NAMES[1:5], id="no-edit"),
    pytest.param(40, 66, 33, 8, True, torch.bfloat16, NAMES[1:5], id="no-edit-g33"),
    pytest.param(3, 130, None, 8, True, torch.bfloat16, ("column_scale",), id="column-alone"),
    pytest.param(4, 64, 32, 8, False, torch.bfloat16, ("row_divisor", "low_logit"), id="row-and-low"),
    pytest.param(35, 260, None, 8, True, torch.bfloat16, ("left", "right"), id="edit-alone"),
    pytest.param(2, 2050, None, 4, True, torch.bfloat16, ("high_logit", "left", "right"), id="edit-and-high"),
]


def make_case(rows: int, columns: int, group_size: int | None, given: tuple[str, ...]) -> dict[str, Tensor]:
    """Return an awkward weight and what is given besides it, as leaves."""
    weight = torch.randn(rows, columns) * 0.05
    weight[0] = weight[0].abs()  # nothing below zero
    weight[1, : columns // 2] = weight[1].max()  # ties at the maximum
    groups = columns // (group_size or columns)
    tensors = {
        "weight": weight,
        "low_logit": torch.randn(rows, groups),
        "high_logit": torch.randn(rows, groups),
        "column_scale": torch.rand(columns) + 0.5,
        "row_divisor": torch.rand(rows) + 0.5,
        "left": torch.randn(rows, 3) * 0.1,
        "right": torch.randn(3, columns) * 0.1,
    }
    return {name: tensors[name].requires_grad_() for name in NAMES if name == "weight" or name in given}


def definition(function: Any, tensors: dict[str, Tensor], **grid: Any) -> Any:
    """Call a definition with the arguments of the public op."""
    transform = WeightTransform(*(tensors.get(name) for name in WeightTransform._fields))
    return function(tensors["weight"], tensors.get("low_logit"), tensors.get("high_logit"), transform=transform, **grid)


def assert_gradients_agree(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    grad = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("rows", "columns", "group_size", "bits", "symmetric", "scale_dtype", "given"), CASES)
def test_value_codes_and_gradients_equal_the_definition(
    each_backend: str,
    rows: int,
    columns: int,
    group_size: int | None,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    given: tuple[str, ...],
) -> None:
    tensors = make_case(rows, columns, group_size, given)
    grid = {"num_bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    fake = kernels.fake_quant_weight(**tensors, **grid)
    expected = definition(definitions.fake_quant_edited_weight_ref, tensors, **grid)
    codes, scale, zero_point = kernels.encode_weight(**tensors, **grid)
    expected_codes, expected_scale, expected_zero = definition(definitions.encode_weight_ref, tensors, **grid)
    if "left" in given:  # summed in another order: the odd code may differ by one
        assert ((codes != expected_codes).float().mean()) < 0.002
        torch.testing.assert_close(scale, expected_scale, rtol=1e-2, atol=0)
    else:
        assert torch.equal(codes, expected_codes)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(fake, expected)
    assert (zero_point is None) == symmetric == (expected_zero is None)
    assert torch.equal(fake, kernels.dequantize_weight(codes, scale, zero_point))
    assert not codes.requires_grad
    assert_gradients_agree(fake, expected, list(tensors.values()))


@pytest.mark.parametrize("rank", [1, 8, 9, 20])
@pytest.mark.parametrize(("group_size", "bits", "symmetric"), [(None, 8, True), (52, 4, False)])
def test_edits_of_any_rank_equal_the_definition(
    each_backend: str, rank: int, group_size: int | None, bits: int, symmetric: bool
) -> None:
    """Small ranks are added where a row is held whole, others by tensor cores."""
    tensors = make_case(9, 260, group_size, ())
    tensors |= {"left": 0.1 * torch.randn(9, rank), "right": 0.1 * torch.randn(rank, 260)}
    grid = {"num_bits": bits, "group_size": group_size, "symmetric": symmetric}
    codes, scale, _ = kernels.encode_weight(**tensors, **grid)
    expected_codes, expected_scale, _ = definition(definitions.encode_weight_ref, tensors, **grid)
    assert (codes != expected_codes).float().mean() < 0.003
    torch.testing.assert_close(scale, expected_scale, rtol=1e-2, atol=0)


def test_result_in_half_precision_takes_a_gradient_in_it(each_backend: str) -> None:
    tensors = make_case(4, 70, None, NAMES[1:5])
    fake = kernels.fake_quant_weight(**tensors, num_bits=8, out_dtype=torch.float16)
    expected = definition(definitions.fake_quant_edited_weight_ref, tensors, num_bits=8, out_dtype=torch.float16)
    assert fake.dtype == torch.float16
    assert torch.equal(fake, expected)
    assert_gradients_agree(fake, expected, list(tensors.values()))


def test_frozen_arguments_get_no_gradient(each_backend: str) -> None:
    tensors = make_case(4, 70, None, NAMES[1:])
    for name in ("weight", "right"):
        tensors[name].requires_grad_(False)
    kernels.fake_quant_weight(**tensors, num_bits=8).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {"weight", "right"}


def test_groups_wider_than_a_tile_equal_the_definition(each_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if each_backend == "triton":
        from qrealign_kernels import triton_weight, triton_weight_gradients

        monkeypatch.setattr(triton_weight, "LARGEST_WIDTH", 64)
        monkeypatch.setattr(triton_weight_gradients, "LARGEST_WIDTH", 64)
    tensors = make_case(3, 300, None, NAMES[1:5])
    fake = kernels.fake_quant_weight(**tensors, num_bits=4)
    expected = definition(definitions.fake_quant_edited_weight_ref, tensors, num_bits=4)
    assert torch.equal(fake, expected)
    assert_gradients_agree(fake, expected, list(tensors.values()))


@pytest.mark.parametrize("way", ["in pieces", "in steps"])
def test_rows_that_fill_no_tile_equal_the_definition(
    each_backend: str, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if each_backend == "triton":
        from qrealign_kernels import triton_weight

        if way == "in pieces":
            monkeypatch.setattr(triton_weight, "pieces_of", lambda width: {"BLOCK_C": 256, "PIECES": 3})
        else:
            monkeypatch.setattr(triton_weight, "LARGEST_WIDTH", 512)
    tensors = make_case(5, 600, None, NAMES[1:5])
    fake = kernels.fake_quant_weight(**tensors, num_bits=4, symmetric=False, out_dtype=torch.float16)
    expected = definition(
        definitions.fake_quant_edited_weight_ref, tensors, num_bits=4, symmetric=False, out_dtype=torch.float16
    )
    assert torch.equal(fake, expected)
    assert_gradients_agree(fake, expected, list(tensors.values()))


def test_slightly_edited_rows_in_pieces_equal_the_definition(
    each_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if each_backend == "triton":
        from qrealign_kernels import triton_weight

        monkeypatch.setattr(triton_weight, "pieces_of", lambda width: {"BLOCK_C": 256, "PIECES": 3})
    tensors = {"weight": torch.randn(5, 600), "left": torch.randn(5, 2), "right": torch.randn(2, 600)}
    codes, scale, _ = kernels.encode_weight(**tensors, num_bits=8)
    expected, expected_scale, _ = definition(definitions.encode_weight_ref, tensors, num_bits=8)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected)


def test_long_rows_that_waste_a_quarter_of_a_tile_are_held_in_three_pieces() -> None:
    triton_weight = pytest.importorskip("qrealign_kernels.triton_weight")
    assert triton_weight.pieces_of(11008) == {"BLOCK_C": 4096, "PIECES": 3}
    widths = (33, 3584, 4096, 5120, 11008, 13824, 14336, 28672)
    assert [width for width in widths if triton_weight.pieces_of(width)["PIECES"] == 3] == [5120, 11008]


def test_gradients_and_codes_are_deterministic(each_backend: str) -> None:
    tensors = make_case(40, 130, None, NAMES[1:])
    grad = torch.randn(40, 130)

    def run() -> list[Tensor]:
        fake = kernels.fake_quant_weight(**tensors, num_bits=4)
        codes, scale, _ = kernels.encode_weight(**tensors, num_bits=4)
        return [fake, codes, scale, *torch.autograd.grad(fake, list(tensors.values()), grad)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_every_element_is_written(each_backend: str, poisoned_memory: None) -> None:
    for given in (NAMES[1:5], NAMES[1:]):
        tensors = make_case(5, 70, 35, given)
        fake = kernels.fake_quant_weight(**tensors, num_bits=4, group_size=35, symmetric=False)
        grads = torch.autograd.grad(fake.sum(), list(tensors.values()))
        codes, scale, zero_point = kernels.encode_weight(**tensors, num_bits=4, group_size=35, symmetric=False)
        assert all(torch.isfinite(tensor).all() for tensor in (fake, scale, *grads))
        # Memory that no kernel wrote holds 85, which no 4-bit code is.
        assert codes.max() <= 7
        assert zero_point is not None and zero_point.max() <= 7


def test_division_by_a_known_reciprocal_rounds_as_division_does() -> None:
    """Every mantissa of a bfloat16 scale against quotients at and around the borders between two codes."""
    if not triton_common.interpreting():
        pytest.skip("the GPU tests compare whole layers")
    scale = (torch.arange(128, 256) / 128.0)[:, None]
    borders = torch.arange(-128, 128) + 0.5
    weight = borders * scale
    weight = torch.cat(
        [weight, weight.nextafter(torch.tensor(torch.inf)), weight.nextafter(-torch.tensor(torch.inf))], 1
    )
    weight[:, 0] = 127 * scale[:, 0]  # sets the scale
    weight = weight.clamp(-127 * scale, 127 * scale)
    with kernels.use_backend("triton"):
        codes, found, _ = kernels.encode_weight(weight, num_bits=8)
    expected_codes, expected, _ = reference.quantize_weight_ref(weight, num_bits=8)
    assert torch.equal(found, scale)
    assert torch.equal(found, expected)
    assert torch.equal(codes, expected_codes)


@pytest.mark.parametrize(("tokens", "columns", "group_size"), [(37, 96, 32), (19, 66, 33), (33, 97, None)])
@pytest.mark.parametrize(
    "given", [NAMES[1:5], ("low_logit",), ("column_scale", "row_divisor")], ids=["all", "low", "transform"]
)
def test_gradient_reduced_in_its_product_equals_the_definition(
    each_backend: str, tokens: int, columns: int, group_size: int | None, given: tuple[str, ...]
) -> None:
    tensors = make_case(35, columns, group_size, given)
    grad, x = torch.randn(tokens, 35), torch.randn(tokens, columns)
    grid = {"num_bits": 4, "group_size": group_size, "symmetric": group_size is None, "scale_dtype": torch.float16}
    found = kernels.reduced_weight_gradient(grad, x, **tensors, **grid)
    fake = definition(definitions.fake_quant_edited_weight_ref, tensors, **grid)
    expected = torch.autograd.grad(fake, [tensors[name] for name in given], grad.T @ x)
    assert {name for name in NAMES if getattr(found, name) is not None} == set(given)
    for name, gradient in zip(given, expected, strict=True):
        torch.testing.assert_close(getattr(found, name), gradient, rtol=5e-4, atol=5e-4)


def test_reduced_gradient_checks_its_shapes() -> None:
    with pytest.raises(ValueError, match=r"grad must be \[M, 4\] and x \[M, 32\]"):
        kernels.reduced_weight_gradient(torch.zeros(3, 4), torch.zeros(2, 32), torch.zeros(4, 32), num_bits=8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"column_scale": torch.ones(4)}, ValueError, r"column_scale must be \(32,\) for weight \(4, 32\), got \(4,\)"),
        ({"row_divisor": torch.ones(4, 1)}, ValueError, r"row_divisor must be \(4,\)"),
        ({"left": torch.ones(4, 2)}, ValueError, "left and right come together"),
        ({"left": torch.ones(4, 2), "right": torch.ones(3, 32)}, ValueError, r"right must be \(2, 32\)"),
        ({"left": torch.ones(4, 0), "right": torch.ones(0, 32)}, ValueError, "left must be"),
        ({"column_scale": torch.ones(32, dtype=torch.int64)}, TypeError, "column_scale must be floating point"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    for op in (kernels.fake_quant_weight, kernels.encode_weight):
        with pytest.raises(error, match=message):
            op(torch.zeros(4, 32), num_bits=8, **change)


def test_result_dtype_is_checked() -> None:
    with pytest.raises(TypeError, match="out_dtype must be float32, float16 or bfloat16"):
        kernels.fake_quant_weight(torch.zeros(4, 32), num_bits=8, out_dtype=torch.float64)
