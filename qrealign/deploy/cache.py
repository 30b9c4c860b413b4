"""Keys and values of fixed size as int8 codes: half the memory of a cache in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from qrealign.deploy import CACHE_BITS
from qrealign.errors import ConfigError, UnsupportedArchitectureError
from qrealign_kernels import CachePlace, quantize_per_token

__all__ = [
    "STATIC_LAYERS",
    "CachePlace",
    "CodedStaticLayer",
    "check_cache_bits",
    "decode_states",
    "encode_states",
    "static_cache",
    "static_place",
]


def check_cache_bits(bits: int | None) -> None:
    """Refuse a width that no cache has.

    Raises:
        ConfigError: it is another.
    """
    if bits is not None and bits not in CACHE_BITS:
        raise ConfigError(
            f"a cache holds codes of 8 bits, or numbers in the model's dtype, but {bits} bits were asked for"
        )


def encode_states(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 codes `[..., D]` of keys or values, and a float32 scale for each head of each token, `[...]`."""
    codes, scale = quantize_per_token(states, num_bits=8)
    return codes, scale[..., 0]


def decode_states(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what codes stand for."""
    return torch.mul(codes, scale[..., None]).to(dtype)


class CodedStaticLayer(StaticLayer):
    """Hugging Face's static layer with int8 codes inside: what it hands out is in the model's dtype.

    `keys` and `values` are `[B, heads, cells, D]` int8, their scales `[B, heads, cells]` float32.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers, as zeros: a masked cell still counts with a weight of 0, and 0 times NaN is NaN."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (*key_states.shape[:2], self.max_cache_len)
        self.keys, self.values = (
            torch.zeros(*shape, states.shape[3], dtype=torch.int8, device=self.device)
            for states in (key_states, value_states)
        )
        self.key_scale, self.value_scale = (torch.zeros(shape, device=self.device) for _ in range(2))
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store `[B, heads, T, D]` behind what is there; return all cells."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        cells = torch.arange(key_states.shape[2], device=self.device) + self.cumulative_length
        self.cumulative_length.add_(key_states.shape[2])
        pairs = ((self.keys, self.key_scale, key_states), (self.values, self.value_scale, value_states))
        for buffer, scale, states in pairs:
            codes, scales = encode_states(states)
            buffer.index_copy_(2, cells, codes)
            scale.index_copy_(2, cells, scales)
        keys, values = (decode_states(buffer, scale, self.dtype) for buffer, scale, _ in pairs)
        return keys, values


def static_cache(config: Any, max_length: int, bits: int | None) -> StaticCache:
    """Return Hugging Face's static cache, in the model's dtype or as codes of `bits` bits.

    Raises:
        ConfigError: no cache has codes of that width.
        UnsupportedArchitectureError: codes are asked for, and a layer keeps a window only.
    """
    check_cache_bits(bits)
    cache = StaticCache(config=config, max_cache_len=max_length)
    if bits is None:
        return cache
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r} has layers with a sliding window, whose cache stays in the model's dtype"
        )
    cache.layers = [CodedStaticLayer(max_length) for _ in cache.layers]
    return cache


STATIC_LAYERS = (StaticLayer, CodedStaticLayer)  # whose cells `static_place` knows; not those with a window


def static_place(layer: StaticLayer) -> CachePlace:
    """Return where the next tokens go in one of `STATIC_LAYERS`, whose buffers are there."""
    assert layer.keys is not None and layer.values is not None
    return CachePlace(
        layer.keys,
        layer.values,
        cells=layer.cumulative_length.view(1),
        length=layer.max_cache_len,
        key_scale=getattr(layer, "key_scale", None),
        value_scale=getattr(layer, "value_scale", None),
        advance=True,
    )
