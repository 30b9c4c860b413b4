"""Packed linears on CPUs: every instruction set gives the scalar code's bits, and these are the definition's."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import BackendUnavailableError, cpu_linear
from qrealign_kernels.quantized import PackedWeight, QuantizedActivations
from tests.kernels.test_backend import run_python

ISAS = ("scalar", "avx2", "avx512vnni", "amx")
SHAPES = [
    pytest.param(1, 16, 64, 1, id="M1-N16-K64"),
    pytest.param(3, 37, 66, 1, id="M3-N37-K66"),
    pytest.param(6, 65, 96, 3, id="M6-N65-K96-g32"),
    pytest.param(33, 130, 256, 2, id="M33-N130-K256-g128"),
    pytest.param(37, 64, 24, 1, id="M37-N64-K24"),
    pytest.param(2, 200, 130, 2, id="M2-N200-K130-g65"),
    pytest.param(0, 16, 64, 1, id="M0-N16-K64"),
]
SCHEMES = [
    pytest.param(8, 8, False, id="w8a8"),
    pytest.param(8, 8, True, id="w8a8-asym"),
    pytest.param(4, 8, False, id="w4a8"),
    pytest.param(4, 4, True, id="w4a4-asym"),
    pytest.param(4, None, False, id="w4a16"),
    pytest.param(4, None, True, id="w4a16-asym"),
    pytest.param(8, None, False, id="w8a16"),
]


@pytest.fixture(autouse=True)
def on_extension() -> Iterator[None]:
    if cpu_linear.UNAVAILABLE_REASON is not None:
        pytest.skip(cpu_linear.UNAVAILABLE_REASON)
    with kernels.use_backend("cpu"):
        yield


def usable_isas() -> list[str]:
    """Return the instruction sets of this machine."""

    def usable(name: str) -> bool:
        try:
            return cpu_linear._C.linear_isa(name) == name
        except ValueError:
            return False

    return [name for name in ISAS if usable(name)]


def make_codes(rows: int, columns: int, num_bits: int) -> Tensor:
    """Return `[rows, columns]` int8 over the whole range."""
    half = 1 << (num_bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8)


def each_isa(monkeypatch: pytest.MonkeyPatch, *arguments: object, **options: object) -> dict[str, Tensor]:
    """Return a product by every instruction set and by the automatic choice."""
    products = {}
    for name in ["", *usable_isas()]:
        monkeypatch.setattr(cpu_linear, "ISA", name)
        products[name] = kernels.packed_linear(*arguments, **options)  # type: ignore[arg-type]
    return products


def assert_same_bits(products: dict[str, Tensor], expected: Tensor) -> None:
    assert "scalar" in products
    for name, product in products.items():
        assert torch.equal(product, expected), name


@pytest.mark.parametrize(("tokens", "rows", "columns", "groups"), SHAPES)
@pytest.mark.parametrize(("num_bits", "activation_bits", "asymmetric"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_equals_the_scalar_code_and_the_definition(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    rows: int,
    columns: int,
    groups: int,
    num_bits: int,
    activation_bits: int | None,
    asymmetric: bool,
    dtype: torch.dtype,
) -> None:
    codes, scale = make_codes(rows, columns, num_bits), torch.rand(rows, groups) * 0.01
    zero_point = make_codes(rows, groups, num_bits) if asymmetric else None
    bits = {"num_bits": num_bits, "activation_bits": activation_bits}
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows)
    with kernels.use_backend("reference"):
        expected = kernels.packed_linear(x, kernels.repack_weight(codes, scale, zero_point, **bits), bias)

    products = each_isa(monkeypatch, x, kernels.repack_weight(codes, scale, zero_point, **bits), bias)

    assert_same_bits(products, products["scalar"])
    if activation_bits is None:
        tolerance = max(torch.finfo(dtype).eps, 2e-5)
        torch.testing.assert_close(products["scalar"], expected, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(products["scalar"], expected)


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize(("x_code", "at_end"), [(127, "max"), (-128, "min"), (127, "min"), (-128, "max")])
@pytest.mark.parametrize("tokens", [1, 7])
def test_ends_of_the_range_do_not_saturate(
    monkeypatch: pytest.MonkeyPatch, num_bits: int, x_code: int, at_end: str, tokens: int
) -> None:
    """127 and -128 enter AVX-512 as 255 and 0: the products of all-255 x all-127 overflow 16 bits in pairs."""
    columns = 4096
    half = 1 << (num_bits - 1)
    code = half - 1 if at_end == "max" else -half
    weight = kernels.repack_weight(
        torch.full((48, columns), code, dtype=torch.int8), torch.ones(48, 1), num_bits=num_bits, activation_bits=8
    )
    x = QuantizedActivations(
        torch.full((tokens, columns), x_code, dtype=torch.int8), torch.ones(tokens, 1), torch.float32
    )
    assert_same_bits(each_isa(monkeypatch, x, weight), torch.full((tokens, 48), float(x_code * code * columns)))


def random_weight(rows: int = 192, columns: int = 512) -> PackedWeight:
    return kernels.repack_weight(make_codes(rows, columns, 8), torch.rand(rows, 1), num_bits=8, activation_bits=8)


def test_threads_change_no_bit() -> None:
    weight, x = random_weight(), torch.randn(40, 512)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = kernels.packed_linear(x, weight)
        for count in (2, 5, 64):
            torch.set_num_threads(count)
            assert torch.equal(kernels.packed_linear(x, weight), expected)
    finally:
        torch.set_num_threads(threads)


def test_callers_may_run_at_the_same_time() -> None:
    weight, inputs = random_weight(), [torch.randn(40, 512) for _ in range(4)]
    expected = [kernels.packed_linear(x, weight) for x in inputs]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(kernels.packed_linear(inputs[i], weight), expected[i]))

    callers = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_process_has_its_own_threads() -> None:
    code = """
import os, torch, qrealign_kernels as kernels
torch.set_num_threads(3)
codes = torch.randint(-128, 128, (192, 512), dtype=torch.int8)
weight = kernels.repack_weight(codes, torch.rand(192, 1), num_bits=8, activation_bits=8)
x = torch.randn(40, 512)
expected = kernels.packed_linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kernels.packed_linear(x, weight), expected) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code, OMP_NUM_THREADS="1") == "0"


def test_environment_chooses_the_instruction_set() -> None:
    code = "from qrealign_kernels import cpu_linear; print(cpu_linear.isa())"
    assert run_python(code, QREALIGN_CPU_ISA="scalar") == "scalar"


def test_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "ISA", "mmx")
    with pytest.raises(
        BackendUnavailableError, match="QREALIGN_CPU_ISA=mmx: the instruction set mmx is unknown or not"
    ):
        kernels.packed_linear(torch.randn(1, 512), random_weight())


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are allocated full of NaN: what is left out stays visible."""
    empty, weight, x = torch.empty, random_weight(rows=37), torch.randn(5, 512)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    assert torch.isfinite(kernels.packed_linear(x, weight)).all()


def test_strided_tokens_and_copied_weights_are_read_right() -> None:
    codes, scale = make_codes(37, 96, 4), torch.rand(37, 3)
    weight = kernels.repack_weight(codes, scale, num_bits=4, activation_bits=8)
    copied = PackedWeight(**{**vars(weight), "scale": weight.scale.clone(memory_format=torch.contiguous_format)})
    x = torch.randn(96, 4).t()
    expected = kernels.packed_linear(x.contiguous(), weight)
    assert torch.equal(kernels.packed_linear(x, weight), expected)
    assert torch.equal(kernels.packed_linear(x, copied), expected)


def test_packed_weight_takes_the_bytes_of_its_codes() -> None:
    weight = kernels.repack_weight(make_codes(64, 512, 4), torch.rand(64, 4), num_bits=4, activation_bits=None)
    assert weight.data.nbytes == 64 * 512 // 2
    assert weight.shape == (64, 512)
    assert weight.group_size == 128


def test_weight_of_another_layout_is_refused() -> None:
    weight = PackedWeight(**{**vars(random_weight()), "layout": "rows8"})
    with pytest.raises(ValueError, match="on a CPU, weights are read in layout 'blocks16', not 'rows8'"):
        kernels.packed_linear(torch.randn(1, 512), weight)
