"""The models of a run by name, loaded when asked for and kept while memory lasts."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from qrealign.config import QuantScheme
from qrealign.deploy.load import deploy_model
from qrealign.models.device import RESIDENT_SHARE, compute_dtype, free_bytes
from qrealign.models.device import choose_device as choose_device  # part of this module, for its callers
from qrealign.models.placement import assign_tensors, move_buffers
from qrealign.models.source import ModelSource
from qrealign.models.streaming import stream_blocks
from qrealign.pack.load import add_shells as add_packed_shells
from qrealign.pack.load import fill_block
from qrealign.pack.source import PackedSource
from qrealign.quant.fake_quant import quantized_linears, replace_modules
from qrealign.quant.packed import QuantizedLinear
from qrealign_kernels import quantize_weight

logger = logging.getLogger(__name__)

Loader = Callable[[PreTrainedModel, int], nn.Module]


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

        return self._get(name, source, load, lambda model: add_shells(model, source, scheme))

    def packed(self, name: str, source: PackedSource) -> PreTrainedModel:
        """Return a packed checkpoint exactly as stored.

        A GPU multiplies packed weights faster than plain ones, and has room for larger models then. On a CPU, whose
        memory is seldom short, weights that were unpacked once are faster for batches of prompts.
        """
        if name not in self._kept and self.device.type == "cuda":
            self.release()
            if source.packed_bytes <= RESIDENT_SHARE * free_bytes(self.device):
                self._kept[name] = deploy_model(source, self.device, self.dtype)

        def load(model: PreTrainedModel, index: int) -> nn.Module:
            return fill_block(model, source, index, source.files, self.device, self.dtype)

        return self._get(name, source, load, lambda model: add_packed_shells(model, source))

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

    def _get(
        self,
        name: str,
        source: ModelSource,
        load: Loader,
        swap: Callable[[PreTrainedModel], None] = lambda model: None,
    ) -> PreTrainedModel:
        """Return a model that is kept, or build it: `swap` replaces linears of its skeleton, `load` fills a block."""
        if name in self._kept:
            return self._kept[name]
        if not self.fits(source):
            self.release()
        model = source.skeleton(dtype=self.dtype)
        source.load_outer(model, self.device, self.dtype)
        swap(model)
        if not self.fits(source):
            logger.warning("%s does not fit into the free memory of %s: its blocks are streamed", name, self.device)
            stream_blocks(model, source, self.device, self.dtype, loader=load)
            return model
        for index in range(source.num_blocks):
            for layer in quantized_linears(load(model, index)).values():
                layer.keep_dense(self.dtype)
        self._kept[name] = model
        return model
