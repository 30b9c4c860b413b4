"""Packed linear products: every backend against the definition, at odd shapes and at the ends of the code ranges."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import qrealign_kernels as kernels
from qrealign_kernels import launches, layouts, reference_linear, triton_linear
from qrealign_kernels.quantized import PackedWeight, QuantizedActivations


class Recipe(NamedTuple):
    """How a weight is stored and meets its tokens."""

    num_bits: int
    activation_bits: int | None
    group_size: int | None
    symmetric: bool

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.num_bits}a{self.activation_bits or 16}-{group}{'' if self.symmetric else '-asym'}"


RECIPES = [
    Recipe(8, 8, None, True),
    Recipe(8, None, None, True),
    Recipe(4, None, 128, True),
    Recipe(4, None, 128, False),
    Recipe(4, None, None, False),
    Recipe(4, None, 64, True),
    Recipe(4, None, 32, False),
    Recipe(4, 8, 128, True),
    Recipe(4, 8, 128, False),
    Recipe(4, 4, None, True),
]
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)


def random_weight(recipe: Recipe, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes over the whole range, scales that bfloat16 holds, and zero points over the whole range."""
    low, high = -(1 << (recipe.num_bits - 1)), 1 << (recipe.num_bits - 1)
    groups = columns // (recipe.group_size or columns)
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(rows, groups) * 0.01 + 0.001).bfloat16().float()
    zero_point = None if recipe.symmetric else torch.randint(low, high, (rows, groups), dtype=torch.int8)
    return codes, scale, zero_point


def repack_both(recipe: Recipe, *tensors: torch.Tensor | None) -> tuple[PackedWeight, PackedWeight]:
    """Return the weight as the chosen backend packs it, and as the definition does."""
    bits = {"num_bits": recipe.num_bits, "activation_bits": recipe.activation_bits}
    return kernels.repack_weight(*tensors, **bits), reference_linear.repack_weight_ref(*tensors, **bits)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, error


@by_recipe
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_equals_the_definition(each_backend: str, recipe: Recipe, tokens: int) -> None:
    """K is no multiple of a kernel's block of columns, N of none of its tiles."""
    rows, columns = 19, 384
    packed, plain = repack_both(recipe, *random_weight(recipe, rows, columns))
    x, bias = torch.randn(tokens, columns, dtype=torch.float16), torch.randn(rows)
    expected = reference_linear.packed_linear_ref(x, plain, bias, torch.float32)
    # Tiles for many tokens round the dequantized weight to the tokens' dtype, of 11 bits.
    tolerance = 1e-6 if recipe.activation_bits else 1e-3
    assert_close(kernels.packed_linear(x, packed, bias, out_dtype=torch.float32), expected, tolerance)
    assert_close(kernels.packed_linear(x, packed, bias), expected.half(), tolerance + 2e-4)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("tokens", [1, 2, 20])
@pytest.mark.parametrize("columns", [75, 100])
@pytest.mark.parametrize(
    "recipe", [Recipe(8, 8, None, True), Recipe(4, 8, None, False), Recipe(4, None, None, True)], ids=str
)
def test_ragged_columns(recipe: Recipe, columns: int, tokens: int) -> None:
    packed, plain = repack_both(recipe, *random_weight(recipe, 19, columns))
    x = torch.randn(tokens, columns)
    expected = reference_linear.packed_linear_ref(x, plain, None, torch.float32)
    assert_close(kernels.packed_linear(x, packed), expected, 1e-5)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("tokens", [1, 4, 18])
@pytest.mark.parametrize("num_bits", [8, 4])
def test_codes_at_their_ends_are_summed_exactly(num_bits: int, tokens: int) -> None:
    """All -128 by all -128: where pairs are added in sixteen bits, or sums in float32, this goes wrong."""
    rows, columns = 16, 4096
    low, high = -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1
    codes = torch.full((rows, columns), low, dtype=torch.int8)
    codes[1] = high
    codes[2, ::2] = high
    codes[3, -1] = high
    weight = kernels.repack_weight(codes, torch.ones(rows, 1), num_bits=num_bits, activation_bits=8)
    x = torch.full((tokens, columns), -128, dtype=torch.int8)
    x[-1] = 127
    x[-1, 0] = -1
    out = kernels.packed_linear(QuantizedActivations(x, torch.ones(tokens, 1), torch.float32), weight)
    assert torch.equal(out, (x.double() @ codes.double().T).float())  # rounded once


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("recipe", [Recipe(8, 8, None, True), Recipe(4, 8, 128, False)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_codes_given_equal_codes_made(recipe: Recipe, tokens: int) -> None:
    packed, _ = repack_both(recipe, *random_weight(recipe, 24, 256))
    x = torch.randn(2, tokens, 256)
    codes, scale = kernels.quantize_per_token(x)
    given = kernels.packed_linear(QuantizedActivations(codes, scale, torch.float32), packed)
    assert given.shape == (2, tokens, 24)
    assert torch.equal(given, kernels.packed_linear(x, packed))


@pytest.mark.usefixtures("each_backend")
def test_a_token_of_zeros_gives_the_bias() -> None:
    packed, _ = repack_both(RECIPES[0], *random_weight(RECIPES[0], 8, 64))
    bias = torch.randn(8)
    assert torch.equal(kernels.packed_linear(torch.zeros(1, 64), packed, bias)[0], bias)
    assert kernels.packed_linear(torch.zeros(0, 64), packed, bias).shape == (0, 8)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("recipe", [RECIPES[2], RECIPES[1]], ids=str)
def test_routes_for_more_tokens(recipe: Recipe, tokens: int) -> None:
    """Tiles and a dequantized copy, at few tokens: which one is taken is a matter of speed."""
    routes = {"INT8_FEW": 0, "INT4_FEW": 0}
    with launches.forced("linear_routes", routes):
        packed, plain = repack_both(recipe, *random_weight(recipe, 33, 384))
        x, bias = torch.randn(tokens, 384).half(), torch.randn(33)
        expected = reference_linear.packed_linear_ref(x, plain, bias, torch.float16)
        assert_close(kernels.packed_linear(x, packed, bias), expected, 2e-3)


@pytest.mark.usefixtures("triton_backend")
def test_one_token_in_fixed_point() -> None:
    rows, columns = 19, 384
    recipe = RECIPES[3]
    packed, plain = repack_both(recipe, *random_weight(recipe, rows, columns))
    x = torch.randn(1, columns).bfloat16()
    x[:, 128:256] *= 1e-3  # other columns have steps of their own
    x[:, 256:] = 0
    expected = reference_linear.packed_linear_ref(x, plain, None, torch.float32)
    with launches.forced("int4_fixed_gemv", {"BLOCK_N": 32, "THREADS": 32, "num_warps": 1}):
        assert_close(kernels.packed_linear(x, packed, out_dtype=torch.float32), expected, 2e-4)
        x[0, 5] = float("nan")
        assert kernels.packed_linear(x, packed).isnan().all()


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("recipe", [RECIPES[3], RECIPES[1]], ids=str)
def test_a_dequantized_copy_is_made_in_parts(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "DENSE_BYTES", 1)
    shapes = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, w, **out: shapes.append(w.shape[1]) or product(x, w, **out))
    with launches.forced("linear_routes", {"INT8_FEW": 0, "INT4_FEW": 0}):
        packed, plain = repack_both(recipe, *random_weight(recipe, 300, 128))
        x, bias = torch.randn(2, 128).half(), torch.randn(300)
        for out_dtype in (torch.float16, torch.float32):
            expected = reference_linear.packed_linear_ref(x, plain, bias, out_dtype)
            assert_close(kernels.packed_linear(x, packed, bias, out_dtype=out_dtype), expected, 2e-3)
    assert shapes == 2 * [256, 44]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("group_size", [None, 128, 32, 24], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tokens", [1, 19])
def test_calibration_products(group_size: int | None, symmetric: bool, tokens: int) -> None:
    """The forward from int8 codes as `quantize_weight` writes them, and the input gradient."""
    rows, columns = 19, 384
    codes, scale, zero_point = random_weight(Recipe(8, 8, group_size, symmetric), rows, columns)
    x = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8)
    x_scale, bias = torch.rand(tokens, 1), torch.randn(rows)
    out = kernels.int8_matmul(x, x_scale, codes, scale, bias, torch.float32, zero_point=zero_point)
    expected = reference_linear.int8_matmul_ref(x, x_scale, codes, scale, zero_point, bias, out_dtype=torch.float32)
    assert_close(out, expected, 1e-6)
    grad = torch.randn(tokens, rows)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        expected = reference_linear.int8_matmul_dx_ref(grad.to(dtype).float(), codes, scale, zero_point)
        actual = kernels.int8_matmul_dx(grad.to(dtype), codes, scale, zero_point)
        assert actual.dtype == dtype
        assert_close(actual.float(), expected, tolerance)


def test_forward_equals_fake_quantization() -> None:
    """The integer forward is the fake-quantized one up to the order of its sums."""
    weight, x = torch.randn(24, 256), torch.randn(5, 256)
    codes, scale, _ = kernels.quantize_weight(weight, num_bits=8)
    x_codes, x_scale = kernels.quantize_per_token(x)
    fake = kernels.fake_quant_per_token(x) @ kernels.fake_quant_weight(weight, num_bits=8).T
    assert_close(kernels.int8_matmul(x_codes, x_scale, codes, scale, out_dtype=torch.float32), fake, 1e-6)


@pytest.mark.parametrize("recipe", RECIPES[:4], ids=str)
def test_compiled_without_a_graph_break(recipe: Recipe) -> None:
    with kernels.use_backend("reference"):
        packed, _ = repack_both(recipe, *random_weight(recipe, 12, 128))
        bias = torch.randn(12)
        compiled = torch.compile(
            lambda x: kernels.packed_linear(x, packed, bias) * 2, backend="aot_eager", fullgraph=True, dynamic=True
        )
        for tokens in (3, 5):
            x = torch.randn(2, tokens, 128)
            assert torch.equal(compiled(x), kernels.packed_linear(x, packed, bias) * 2)


def test_operators_are_well_formed() -> None:
    codes, scale, zero_point = random_weight(Recipe(8, 8, None, False), 6, 32)
    x, x_scale = torch.randint(-128, 128, (3, 32), dtype=torch.int8), torch.rand(3, 1)
    ops = torch.ops.qrealign
    with kernels.use_backend("reference"):
        plain = (x.float(), None, codes, scale, None, None, 6, 32, 8, 8, "codes", torch.float32)
        torch.library.opcheck(ops.packed_linear.default, plain)
        torch.library.opcheck(ops.int8_matmul.default, (x, x_scale, codes, scale, zero_point, None, torch.float32))
        torch.library.opcheck(ops.int8_matmul_dx.default, (torch.randn(3, 6), codes, scale, zero_point))


def test_layout_of_four_bit_codes() -> None:
    """Nibble p of word i of a block holds column 32 * plane + i, plane p / 2 for even p and 4 + p / 2 for odd p."""
    codes = torch.randint(-8, 8, (3, 300), dtype=torch.int8)
    words = layouts.to_planes4(codes)
    assert words.shape == (3, 2 * 32)
    padded = torch.nn.functional.pad(codes, (0, 212))
    for nibble in range(8):
        plane = nibble // 2 + 4 * (nibble % 2)
        for block in range(2):
            columns = padded[:, 256 * block + 32 * plane :][:, :32]
            assert torch.equal((words[:, 32 * block :][:, :32] >> 4 * nibble & 15) - 8, columns.to(torch.int32))


@pytest.mark.parametrize(
    ("value", "dtype"), [(2.0**-20, torch.bfloat16), (1.0009765625, torch.float16), (0.1, torch.float32)]
)
def test_scales_are_kept_in_the_narrowest_exact_dtype(value: float, dtype: torch.dtype) -> None:
    scale = torch.full((2, 3), value)
    kept = layouts.narrowest_scale(scale)
    assert kept.dtype == dtype
    assert torch.equal(kept.float(), scale)


@pytest.mark.usefixtures("triton_backend")
def test_packed_weight_describes_itself() -> None:
    codes, scale, zero_point = random_weight(RECIPES[3], 16, 512)
    packed = kernels.repack_weight(codes, scale, zero_point, num_bits=4, activation_bits=None)
    assert (packed.shape, packed.group_size, packed.groups) == ((16, 512), 128, 4)
    assert packed.nbytes() == 16 * 512 // 2 + 16 * 4 * 2 + 16 * 4  # nibbles, bfloat16 scales, int8 zero points
    assert packed.to("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_bits": 5}, ValueError, "num_bits must be 4 or 8"),
        ({"activation_bits": 3}, ValueError, "activation_bits 4, 8 or None, got 8 and 3"),
        ({"codes": torch.zeros(4, 32)}, TypeError, "codes must be int8"),
        ({"codes": torch.zeros(4, 0, dtype=torch.int8)}, ValueError, "not empty"),
        ({"scale": torch.ones(4, 3)}, ValueError, "G a divisor of K"),
        ({"zero_point": torch.zeros(4, 1)}, TypeError, "zero_point must be int8"),
        ({"zero_point": torch.zeros(4, 2, dtype=torch.int8)}, ValueError, "zero_point and scale disagree"),
    ],
)
def test_a_weight_that_cannot_be(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {
        "codes": torch.zeros(4, 32, dtype=torch.int8),
        "scale": torch.ones(4, 1),
        "num_bits": 8,
        "activation_bits": 8,
    }
    with pytest.raises(error, match=message):
        kernels.repack_weight(**(arguments | change))


def test_arguments_that_do_not_fit() -> None:
    codes, scale, _ = random_weight(RECIPES[0], 4, 32)
    integer = kernels.repack_weight(codes, scale, num_bits=8, activation_bits=8)
    floating = kernels.repack_weight(codes, scale, num_bits=8, activation_bits=None)
    x = torch.zeros(2, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"x must be \[..., 32\]"):
        kernels.packed_linear(torch.zeros(2, 31), integer)
    with pytest.raises(ValueError, match="need a weight repacked with activation_bits"):
        kernels.packed_linear(QuantizedActivations(x, torch.ones(2, 1), torch.float32), floating)
    with pytest.raises(ValueError, match="codes and scale disagree"):
        kernels.packed_linear(QuantizedActivations(x, torch.ones(3, 1), torch.float32), integer)
    with pytest.raises(TypeError, match="codes must be int8 and their scale float32"):
        kernels.packed_linear(QuantizedActivations(x, torch.ones(2, 1).half(), torch.float32), integer)
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16"):
        kernels.packed_linear(torch.zeros(2, 32).double(), integer)
    with pytest.raises(ValueError, match=r"bias must be \[4\]"):
        kernels.packed_linear(torch.zeros(2, 32), integer, torch.zeros(3))
    with pytest.raises(ValueError, match="disagree on N"):
        kernels.int8_matmul_dx(torch.zeros(2, 3), codes, scale)
    with pytest.raises(TypeError, match=r"x_codes must be \[M, K\] int8"):
        kernels.int8_matmul(torch.zeros(2, 32), torch.ones(2, 1), codes, scale)
