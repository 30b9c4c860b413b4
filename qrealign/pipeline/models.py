"""The models of a run by name, loaded when asked for and kept while memory lasts."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from qrealign.config import QuantScheme
from qrealign.errors import DeviceError
from qrealign.models.checkpoint import WeightFiles, find_weight_files
from qrealign.models.placement import assign_tensors, move_buffers
from qrealign.models.source import ModelSource
from qrealign.models.streaming import stream_blocks
from qrealign.pack.load import fill_block
from qrealign.quant.fake_quant import quantized_linears, replace_modules
from qrealign.quant.packed import QuantizedLinear
from qrealign_kernels import quantize_weight

logger = logging.getLogger(__name__)

RESIDENT_SHARE = 0.6  # of the free memory: what weights may take, the rest is for activations
Loader = Callable[[PreTrainedModel, int], nn.Module]


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; auto takes a GPU where there is one.

    Raises:
        DeviceError: the device is unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"--device {name!r} is no device: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(
            f"--device {name} was asked for, but this machine shows torch {torch.cuda.device_count()} GPUs: "
            "use --device cpu, or install a CUDA build of torch and its driver"
        )
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name} is not supported: use cpu or cuda")
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on a GPU and float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on the device, or available on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def add_shells(model: PreTrainedModel, source: ModelSource, scheme: QuantScheme) -> None:
    """Replace the linears of a skeleton's blocks by `QuantizedLinear` layers without values."""
    for block in source.spec.blocks_of(model):
        replace_modules(block, nn.Linear, lambda linear: QuantizedLinear.empty(linear, scheme), source.spec.skip)


@torch.no_grad()
def round_block(
    model: PreTrainedModel, source: ModelSource, index: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Fill a block of shells with the source's weights rounded to nearest: plain post-training quantization."""
    block = model.get_submodule(source.spec.block_name(index))
    state = source.block_state(index)
    for name, layer in quantized_linears(block).items():
        weight, bias = state.pop(f"{name}.weight").to(device), state.pop(f"{name}.bias", None)
        args = layer.scheme.weights
        grid = quantize_weight(
            weight.float(),
            num_bits=args.num_bits,
            group_size=args.group_size,
            symmetric=args.symmetric,
            scale_dtype=source.storage_dtype,
        )
        layer.fill(*grid, None if bias is None else bias.to(device, dtype))
    assign_tensors(block, state, device, dtype)
    move_buffers(block, device)
    return block


class ModelPool:
    """Loads models and keeps them until memory is needed for another.

    A model that does not fit is streamed: each block's weights come when its forward begins and go when it ends.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtype = compute_dtype(device)
        self._kept: dict[str, PreTrainedModel] = {}

    def full_precision(self, name: str, source: ModelSource) -> PreTrainedModel:
        """Return the model of `source` in the compute dtype."""

        def load(model: PreTrainedModel, index: int) -> nn.Module:
            return source.load_block(model, index, self.device, self.dtype)

        return self._get(name, source, load)

    def plain_quantized(self, name: str, source: ModelSource, scheme: QuantScheme) -> PreTrainedModel:
        """Return the model of `source` rounded to nearest."""

        def load(model: PreTrainedModel, index: int) -> nn.Module:
            return round_block(model, source, index, self.device, self.dtype)

        return self._get(name, source, load, scheme)

    def packed(self, name: str, source: ModelSource, scheme: QuantScheme, directory: Path) -> PreTrainedModel:
        """Return the packed checkpoint in `directory`, made from `source`, exactly as stored."""
        tensors = WeightFiles(find_weight_files(directory))

        def load(model: PreTrainedModel, index: int) -> nn.Module:
            return fill_block(model, source, index, tensors, self.device, self.dtype)

        return self._get(name, source, load, scheme)

    def resident_bytes(self, source: ModelSource) -> int:
        """Return the bytes of the whole model in the compute dtype."""
        return source.total_bytes * self.dtype.itemsize // source.storage_dtype.itemsize

    def fits(self, source: ModelSource) -> bool:
        """Return whether the whole model leaves room for activations in the memory that is free now."""
        return self.resident_bytes(source) <= RESIDENT_SHARE * free_bytes(self.device)

    def release(self, *names: str) -> None:
        """Forget some models, all of them without names."""
        for name in names or tuple(self._kept):
            self._kept.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _get(self, name: str, source: ModelSource, load: Loader, scheme: QuantScheme | None = None) -> PreTrainedModel:
        if name in self._kept:
            return self._kept[name]
        if not self.fits(source):
            self.release()
        model = source.skeleton(dtype=self.dtype)
        source.load_outer(model, self.device, self.dtype)
        if scheme is not None:
            add_shells(model, source, scheme)
        if not self.fits(source):
            logger.warning("%s does not fit into the free memory of %s: its blocks are streamed", name, self.device)
            stream_blocks(model, source, self.device, self.dtype, loader=load)
            return model
        for index in range(source.num_blocks):
            for layer in quantized_linears(load(model, index)).values():
                layer.keep_dense(self.dtype)
        self._kept[name] = model
        return model
