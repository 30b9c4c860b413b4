"""Packed codes: golden vectors, round trips, and the package that reads them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import backend
from qrealign_kernels.packing import packed_length

sizes = st.integers(min_value=1, max_value=37)
bits = st.sampled_from([4, 8])
dims = st.sampled_from([0, 1])
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test once per packer that this machine has."""
    if (reason := backend.unavailable_reason(request.param)) is not None:
        pytest.skip(f"{request.param}: {reason}")
    with kernels.use_backend(request.param):
        yield


def random_codes(rows: int, columns: int, num_bits: int) -> Tensor:
    """Return `[rows, columns]` int8 over the whole range."""
    half = 1 << (num_bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8)


def word(packed: Tensor) -> int:
    """Return the only word as an unsigned number."""
    return int(packed.item()) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("codes", "num_bits", "expected"),
    [
        (range(-8, 0), 4, 0x76543210),
        (range(8), 4, 0xFEDCBA98),
        ([-128, -1, 0, 127], 8, 0xFF807F00),
        ([-8, 7, 0], 4, 0x8F0),
    ],
)
def test_golden_vectors(codes: range | list[int], num_bits: int, expected: int) -> None:
    row = torch.tensor([list(codes)], dtype=torch.int8)
    assert word(kernels.pack_codes(row, num_bits)) == expected
    assert word(kernels.pack_codes(row.t(), num_bits, dim=0)) == expected


@quick
@given(rows=sizes, columns=sizes, num_bits=bits, dim=dims)
def test_round_trip(rows: int, columns: int, num_bits: int, dim: int) -> None:
    codes = random_codes(rows, columns, num_bits)
    packed = kernels.pack_codes(codes, num_bits, dim)
    expected = (rows, packed_length(columns, num_bits)) if dim == 1 else (packed_length(rows, num_bits), columns)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert tuple(packed.shape) == expected
    unpacked = kernels.unpack_codes(packed, num_bits, (rows, columns), dim)
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)


@quick
@given(rows=sizes, columns=sizes, num_bits=bits, dim=dims)
def test_equals_the_package(rows: int, columns: int, num_bits: int, dim: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = random_codes(rows, columns, num_bits)
    assert torch.equal(kernels.pack_codes(codes, num_bits, dim), pack_to_int32(codes, num_bits, packed_dim=dim))


def test_four_bit_names_are_shorthands() -> None:
    codes = random_codes(16, 5, 4)
    packed = kernels.pack_int4(codes, dim=0)
    assert torch.equal(packed, kernels.pack_codes(codes, 4, dim=0))
    assert torch.equal(kernels.unpack_int4(packed, (16, 5), dim=0), codes)


@pytest.mark.parametrize(
    ("codes", "num_bits", "dim", "error"),
    [
        (torch.zeros(2, 8, dtype=torch.int8), 3, 1, ValueError),
        (torch.zeros(2, 8, dtype=torch.int8), 4, 2, ValueError),
        (torch.full((2, 8), 8, dtype=torch.int8), 4, 1, ValueError),
        (torch.zeros(2, 8), 4, 1, TypeError),
        (torch.zeros(8, dtype=torch.int8), 4, 1, ValueError),
    ],
)
def test_what_cannot_be_packed_is_refused(codes: Tensor, num_bits: int, dim: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        kernels.pack_codes(codes, num_bits, dim)


@pytest.mark.parametrize(
    ("packed", "shape", "error"),
    [
        (torch.zeros(2, 1, dtype=torch.int64), (2, 8), TypeError),
        (torch.zeros(2, 1, dtype=torch.int32), (2, 9), ValueError),
        (torch.zeros(2, 1, dtype=torch.int32), (3, 8), ValueError),
    ],
)
def test_what_cannot_be_unpacked_is_refused(packed: Tensor, shape: tuple[int, int], error: type[Exception]) -> None:
    with pytest.raises(error):
        kernels.unpack_codes(packed, 4, shape)


def test_nothing_packs_to_nothing() -> None:
    assert kernels.pack_int4(torch.zeros(0, 8, dtype=torch.int8)).shape == (0, 1)
