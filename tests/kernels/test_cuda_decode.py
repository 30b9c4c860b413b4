"""Decode products by the CUDA extension: what goes there, with what, and, on a GPU, what comes back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import cuda, launches, layouts, reference_linear
from qrealign_kernels.quantized import PackedWeight, QuantizedActivations
from tests.kernels.conftest import LAUNCHES, STREAM, Recorder

LAUNCH = LAUNCHES["cuda_int4"]
CUT = (*LAUNCH.values(), False)


def packed(
    rows: int, columns: int, num_bits: int, activation_bits: int | None, groups: int = 1, asymmetric: bool = False
) -> PackedWeight:
    """Return a random weight in the layouts of a GPU."""
    half = 1 << (num_bits - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    points = torch.randint(-half, half, (rows, groups), dtype=torch.int8) if asymmetric else None
    return PackedWeight(
        data=layouts.to_rows8(codes) if num_bits == 8 else layouts.to_planes4(codes),
        scale=(torch.rand(rows, groups) * 0.01).bfloat16(),
        zero_point=points,
        shape=(rows, columns),
        num_bits=num_bits,
        activation_bits=activation_bits,
        layout=layouts.ROWS8 if num_bits == 8 else layouts.PLANES4,
    )


def run(x: Tensor | QuantizedActivations, weight: PackedWeight, bias: Tensor | None = None) -> Tensor | None:
    tokens, dtype = (x.codes, x.dtype) if isinstance(x, QuantizedActivations) else (x, x.dtype)
    return cuda.packed_linear(x, weight, bias, torch.empty(tokens.shape[0], weight.shape[0], dtype=dtype))


def test_four_bit_weights_go_with_their_groups(extension: Recorder) -> None:
    weight, x = packed(48, 384, 4, None, groups=3, asymmetric=True), torch.randn(5, 384).bfloat16()
    bias = torch.zeros(48).bfloat16()
    out = run(x, weight, bias)
    assert out is not None
    assert weight.zero_point is not None
    pointers = (0, x.data_ptr(), weight.data.data_ptr(), 0, weight.scale.data_ptr(), weight.zero_point.data_ptr())
    row_bytes = 512 // 2  # 384 columns fill two blocks of 256
    ends = (bias.data_ptr(), out.data_ptr(), 5, 48, 384, row_bytes, 3)
    assert extension.calls == [("decode_int4", (*pointers, *ends, *CUT, STREAM))]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(2, ["quantize_decode_int8"]), (3, ["quantize_tokens", "decode_int8"])]
)
def test_few_tokens_are_rounded_inside_the_product(extension: Recorder, tokens: int, expected: list[str]) -> None:
    assert run(torch.randn(tokens, 64).half(), packed(16, 64, 8, 8)) is not None
    assert [name for name, _ in extension.calls] == expected


def test_codes_are_not_rounded_again(extension: Recorder) -> None:
    x = QuantizedActivations(torch.ones(1, 64, dtype=torch.int8), torch.ones(1, 1), torch.float16)
    assert run(x, packed(16, 64, 8, 8)) is not None
    ((name, arguments),) = extension.calls
    assert name == "decode_int8"
    assert arguments[:3] == (1, x.codes.data_ptr(), x.scale.data_ptr())


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        pytest.param(torch.zeros(17, 64).half(), packed(16, 64, 8, 8), None, id="many-tokens"),
        pytest.param(torch.zeros(1, 64), packed(16, 64, 8, 8), None, id="float32"),
        pytest.param(torch.zeros(1, 72).half(), packed(16, 72, 8, 8), None, id="columns"),
        pytest.param(torch.zeros(1, 64).half(), packed(16, 64, 8, 8), torch.zeros(16), id="bias-dtype"),
        pytest.param(torch.zeros(1, 64).half(), packed(16, 64, 8, None), None, id="w8a16"),
        pytest.param(torch.zeros(1, 128).half(), packed(16, 128, 4, 8), None, id="w4a8"),
        pytest.param(torch.zeros(1, 128).half(), packed(16, 128, 4, None, groups=2), None, id="g64"),
    ],
)
def test_everything_else_is_left_to_triton(
    extension: Recorder, x: Tensor, weight: PackedWeight, bias: Tensor | None
) -> None:
    assert run(x, weight, bias) is None
    assert not extension.calls


@pytest.mark.parametrize(
    ("tokens", "columns", "num_bits", "held"),
    [(3, 4096, 4, True), (3, 4352, 4, False), (3, 12288, 8, True), (3, 12304, 8, False), (2, 4096, 8, False)],
)
def test_short_rows_meet_tokens_in_registers(
    extension: Recorder, tokens: int, columns: int, num_bits: int, held: bool
) -> None:
    weight = packed(16, columns, num_bits, None if num_bits == 4 else 8)
    launch = {"WARPS": 16, "ROW_TILES": 0, "STAGES": 3}
    with launches.forced(f"cuda_int{num_bits}_held", launch):
        run(torch.zeros(tokens, columns).half(), weight)
    _, arguments = extension.calls[-1]
    assert (arguments[-5:-2] == (16, 0, 3)) == held


def test_a_gpu_without_measured_launches_is_left_to_triton(
    extension: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "find", lambda kernel, key, device: None)
    assert run(torch.zeros(1, 64).half(), packed(16, 64, 8, 8)) is None


def test_without_the_extension_everything_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_C", None)
    assert run(torch.zeros(1, 64).half(), packed(16, 64, 8, 8)) is None


def test_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_NOT_LOADED", "not built")
    assert cuda.unavailable_reason() == "not built"
    monkeypatch.setattr(cuda, "_NOT_LOADED", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable_reason() == "torch sees no CUDA device"


def test_an_extension_that_the_driver_cannot_run_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(unusable_reason=lambda: "the driver is too old")
    monkeypatch.setattr(cuda.native, "load_extension", lambda name: (module, None))
    assert cuda._load() == (None, "qrealign_kernels._C_cuda: the driver is too old")
    module.unusable_reason = lambda: None
    assert cuda._load() == (module, None)


@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable_reason() is not None, reason=str(cuda.unavailable_reason()))
class TestOnGpu:
    """Against the definition, at shapes that fill no tile."""

    SHAPES = (
        (1, 37, 272, 1),
        (2, 19, 2560, 20),
        (3, 50, 1408, 11),
        (8, 130, 384, 3),
        (13, 77, 1072, 1),
        (16, 33, 512, 4),
        (7, 40, 11008, 86),
        (11, 12901, 640, 5),  # more tiles of rows than the blocks of a launch keep in flight
    )
    LAUNCHES = ((8, 1, 2), (4, 1, 2), (8, 2, 2), (16, 1, 2))
    HELD = ((16, 0, 3), (16, 0, 5))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("asymmetric", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_four_bits(self, shape: tuple[int, int, int, int], asymmetric: bool, dtype: torch.dtype) -> None:
        tokens, rows, columns, groups = shape
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device="cuda")
        points = torch.randint(-8, 8, (rows, groups), dtype=torch.int8, device="cuda") if asymmetric else None
        scale = torch.rand(rows, groups, device="cuda") * 0.01
        x, bias = (torch.randn(size, device="cuda").to(dtype) for size in ((tokens, columns), (rows,)))
        with kernels.use_backend("triton"):
            weight = kernels.repack_weight(codes, scale, points, num_bits=4, activation_bits=None)
        plain = reference_linear.repack_weight_ref(codes, scale, points, num_bits=4, activation_bits=None)
        expected = reference_linear.packed_linear_ref(x.double(), plain, bias, torch.float64)
        cuts = [("cuda_int4", cut) for cut in self.LAUNCHES]
        cuts += [("cuda_int4_held", cut) for cut in self.HELD] if columns <= cuda.HELD_COLUMNS["cuda_int4"] else []
        for table, cut in cuts:
            launch = dict(zip(LAUNCH, cut, strict=True))
            with launches.forced("cuda_int4_held", None), launches.forced(table, launch):
                out = cuda.packed_linear(x, weight, bias, torch.full((tokens, rows), float("nan")).to(x))
            assert out is not None
            assert (out - expected).norm() / expected.norm() < torch.finfo(dtype).eps, cut

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_eight_bits_have_the_definitions_bits(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        tokens, rows, columns, _ = shape
        codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device="cuda")
        scale = torch.rand(rows, 1, device="cuda") * 0.01
        x, bias = (torch.randn(size, device="cuda").to(dtype) for size in ((tokens, columns), (rows,)))
        x[-1] = 0
        with kernels.use_backend("triton"):
            weight = kernels.repack_weight(codes, scale, num_bits=8, activation_bits=8)
        plain = reference_linear.repack_weight_ref(codes, scale, None, num_bits=8, activation_bits=8)
        expected = reference_linear.packed_linear_ref(x, plain, bias, dtype)
        given = QuantizedActivations(*kernels.quantize_per_token(x), dtype)
        cuts = [("cuda_int8", cut) for cut in self.LAUNCHES]
        cuts += [("cuda_int8_held", cut) for cut in self.HELD] if tokens > cuda.FUSED_TOKENS else []
        for table, cut in cuts:
            for operand in (x, given):
                launch = dict(zip(LAUNCH, cut, strict=True))
                with launches.forced("cuda_int8_held", None), launches.forced(table, launch):
                    out = cuda.packed_linear(operand, weight, bias, torch.full((tokens, rows), float("nan")).to(x))
                assert out is not None
                assert torch.equal(out, expected), cut
