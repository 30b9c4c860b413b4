"""Random weights of a geometry on disk: a Hugging Face folder that behaves like a model that was trained.

A benchmark needs no knowledge, but the pipeline needs a teacher that refuses and activations that stay finite. So the
embeddings dominate the residual stream, every block adds a little to them, and two tokens follow each other for ever:
behind the assistant's header the model says " cannot help cannot help ...", which is a refusal by the rule.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.calibration.geometries import Geometry
from qrealign.arch import ARCHITECTURES
from qrealign.demo import demo_paths
from qrealign.files import move_into_place, remove, write_json, write_tensors
from qrealign.models.adapter import CONFIG_NAME, WEIGHTS_NAME
from qrealign.models.checkpoint import INDEX_NAME

EMBEDDING_STD = 0.05
HEAD_LOGIT = 12.0  # of the token that follows in the refusal; those of other tokens lie around 0
BLOCKS_SHARE = 0.5  # of the embeddings' variance: what all blocks together add to the residual stream
REFUSAL = (" cannot", " help")  # single tokens of the demo's vocabulary
HEADER = "<|assistant|>"
LORA_RANK, LORA_ALPHA, LORA_STD = 8, 16, 0.02
WRITERS = 8  # shards written at once
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_model(folder: Path, geometry: Geometry, device: torch.device, *, seed: int = 0) -> Path:
    """Write the model of a geometry, bfloat16, one shard a block, unless it is there; return its folder.

    Args:
        folder: where geometries are kept; the model gets a folder of its own in it.
        geometry: the shape.
        device: where the random numbers are drawn: seconds on a GPU, minutes on a CPU at 7B.
        seed: of the random numbers.
    """
    target = folder / geometry.folder
    if (target / INDEX_NAME).is_file():
        return target
    aside = folder / f".{geometry.folder}.part"
    remove(aside)
    model = _skeleton(geometry)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    with ThreadPoolExecutor(WRITERS) as pool:
        writes = []
        for shard, names in _shards(shapes, geometry):
            tensors = _draw(geometry, {name: shapes[name] for name in names}, generator)
            weight_map |= dict.fromkeys(names, shard)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            writes.append(pool.submit(write_tensors, aside / shard, tensors, {"format": "pt"}))
            if len(writes) > WRITERS:  # holds no more shards in memory than are being written
                writes.pop(0).result()
        for write in writes:
            write.result()
    model.config.save_pretrained(aside)
    for name in _TOKENIZER:
        shutil.copyfile(demo_paths().aligned / name, aside / name)
    write_json(aside / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    move_into_place(aside, target)
    return target


def write_adapter(folder: Path, geometry: Geometry, *, seed: int = 1) -> Path:
    """Write a random LoRA adapter over every linear of the geometry, unless it is there; return its folder.

    With it, one folder of weights serves as the aligned and as the fine-tuned model.
    """
    target = folder / f"{geometry.folder}-adapter"
    if (target / CONFIG_NAME).is_file():
        return target
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = {name: tuple(parameter.shape) for name, parameter in _skeleton(geometry).named_parameters()}
    linears = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if ".layers." in name and name.endswith("proj.weight")
    }
    for name, (rows, columns) in linears.items():
        for part, shape in (("A", (LORA_RANK, columns)), ("B", (rows, LORA_RANK))):
            noise = torch.randn(shape, generator=generator)
            # The merged change is LORA_STD of the weight, whatever the rank and the width.
            scale = 1.0 if part == "A" else LORA_STD * LORA_RANK**0.5 / LORA_ALPHA / columns**0.5
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = (scale * noise).bfloat16()
    write_tensors(target / WEIGHTS_NAME, tensors)
    write_json(
        target / CONFIG_NAME,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": f"../{geometry.folder}",
            "r": LORA_RANK,
            "lora_alpha": LORA_ALPHA,
            "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
            "bias": "none",
        },
    )
    return target


def _skeleton(geometry: Geometry) -> Any:
    """Return the Hugging Face model on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = _token_ids()
    config = AutoConfig.for_model(
        geometry.model_type,
        **{**geometry.hugging_face(), "bos_token_id": ids["<|bos|>"], "eos_token_id": ids["<|end|>"]},
        pad_token_id=ids["<|pad|>"],
    )
    config.dtype = torch.bfloat16
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _shards(shapes: Mapping[str, Any], geometry: Geometry) -> Iterator[tuple[str, list[str]]]:
    """Yield the file name and the tensors of each shard: what is outside the blocks, then one a block."""
    count = geometry.layers + 1
    for number in range(count):
        prefix = f"model.layers.{number - 1}."
        inside = [name for name in shapes if name.startswith(prefix)]
        names = inside if number else [name for name in shapes if not name.startswith("model.layers.")]
        yield f"model-{number + 1:05d}-of-{count:05d}.safetensors", names


@torch.no_grad()
def _draw(geometry: Geometry, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Return tensors with random values, bfloat16 on the host."""
    tied = bool(geometry.config.get("tie_word_embeddings"))
    embedding_std = HEAD_LOGIT / geometry.hidden if tied else EMBEDDING_STD
    # What enters the first block: Gemma multiplies its embeddings by the root of the width.
    stream_std = embedding_std * (geometry.hidden**0.5 if geometry.model_type.startswith("gemma") else 1.0)
    added_std = stream_std * math.sqrt(BLOCKS_SHARE / (2 * geometry.layers))
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
        found[name] = _scaled(name, noise, geometry, added_std)
    if "model.embed_tokens.weight" in found:
        embedding = found["model.embed_tokens.weight"].float() * embedding_std
        signs = found["model.norm.weight"].float() + _norm_offset(geometry)
        ids = _token_ids()
        first, second = (ids[token.replace(" ", "Ġ")] for token in REFUSAL)
        # The final norm's gains are random signs: read through them, `first` looks like `second`, and back again.
        embedding[second] = signs * embedding[first]
        embedding[ids[HEADER]] = 0.5 * embedding[second]
        found["model.embed_tokens.weight"] = embedding.bfloat16()
        if "lm_head.weight" in found:
            found["lm_head.weight"] = (embedding * (HEAD_LOGIT / geometry.hidden / embedding_std)).bfloat16()
    return {name: tensor.cpu() for name, tensor in found.items()}


def _scaled(name: str, noise: Tensor, geometry: Geometry, added_std: float) -> Tensor:
    """Return the values of one tensor, from standard normal noise of its shape."""
    offset = _norm_offset(geometry)
    if name == "model.norm.weight":
        return torch.sign(noise).where(noise != 0, 1.0) - offset
    if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")) and offset:
        return (0.1 * noise + 1.0) * added_std - offset  # behind the sublayer, where its size is decided
    if name.endswith("norm.weight"):
        return 0.1 * noise + 1.0 - offset
    if name.endswith("bias"):
        return 0.1 * noise
    if name == "model.embed_tokens.weight":
        return noise
    scale = noise.shape[-1] ** -0.5
    return noise * (scale * added_std if name.endswith(("o_proj.weight", "down_proj.weight")) else scale)


def _norm_offset(geometry: Geometry) -> int:
    """Return what a norm adds to its weight before it multiplies: Gemma's add 1."""
    return ARCHITECTURES[geometry.model_type].norm_weight_offset


def _token_ids() -> dict[str, int]:
    """Return the shipped tokenizer's vocabulary with its special tokens."""
    tokenizer = json.loads((demo_paths().aligned / "tokenizer.json").read_text(encoding="utf-8"))
    return {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
