"""A packed checkpoint filled back into empty layers computes exactly what was calibrated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qrealign.models.checkpoint import WeightFiles, find_weight_files
from qrealign.pack.load import fill_block
from qrealign.quant.fake_quant import replace_modules
from qrealign.quant.packed import QuantizedLinear
from tests.unit.pack_helpers import blocks_of, fitted, open_tiny, quantized, write


@pytest.mark.parametrize("model_type", ["qwen2", "mixtral"])
@pytest.mark.parametrize("name", ["w8a8", "w4a16_asym"])
def test_filled_blocks_equal_the_calibrated_ones(tmp_path: Path, model_type: str, name: str) -> None:
    source = open_tiny(tmp_path / "model", model_type)
    scheme = fitted(name, source)
    model = quantized(source, scheme)
    files = WeightFiles(find_weight_files(write(source, scheme, model, tmp_path / "out")))
    filled = source.skeleton(dtype=torch.float32)
    for _, block in blocks_of(source, filled):
        replace_modules(block, nn.Linear, lambda linear: QuantizedLinear.empty(linear, scheme), source.spec.skip)
    source.load_outer(filled, "cpu", torch.float32)
    for index in range(source.num_blocks):
        fill_block(filled, source, index, files, torch.device("cpu"), torch.float32)
    input_ids = torch.randint(3, 259, (2, 12))
    with torch.no_grad():
        assert torch.equal(filled(input_ids).logits, model(input_ids).logits)
