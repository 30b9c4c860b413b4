"""Products of 4-bit weights and many tokens by the CUDA extension: what goes there and, on a GPU, what comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import cuda, cuda_tiles, launches, layouts, reference_linear
from qrealign_kernels.quantized import PackedWeight
from tests.kernels.conftest import LAUNCHES, STREAM, Recorder

LAUNCH = LAUNCHES["cuda_int4_tile"]


def packed(rows: int, columns: int, groups: int = 1, scale_dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    """Return a random asymmetric weight in the layout of a GPU."""
    return PackedWeight(
        data=layouts.to_planes4(torch.randint(-8, 8, (rows, columns), dtype=torch.int8)),
        scale=(torch.rand(rows, groups) * 0.01).to(scale_dtype),
        zero_point=torch.randint(-8, 8, (rows, groups), dtype=torch.int8),
        shape=(rows, columns),
        num_bits=4,
        activation_bits=None,
        layout=layouts.PLANES4,
    )


def run(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor | None:
    return cuda_tiles.packed_linear(x, weight, bias, torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype), "m64")


def test_the_launch_goes_with_addresses_and_sizes(extension: Recorder) -> None:
    weight, x = packed(48, 384, groups=3), torch.randn(50, 384).bfloat16()
    out = run(x, weight)
    assert out is not None
    assert weight.zero_point is not None
    pointers = (x, weight.data, weight.scale, weight.zero_point)
    sizes = (50, 48, 384, 512 // 2, 3)  # 384 columns fill two blocks of 256
    addresses = (*(tensor.data_ptr() for tensor in pointers), 0, out.data_ptr())
    assert extension.calls == [("matmul_int4", (*addresses, *sizes, 128, 64, 2, 0, 0, STREAM))]


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        pytest.param(torch.zeros(20, 128).half(), packed(16, 128), None, id="float16"),
        pytest.param(torch.zeros(20, 132).bfloat16(), packed(16, 132), None, id="columns"),
        pytest.param(torch.zeros(20, 128).bfloat16(), packed(16, 128, groups=2), None, id="g64"),
        pytest.param(torch.zeros(20, 1152).bfloat16(), packed(16, 1152, groups=3), None, id="g384"),
        pytest.param(torch.zeros(20, 128).bfloat16(), packed(16, 128, scale_dtype=torch.float32), None, id="scales"),
        pytest.param(torch.zeros(20, 128).bfloat16(), packed(16, 128), torch.zeros(16), id="bias-dtype"),
    ],
)
def test_everything_else_is_left_to_triton(
    extension: Recorder, x: Tensor, weight: PackedWeight, bias: Tensor | None
) -> None:
    assert run(x, weight, bias) is None
    assert not extension.calls


def test_tiles_are_split_with_places_for_their_sums(extension: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tiles, "multiprocessors", lambda device: 3)
    weight, x = packed(48, 384, groups=3), torch.randn(50, 384).bfloat16()
    launch = {"TOKENS": 128, "ROWS": 128, "CLUSTER": 1, "SPLIT": 1}
    with launches.forced("cuda_int4_tile", launch):
        run(x, weight)
        run(x, weight)
    (*_, sums, arrivals, stream), (*_, again, _) = (arguments for _, arguments in extension.calls)
    assert sums and arrivals == again and stream == STREAM
    assert not cuda_tiles._arrivals(x.device, STREAM).any()


def test_a_gpu_without_measured_launches_is_left_to_triton(
    extension: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "find", lambda kernel, key, device: None)
    assert run(torch.zeros(20, 128).bfloat16(), packed(16, 128)) is None


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable_reason() is not None, reason=str(cuda.unavailable_reason()))
@pytest.mark.skipif(not on_hopper(), reason="needs a GPU of compute capability 9.0")
class TestOnGpu:
    """Against the definition, at shapes that fill no tile."""

    SHAPES = (  # tokens, rows, columns, groups
        (256, 4096, 4096, 32),
        (17, 72, 384, 3),
        (300, 1000, 1408, 11),
        (129, 77, 520, 1),
        (1, 64, 256, 1),
        (70, 331, 1024, 2),
        (300, 11001, 1408, 11),  # more tiles than multiprocessors, and some are left
    )
    CUTS = (
        *((64, 64, 1, 0), (128, 64, 1, 0), (128, 64, 1, 1), (128, 64, 2, 0), (128, 128, 1, 0), (128, 128, 1, 1)),
        *((128, 192, 1, 0), (128, 192, 1, 1), (128, 192, 2, 0), (128, 192, 2, 1)),
        *((256, 128, 1, 0), (256, 128, 1, 1), (256, 128, 2, 0), (256, 128, 2, 1)),
    )

    @pytest.mark.parametrize("asymmetric", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_product(self, shape: tuple[int, int, int, int], asymmetric: bool) -> None:
        tokens, rows, columns, groups = shape
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device="cuda")
        points = torch.randint(-8, 8, (rows, groups), dtype=torch.int8, device="cuda") if asymmetric else None
        scale = (torch.rand(rows, groups, device="cuda") * 0.01).bfloat16()
        x, bias = (torch.randn(size, device="cuda").bfloat16() for size in ((tokens, columns), (rows,)))
        with kernels.use_backend("triton"):
            weight = kernels.repack_weight(codes, scale, points, num_bits=4, activation_bits=None)
        plain = reference_linear.repack_weight_ref(codes, scale, points, num_bits=4, activation_bits=None)
        expected = reference_linear.packed_linear_ref(x.double(), plain, bias, torch.float64)
        for cut in self.CUTS:
            with launches.forced("cuda_int4_tile", dict(zip(LAUNCH, cut, strict=True))):
                runs = [
                    cuda_tiles.packed_linear(x, weight, bias, torch.full((tokens, rows), float("nan")).to(x), "m64")
                    for _ in range(2)
                ]
            assert runs[0] is not None and runs[1] is not None
            assert (runs[0] - expected).norm() / expected.norm() < torch.finfo(torch.bfloat16).eps, cut
            assert torch.equal(*runs), "two runs differ"
