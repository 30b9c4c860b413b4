"""Reads a packed checkpoint back, block by block, into layers that compute exactly what was calibrated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qrealign.models.checkpoint import WeightFiles
from qrealign.models.placement import assign_tensors, move_buffers, replace_module
from qrealign.pack.blocks import rename
from qrealign.pack.format import QUANTIZED_SUFFIXES, linear_of
from qrealign.quant.fake_quant import quantized_linears
from qrealign.quant.packed import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qrealign.models.source import ModelSource
    from qrealign.pack.source import PackedSource


def add_shells(model: PreTrainedModel, source: PackedSource) -> None:
    """Replace the quantized linears of a skeleton of `source` by `QuantizedLinear` layers without values."""
    for name, scheme in source.schemes.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)  # `PackedSource` refuses anything else
        replace_module(model, name, QuantizedLinear.empty(linear, scheme))


def fill_block(
    model: PreTrainedModel,
    source: ModelSource,
    index: int,
    files: WeightFiles,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Put block `index` of a packed checkpoint into a model whose linears are empty `QuantizedLinear` layers.

    Args:
        model: a skeleton of `source`, the model that the checkpoint was made from.
        source: gives tensor names.
        index: which block.
        files: the packed checkpoint's tensors.
        device: where the block goes.
        dtype: of everything that is not a code or a scale.

    Raises:
        CheckpointFormatError: a layer's tensors are missing or contradict each other.
    """
    prefix = source.spec.block_name(index)
    block = model.get_submodule(prefix)
    stored = {name: rename(f"{prefix}.{name}", source) for name in _wanted(block)}
    found = {name: file_name for name, file_name in stored.items() if file_name in files.tensors}
    state = files.read(found.values())
    tensors = {name: state[file_name].to(device) for name, file_name in found.items()}
    for name, layer in quantized_linears(block).items():
        parts = {
            suffix: tensors.pop(f"{name}.{suffix}")
            for suffix in (*QUANTIZED_SUFFIXES, "bias")
            if f"{name}.{suffix}" in tensors
        }
        linear = linear_of(parts, layer.scheme)
        layer.fill(
            linear.codes, linear.scale, linear.zero_point, None if linear.bias is None else linear.bias.to(dtype)
        )
    assign_tensors(block, tensors, device, dtype)
    move_buffers(block, device)
    return block


def _wanted(block: nn.Module) -> list[str]:
    """Return the names, relative to the block, that its tensors may have in a packed checkpoint."""
    linears = quantized_linears(block)
    names = [f"{name}.{suffix}" for name in linears for suffix in (*QUANTIZED_SUFFIXES, "bias")]
    return names + [name for name in block.state_dict() if name.rpartition(".")[0] not in linears]
