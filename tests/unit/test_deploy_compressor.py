"""Checkpoints that llm-compressor writes: its own package makes them here, and reads them beside us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import qrealign
from qrealign.deploy.layers import JoinedLinears
from qrealign.pack.source import open_packed
from qrealign.pipeline.models import ModelPool
from tests.helpers import random_batch, tiny_checkpoint
from tests.unit.test_deploy_load import CODES, EXACT, count, difference

quantization = pytest.importorskip("compressed_tensors.quantization")


def scheme(targets: list[str], bits: int, strategy: str, activations: int | None = None, **others: Any) -> Any:
    arguments = quantization.QuantizationArgs
    token = {"strategy": "token", "dynamic": True, "symmetric": True}
    return quantization.QuantizationScheme(
        targets=targets,
        weights=arguments(num_bits=bits, strategy=strategy, **{"symmetric": True, **others}),
        input_activations=None if activations is None else arguments(num_bits=activations, **token),
    )


def compress(tmp_path: Path, groups: dict[str, Any], ignore: list[str]) -> tuple[PreTrainedModel, Path]:
    """Return a tiny model on its grids, in float32, and the folder that the package writes of it."""
    from compressed_tensors.compressors import ModelCompressor

    tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    config = quantization.QuantizationConfig(config_groups=groups, ignore=ignore)
    quantization.apply_quantization_config(model, config)
    for name, layer in model.named_modules():
        if (found := getattr(layer, "quantization_scheme", None)) is not None:
            rounded.get_submodule(name).weight.data = set_grid(layer, found.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "out")
    compressor.update_config(tmp_path / "out")
    return rounded, tmp_path / "out"


def set_grid(layer: torch.nn.Linear, args: Any) -> torch.Tensor:
    """Set a layer's grid to its extremes and return the weight on it, float32."""
    rows = layer.weight.data.float().reshape(len(layer.weight), -1, args.group_size or layer.weight.shape[1])
    low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
    ends = 2**args.num_bits - 1
    scale = (2 * torch.maximum(-low, high) if args.symmetric else high - low) / ends
    if args.strategy == "tensor":
        scale = scale.amax().reshape(1)
    layer.weight_scale.data.copy_(scale)
    scale = layer.weight_scale.data.float()
    point = torch.zeros_like(scale) if args.symmetric else (-(ends + 1) / 2 - low / scale).round().clamp(-8, 7)
    if not args.symmetric:
        layer.weight_zero_point.data.copy_(point)
    if args.strategy != "tensor":
        scale, point = scale[..., None], point[..., None]
    # The package divides in the stored dtype, so a code may differ from the one of float32: what it stores counts.
    codes = (layer.weight.data.reshape(rows.shape) / scale.bfloat16() + point.bfloat16()).round()
    codes = codes.float().clamp(-(ends + 1) / 2, (ends - 1) / 2)
    return ((codes - point) * scale).reshape(layer.weight.shape)


@pytest.mark.parametrize(
    ("bits", "strategy", "others"),
    [
        (4, "group", {"group_size": 32}),
        (4, "group", {"group_size": 32, "symmetric": False}),
        (4, "channel", {}),
        (8, "channel", {}),
        (8, "tensor", {}),
    ],
    ids=["w4 groups", "w4 groups asym", "w4 rows", "w8 rows", "w8 tensor"],
)
def test_weights_alone(tmp_path: Path, bits: int, strategy: str, others: dict[str, Any]) -> None:
    rounded, folder = compress(tmp_path, {"all": scheme(["Linear"], bits, strategy, **others)}, ["lm_head"])
    loaded = qrealign.load_packed(folder, device="cpu")
    input_ids, _ = random_batch()
    with torch.no_grad():
        assert difference(loaded(input_ids).logits, rounded(input_ids).logits) < EXACT


def test_int8_activations_as_transformers_reads_them(tmp_path: Path) -> None:
    _, folder = compress(tmp_path, {"all": scheme(["Linear"], 8, "channel", 8)}, ["lm_head", "re:.*1.mlp.down_proj"])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    input_ids, _ = random_batch()
    with torch.no_grad():
        assert (
            difference(qrealign.load_packed(folder, device="cpu")(input_ids).logits, theirs(input_ids).logits) < CODES
        )
        dense = ModelPool(torch.device("cpu")).packed("it", open_packed(str(folder)))
        assert torch.equal(dense(input_ids).logits, theirs(input_ids).logits)


def test_schemes_that_differ_within_a_model(tmp_path: Path) -> None:
    groups = {
        "attention": scheme(["re:.*self_attn.*"], 8, "channel"),
        "queries": scheme(["model.layers.0.self_attn.q_proj"], 4, "group", group_size=32),
        "rest": scheme(["Linear"], 4, "group", group_size=32, symmetric=False),
    }
    rounded, folder = compress(tmp_path, groups, ["lm_head", "model.layers.1.mlp.down_proj"])
    loaded = qrealign.load_packed(folder, device="cpu")
    input_ids, _ = random_batch()
    with torch.no_grad():
        assert difference(loaded(input_ids).logits, rounded(input_ids).logits) < EXACT
    assert count(loaded, JoinedLinears) == 3  # block 0 cannot join its queries with keys and values
    assert type(loaded.model.layers[1].mlp.down_proj) is torch.nn.Linear
