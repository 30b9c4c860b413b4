"""The exported folder against the loading rules of vLLM 0.33 and SGLang 0.5.23, applied without them.

A server builds its parameters from `config.json` alone (q, k, v joined into one, gate and up into another; outputs
split among GPUs, or inputs for the projections back), then walks through the tensors of the files and loads each into
its slice. So every tensor must have a place, the place must have the tensor's shape and dtype, and every place must be
filled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qrealign.pack.runtimes import compatible_runtimes
from tests.unit.pack_helpers import fitted, open_tiny, quantized, stored_tensors, write

# Wide enough for Marlin: outputs in multiples of 64, inputs of 128, on up to two GPUs.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
STACKED["up_proj"] = "gate_up_proj"
BY_INPUT = ("o_proj", "down_proj")  # row-parallel: their input is split among the GPUs


@dataclass(frozen=True)
class Place:
    """A parameter's slice for one linear: what is stored there, and which dimensions are outputs and inputs."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    output_dim: int | None = None
    input_dim: int | None = None


def places(group: dict[str, Any], rows: int, columns: int) -> dict[str, Place]:
    """Return the parameters that both servers create for a linear of this scheme, whole."""
    weights, activations = group["weights"], group["input_activations"]
    groups = columns // weights["group_size"] if weights["group_size"] else 1
    scale = Place(torch.bfloat16, (rows, groups), 0, 1 if groups > 1 else None)
    if group["format"] == "int-quantized":
        assert weights["num_bits"] == activations["num_bits"] == 8 and weights["symmetric"]
        return {"weight": Place(torch.int8, (rows, columns), 0, 1), "weight_scale": scale}
    assert group["format"] == "pack-quantized" and weights["num_bits"] in (4, 8)
    factor = 32 // weights["num_bits"]
    found = {
        "weight_packed": Place(torch.int32, (rows, columns // factor), 0, 1),
        "weight_scale": scale,
        "weight_shape": Place(torch.int64, (2,)),
    }
    if not weights["symmetric"]:
        found["weight_zero_point"] = Place(torch.int32, (rows // factor, groups), 0, 1 if groups > 1 else None)
    return found


def shard(tensor: torch.Tensor, dim: int | None, gpus: int, rank: int) -> torch.Tensor:
    """Return a GPU's part, as the servers' loaders narrow it; nothing may be left over."""
    if dim is None:
        return tensor
    assert tensor.shape[dim] % gpus == 0, f"{tuple(tensor.shape)} does not split over {gpus} GPUs"
    return tensor.chunk(gpus, dim)[rank]


def load_as_a_server_does(folder: Path, gpus: int) -> dict[str, torch.Tensor]:
    """Return rank 0's parameters by the server's names; an AssertionError says which rule the folder breaks."""
    config = json.loads((folder / "config.json").read_text())
    block = config["quantization_config"]
    assert block["quant_method"] == "compressed-tensors" and config["architectures"] == ["LlamaForCausalLM"]
    assert isinstance(block["ignore"], list)  # both walk through it; null stops vLLM
    (group,) = block["config_groups"].values()
    allowed = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}
    assert all(set(group[name]) <= allowed for name in ("weights", "input_activations") if group[name])
    tensors = stored_tensors(folder)
    parts: dict[str, list[torch.Tensor]] = {}
    linears = {name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale")}
    for linear in linears:
        parent, _, leaf = linear.rpartition(".")
        # Linears that become one are quantized together or not at all.
        siblings = {f"{parent}.{name}" for name in STACKED if STACKED[name] == STACKED.get(leaf)} or {linear}
        assert siblings <= linears and not siblings & set(block["ignore"])
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        if module not in linears:
            # Embedding, head, norms and the like stand in the file as in the model it was made from.
            assert tensor.dtype == torch.bfloat16 and suffix == "weight" and not leaf.endswith("_proj")
            parts[name] = [tensor]
            continue
        rows, columns = shape_of(tensors, module)
        place = places(group, rows, columns)[suffix]  # a KeyError is a tensor that the server has no place for
        assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), name
        dim = place.input_dim if leaf in BY_INPUT else place.output_dim
        parts.setdefault(name.replace(leaf, STACKED.get(leaf, leaf)), []).append(shard(tensor, dim, gpus, 0))
    for linear in linears:
        leaf = linear.rpartition(".")[2]
        for suffix in places(group, *shape_of(tensors, linear)):
            assert f"{linear.replace(leaf, STACKED.get(leaf, leaf))}.{suffix}" in parts
    return {name: torch.cat(found) for name, found in parts.items()}


def shape_of(tensors: dict[str, torch.Tensor], module: str) -> tuple[int, int]:
    stored = tensors.get(f"{module}.weight_shape", tensors.get(f"{module}.weight"))
    assert stored is not None
    rows, columns = stored.tolist() if stored.dtype == torch.int64 else stored.shape
    return rows, columns


def exported(tmp_path: Path, scheme: str) -> Path:
    source = open_tiny(tmp_path / "model", "llama", **SHAPE)
    recipe = fitted(scheme, source)
    return write(source, recipe, quantized(source, recipe), tmp_path / "out")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16", "w4a16_channel", "w4a16_asym"])
def test_servers_find_a_place_for_every_tensor(tmp_path: Path, scheme: str) -> None:
    folder = exported(tmp_path, scheme)
    config = json.loads((folder / "config.json").read_text())
    tensors = stored_tensors(folder)
    linears = {
        name.removesuffix(".weight_scale"): shape_of(tensors, name.removesuffix(".weight_scale"))
        for name in tensors
        if name.endswith("weight_scale")
    }
    servers = compatible_runtimes(config, linears)[:2]
    assert [server.name for server in servers] == ["vLLM", "SGLang"] and all(server.accepted for server in servers)
    assert 2 in servers[0].tensor_parallel
    for gpus in servers[0].tensor_parallel:
        parameters = load_as_a_server_does(folder, gpus)
        joined = parameters["model.layers.0.self_attn.qkv_proj.weight_scale"]
        assert len(joined) == (4 + 2 + 2) * 64 // gpus  # query, key and value heads


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["config_groups"]["group_0"]["weights"].update(observer="minmax"),
        lambda c: c.update(ignore=None),
        lambda c: c["ignore"].append("model.layers.0.self_attn.k_proj"),
        lambda c: c["config_groups"]["group_0"]["weights"].update(symmetric=False),
    ],
    ids=["unknown key", "no list", "half of qkv", "zero points that are not there"],
)
def test_the_rules_can_be_broken(tmp_path: Path, change: Any) -> None:
    folder = exported(tmp_path, "w4a16")
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        load_as_a_server_does(folder, 1)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_the_folder_is_whole(tmp_path: Path, scheme: str) -> None:
    """What servers read beside the weights is there, and the index names every tensor."""
    folder = exported(tmp_path, scheme)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (folder / name).is_file(), name
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == stored_tensors(folder).keys()
    for file in set(index.values()):
        with safe_open(folder / file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
