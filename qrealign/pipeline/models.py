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
from qrealign.models.placement import assign_tensor, assign_tensors, move_buffers
from qrealign.models.source import ModelSource
from qrealign.models.streaming import stream_blocks
from qrealign.models.transfer import BlockStream, HostBlocks, open_stream
from qrealign.pack.load import add_shells as add_packed_shells
from qrealign.pack.load import fill_block
from qrealign.pack.source import PackedSource
from qrealign.quant.fake_quant import quantized_linears, replace_modules
from qrealign.quant.packed import QuantizedLinear
from qrealign_kernels import quantize_weight

logger = logging.getLogger(__name__)

HELD_SHARE = 0.5  # of the free memory: what a model that does not fit may hold of its blocks
LOW_BYTES = 8 * 2**30  # the same with --memory low, made for cards of 16 GiB

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

    Args:
        device: where models run.
        memory: how they are held, a name in `MEMORY_MODES`.
        pin: keep streamed weights in page-locked host memory; without, every pass reads the files.
    """

    def __init__(self, device: torch.device, memory: str = "auto", *, pin: bool = True) -> None:
        self.device, self.memory, self.pin = device, memory, pin
        # cuDNN plans its attention anew for every length of the keys, which takes longer than the token it answers.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.dtype = compute_dtype(device)
        self._kept: dict[str, PreTrainedModel] = {}
        self._sources: dict[str, ModelSource] = {}  # of the kept models in full precision
        self._streams: dict[str, BlockStream] = {}  # what brings the blocks of those that do not fit
        self._idle: HostBlocks | None = None  # what such a one had in host memory, for the next one

    def full_precision(self, name: str, source: ModelSource, *, instead_of: str | None = None) -> PreTrainedModel:
        """Return the model of `source` in the compute dtype.

        Args:
            name: under which it is kept.
            source: the model.
            instead_of: a kept model that is no longer needed, by nobody; one of the same files is changed into this
                one where it stands, any other is given up first.
        """
        if instead_of is not None and name not in self._kept:
            if self._become(instead_of, name, source):
                return self._kept[name]
            self._set_free(instead_of)
            self.release(instead_of)
        model = self._get(name, source)
        if name in self._kept:
            self._sources[name] = source
        return model

    def take(self, source: ModelSource) -> PreTrainedModel | None:
        """Return the kept model of `source`, if there is one, for its new owner alone; all other models are forgotten.

        Its linears may be swapped and its weights used up.
        """
        fingerprint = source.fingerprint()
        found = next((name for name, kept in self._sources.items() if kept.fingerprint() == fingerprint), None)
        model = None if found is None else self._kept.get(found)
        streamed = (key for key, stream in self._streams.items() if stream.host.source.fingerprint() == fingerprint)
        self._set_free(next(streamed, None))
        self._forget(*self._kept, *self._streams)
        return model

    def _set_free(self, name: str | None) -> None:
        """End the stream of a model that nobody uses any more, and have its host memory ready for the next one."""
        if name in self._streams:
            self._idle = self._streams.pop(name).detach()

    def _become(self, old: str, new: str, source: ModelSource) -> bool:
        """Change a kept model into that of `source` where only changes of the weights lie between them."""
        present = self._sources.get(old)
        if present is None or not present.becomes(source, self.dtype):
            return False
        model = self._kept.pop(old)
        del self._sources[old]
        for index, block in enumerate(source.spec.blocks_of(model)):
            if self.device.type == "cuda":  # a block is one piece of memory there: what is not merged would keep it all
                source.merge_block(index, block.state_dict())
                continue
            for name, tensor in block.state_dict().items():  # files are mapped there, and must not be written to
                merged = source.merged(f"{source.spec.block_name(index)}.{name}", tensor)
                if merged is not tensor:
                    assign_tensor(block, name, merged)
        source.load_outer(model, self.device, self.dtype)
        self._kept[new], self._sources[new] = model, source
        return True

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
        if name not in self._kept and self.multiplies_packed:
            if not self._holds(source.packed_bytes):
                self.release()
            if self._holds(source.packed_bytes):
                self._kept[name] = deploy_model(source, self.device, self.dtype)

        def load(model: PreTrainedModel, index: int) -> nn.Module:
            return fill_block(model, source, index, source.files, self.device, self.dtype)

        return self._get(name, source, load, lambda model: add_packed_shells(model, source))

    @property
    def multiplies_packed(self) -> bool:
        """Whether packed checkpoints stay packed while they run."""
        return self.device.type == "cuda"

    @property
    def copies_blocks(self) -> bool:
        """Whether blocks that are streamed are copied; a CPU reads them where the files are mapped."""
        return self.device.type == "cuda"

    def resident_bytes(self, source: ModelSource) -> int:
        """Return the bytes of the whole model in the compute dtype."""
        return source.total_bytes * self.dtype.itemsize // source.storage_dtype.itemsize

    def fits(self, source: ModelSource) -> bool:
        """Return whether the whole model is to be held on the device: as asked for, or as the free memory allows."""
        return self._holds(self.resident_bytes(source))

    def _holds(self, weight_bytes: int) -> bool:
        if self.memory != "auto":
            return self.memory == "resident"
        return weight_bytes <= RESIDENT_SHARE * free_bytes(self.device)

    def mode(self, source: ModelSource) -> str:
        """Return how the weights of a model will be held now: "resident", "low" (some of them) or "streamed"."""
        if self.fits(source):
            return "resident"
        return "low" if self.device.type == "cuda" and self.held_bytes() >= self.block_bytes(source) else "streamed"

    def block_bytes(self, source: ModelSource) -> int:
        """Return the bytes of the largest block in the compute dtype."""
        return max(source.block_layout(index, self.dtype).num_bytes for index in range(source.num_blocks))

    def weight_bytes(self, source: ModelSource) -> int:
        """Return what the weights of a model will take on the device now; the rest of them comes block by block."""
        whole, block = self.resident_bytes(source), self.block_bytes(source)
        if self.fits(source):
            return whole
        outer = whole - sum(source.block_layout(index, self.dtype).num_bytes for index in range(source.num_blocks))
        held = int(self.held_bytes() / block) * block if self.device.type == "cuda" else 0
        return min(whole, max(outer, 0) + held + 2 * block)

    def held_bytes(self) -> float:
        """Return what blocks of a model that does not fit may take on the device for good."""
        if self.memory == "streamed":
            return 0.0
        free = HELD_SHARE * free_bytes(self.device)
        return min(free, LOW_BYTES) if self.memory == "low" else free

    def open_stream(self, source: ModelSource) -> BlockStream | None:
        """Return what brings the blocks of a model that does not fit to the device; None where none are copied."""
        if not self.copies_blocks:
            return None
        host, self._idle = self._idle, None
        return open_stream(source, self.dtype, self.device, held_bytes=self.held_bytes(), pin=self.pin, host=host)

    def release(self, *names: str) -> None:
        """Forget some models; without names all of them, and what is ready for the next one."""
        if not names:
            self._idle = None
        self._forget(*(names or (*self._kept, *self._streams)))

    def _forget(self, *names: str) -> None:
        for name in names:
            self._kept.pop(name, None)
            self._sources.pop(name, None)
            self._streams.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _get(
        self,
        name: str,
        source: ModelSource,
        load: Loader | None = None,
        swap: Callable[[PreTrainedModel], None] = lambda model: None,
    ) -> PreTrainedModel:
        """Return a kept model, or load one: block by block with `load`, else in full precision.

        `swap` replaces linears of the skeleton before anything is loaded.
        """
        if name in self._kept:
            return self._kept[name]
        if not self.fits(source):
            self._forget(*self._kept, *self._streams)
        model = source.skeleton(dtype=self.dtype)
        source.load_outer(model, self.device, self.dtype)
        swap(model)
        if not self.fits(source):
            if self.memory == "auto":
                logger.warning("%s does not fit into the free memory of %s: its blocks are streamed", name, self.device)
            stream = self.open_stream(source) if load is None else None
            if stream is not None:
                self._streams[name] = stream
            stream_blocks(model, source, self.device, self.dtype, loader=load, stream=stream)
            return model
        if load is None:
            blocks = source.load_blocks(model, self.device, self.dtype)
        else:
            blocks = (load(model, index) for index in range(source.num_blocks))
        for block in blocks:
            for layer in quantized_linears(block).values():
                layer.keep_dense(self.dtype)
        self._kept[name] = model
        return model
