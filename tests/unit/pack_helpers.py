"""A tiny model quantized and written, shared by the tests of the packed checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qrealign.config import QuantScheme, parse_scheme
from qrealign.models.source import ModelSource, open_model
from qrealign.pack.writer import CheckpointWriter
from qrealign.quant.fake_quant import freeze_linears, swap_linears
from tests.helpers import tiny_checkpoint


def open_tiny(folder: Path, model_type: str = "llama", **options: object) -> ModelSource:
    """Save a tiny bfloat16 model and open it."""
    return open_model(str(tiny_checkpoint(folder, model_type, dtype=torch.bfloat16, **options)))  # type: ignore[arg-type]


def fitted(name: str, source: ModelSource) -> QuantScheme:
    """Return the scheme called `name` with a group size that fits the model."""
    return parse_scheme(name).fit_to(columns for _, columns in source.linear_shapes().values())


def quantized(source: ModelSource, scheme: QuantScheme) -> PreTrainedModel:
    """Return the float32 model with every linear of its blocks frozen to its codes."""
    model = source.load_model("cpu", torch.float32)
    for _, block in blocks_of(source, model):
        swap_linears(block, scheme, scale_dtype=source.storage_dtype, skip=source.spec.skip)
        freeze_linears(block)
    return model


def blocks_of(source: ModelSource, model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, block)."""
    for index in range(source.num_blocks):
        yield index, model.get_submodule(source.spec.block_name(index))


def write(source: ModelSource, scheme: QuantScheme, model: nn.Module, directory: Path) -> Path:
    """Write the whole checkpoint."""
    writer = CheckpointWriter(source, scheme, directory)
    for index, block in blocks_of(source, model):
        writer.add_block(index, block)
    writer.add_outer(source.outer_state())
    return writer.finish({"method": "rtn"})


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Apply `change` to the tensors of a checkpoint, and write it as a single file."""
    tensors = stored_tensors(folder)
    change(tensors)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
