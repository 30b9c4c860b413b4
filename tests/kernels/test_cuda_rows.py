"""Rounded weight rows and their gradients by the CUDA extension: what goes there and, on a GPU, what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels import cuda, cuda_weight, launches
from qrealign_kernels.reference_calibration import (
    WeightTransform,
    encode_weight_ref,
    fake_quant_edited_weight_ref,
)
from tests.kernels.conftest import LAUNCHES, STREAM, Recorder

GRID: dict[str, Any] = {"num_bits": 8, "group_size": None, "symmetric": True, "scale_dtype": torch.bfloat16}
SCALED = WeightTransform(torch.ones(1))
LAUNCH = LAUNCHES["cuda_round_rows"]


def test_rounding_keeps_the_extremes_that_the_backward_reads(extension: Recorder) -> None:
    weight, logit, scale = torch.randn(4, 64).bfloat16(), torch.randn(4, 1), torch.rand(64)
    done = cuda_weight.round_rows(weight, logit, None, WeightTransform(scale), keep=True, **GRID)
    assert done is not None
    out, extremes = done
    assert extremes is not None
    assert (out.dtype, extremes.shape) == (torch.bfloat16, (2, 4, 1))
    inputs = (weight.data_ptr(), logit.data_ptr(), 0, scale.data_ptr(), 0)
    outputs = (out.data_ptr(), 0, 0, extremes.data_ptr())
    expected = (*inputs, -128, 127, 2.0**-24, *outputs, 4, 64, 1, 2, 3, STREAM)
    assert extension.calls == [("round_rows", expected)]


def test_gradients_come_in_the_dtypes_of_what_is_learned(extension: Recorder) -> None:
    weight, extremes = torch.randn(4, 64).bfloat16(), torch.zeros(2, 4, 1)
    transform = WeightTransform(torch.rand(64).half(), torch.rand(4))
    found = cuda_weight.row_gradients(weight, weight, None, torch.zeros(4, 1), transform, extremes, **GRID)
    assert found is not None
    assert found.low_logit is None
    assert found.high_logit is not None and found.high_logit.shape == (4, 1)
    assert found.column_scale is not None and found.column_scale.dtype == torch.float16
    assert [name for name, _ in extension.calls] == ["row_gradients"]


def test_long_rows_get_more_loads_a_thread(extension: Recorder) -> None:
    cuda_weight.encode_rows(torch.zeros(2, 11008).bfloat16(), None, None, WeightTransform(), **GRID)
    assert extension.calls[0][1][-4:] == (3, 2, 3, STREAM)


@pytest.mark.parametrize(
    ("weight", "transform", "grid"),
    [
        pytest.param(torch.zeros(2, 64), SCALED, GRID, id="float32"),
        pytest.param(torch.zeros(2, 68).bfloat16(), SCALED, GRID, id="columns"),
        pytest.param(torch.zeros(2, 16392).bfloat16(), SCALED, GRID, id="too-long"),
        pytest.param(torch.zeros(2, 65).bfloat16()[:, 1:], SCALED, GRID, id="strided"),
        pytest.param(torch.zeros(2, 64).bfloat16(), SCALED, GRID | {"group_size": 32}, id="groups"),
        pytest.param(torch.zeros(2, 64).bfloat16(), SCALED, GRID | {"symmetric": False}, id="asymmetric"),
        pytest.param(torch.zeros(2, 64).bfloat16(), SCALED, GRID | {"scale_dtype": torch.float32}, id="scales"),
        pytest.param(
            torch.zeros(2, 64).bfloat16(),
            WeightTransform(left=torch.zeros(2, 1), right=torch.zeros(1, 64)),
            GRID,
            id="edited",
        ),
    ],
)
def test_everything_else_is_left_to_triton(
    extension: Recorder, weight: Tensor, transform: WeightTransform, grid: dict[str, Any]
) -> None:
    assert cuda_weight.round_rows(weight, None, None, transform, keep=False, **grid) is None
    assert cuda_weight.encode_rows(weight, None, None, transform, **grid) is None
    assert cuda_weight.row_gradients(weight, weight, None, None, transform, torch.zeros(2, 2, 1), **grid) is None
    assert not extension.calls


def test_gradients_without_a_column_scale_are_left_to_triton(extension: Recorder) -> None:
    weight = torch.zeros(2, 64).bfloat16()
    logit = torch.zeros(2, 1)
    assert (
        cuda_weight.row_gradients(weight, weight, logit, None, WeightTransform(), torch.zeros(2, 2, 1), **GRID) is None
    )


def test_a_gpu_without_measured_launches_is_left_to_triton(
    extension: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "find", lambda kernel, key, device: None)
    assert cuda_weight.encode_rows(torch.zeros(2, 64).bfloat16(), None, None, WeightTransform(), **GRID) is None


@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable_reason() is not None, reason=str(cuda.unavailable_reason()))
class TestOnGpu:
    """Against the definition, at shapes that fill no block."""

    SHAPES = ((1, 8), (3, 520), (70, 4096), (301, 1000), (5, 5120), (131, 8192), (33, 11008), (7, 16384))

    @pytest.fixture(autouse=True, params=[(1, 1), (2, 2), (3, 1), (4, 3)], ids=str)
    def cut(self, request: pytest.FixtureRequest) -> Iterator[None]:
        launch = dict(zip(LAUNCH, request.param, strict=True))
        with (
            kernels.use_backend("triton"),
            launches.forced("cuda_round_rows", launch),
            launches.forced("cuda_row_gradients", launch),
        ):
            yield

    @staticmethod
    def inputs(rows: int, columns: int, scaled: bool, divided: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a weight with ties at its extremes, rows of zeros and of one sign, and what is learned of it."""
        weight = (torch.randn(rows, columns, device="cuda") * 0.02).bfloat16()
        weight[0, : columns // 2] = weight[0].max()
        weight[-1] = 0
        if rows > 2:
            weight[1] = weight[1].abs()
        learned = {
            "low_logit": torch.randn(rows, 1, device="cuda") + 3,
            "high_logit": torch.randn(rows, 1, device="cuda") + 3,
            "column_scale": torch.rand(columns, device="cuda") + 0.5,
            "row_divisor": torch.rand(rows, device="cuda") + 0.5,
        }
        learned["high_logit"][0] = 40.0  # keeps all: the bound is the extreme itself
        if not scaled:
            del learned["column_scale"]
        if not divided:
            del learned["row_divisor"]
        return weight, learned

    @pytest.mark.parametrize("num_bits", [8, 4])
    @pytest.mark.parametrize(("scaled", "divided"), [(False, False), (True, False), (False, True), (True, True)])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_values_and_gradients(self, shape: tuple[int, int], scaled: bool, divided: bool, num_bits: int) -> None:
        weight, learned = self.inputs(*shape, scaled, divided)
        logits = {name: learned[name] for name in ("low_logit", "high_logit")}
        transform = WeightTransform(learned.get("column_scale"), learned.get("row_divisor"))
        grid = GRID | {"num_bits": num_bits}
        done = cuda_weight.round_rows(weight, *logits.values(), transform, keep=True, **grid)
        codes = cuda_weight.encode_rows(weight, *logits.values(), transform, **grid)
        assert done is not None and done[1] is not None and codes is not None
        leaves = {name: tensor.requires_grad_() for name, tensor in learned.items()}
        fake = fake_quant_edited_weight_ref(weight, **logits, transform=transform, **grid)
        assert torch.equal(done[0], fake.bfloat16())
        expected_codes, expected_scale, _ = encode_weight_ref(weight, **logits, transform=transform, **grid)
        assert torch.equal(codes[0], expected_codes)
        assert torch.equal(codes[1], expected_scale)
        grad = torch.randn_like(weight)
        expected = dict(zip(leaves, torch.autograd.grad(fake, list(leaves.values()), grad.float()), strict=True))
        runs = [cuda_weight.row_gradients(grad, weight, *logits.values(), transform, done[1], **grid) for _ in range(2)]
        if not scaled or shape[1] > 8192:
            assert runs == [None, None]
            return
        for name, truth in expected.items():
            found, again = (getattr(run, name) for run in runs)
            assert (found - truth).norm() <= 1e-4 * truth.norm() + 1e-6, name
            assert torch.equal(found, again), f"two runs differ: {name}"
