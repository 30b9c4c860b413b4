"""The ways to multiply tokens by a linear layer on a CPU: ours, and every one that torch brings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import qrealign_kernels as kernels

GROUP = 128
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """A weight `[N, K]` and tokens `[M, K]`, in the forms that the paths start from."""

    weight: Tensor
    codes8: Tensor
    scale8: Tensor
    codes4: Tensor
    scale4: Tensor
    x: Tensor

    @classmethod
    def random(cls, rows: int, columns: int, tokens: int) -> Layer:
        """Return a layer of normal weights and tokens in bfloat16."""
        weight = torch.randn(rows, columns) * 0.02
        codes8, scale8, _ = kernels.quantize_weight(weight, num_bits=8)
        codes4, scale4, _ = kernels.quantize_weight(weight, num_bits=4, group_size=GROUP)
        return cls(weight.bfloat16(), codes8, scale8, codes4, scale4, torch.randn(tokens, columns).bfloat16())


def _ours(layer: Layer, num_bits: int, activation_bits: int | None) -> Call:
    codes, scale = (layer.codes8, layer.scale8) if num_bits == 8 else (layer.codes4, layer.scale4)
    packed = kernels.repack_weight(codes, scale, num_bits=num_bits, activation_bits=activation_bits)
    return partial(kernels.packed_linear, layer.x, packed)


def _bfloat16(layer: Layer) -> Call:
    return partial(torch.nn.functional.linear, layer.x, layer.weight)


def _dynamic(layer: Layer, engine: str) -> Call:
    """torch.ao's dynamic linear: unsigned tokens with one scale for all of them."""
    if engine not in torch.backends.quantized.supported_engines:
        raise RuntimeError(f"torch has no engine {engine} here")
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantized tensors will leave torch
        zeros = torch.zeros(len(layer.codes8), dtype=torch.long)
        weight = torch.quantize_per_channel(
            layer.weight.float(), layer.scale8.double().flatten(), zeros, 0, torch.qint8
        )
        linear = torch.ao.nn.quantized.dynamic.Linear(layer.weight.shape[1], len(layer.weight))
        linear.set_weight_bias(weight, None)
    x = layer.x.float()

    def call() -> Tensor:
        torch.backends.quantized.engine = engine
        return linear(x)

    return call


def _int8pack(layer: Layer) -> Call:
    return partial(torch._weight_int8pack_mm, layer.x, layer.codes8, layer.scale8.bfloat16().flatten())


def _int_mm(layer: Layer, quantize: bool) -> Call:
    """torch._int_mm with tokens rounded per token as ours are, or on codes that are there already."""
    transposed, w_scale = layer.codes8.t(), layer.scale8.flatten()
    if not quantize:
        given, _ = kernels.quantize_per_token(layer.x)
        return partial(torch._int_mm, given, transposed)

    def call() -> Tensor:
        codes, scale = kernels.quantize_per_token(layer.x)
        return (torch._int_mm(codes, transposed) * scale * w_scale).bfloat16()

    return call


def _onednn(layer: Layer) -> Call:
    """The product of compiled quantized models, on codes of one fixed scale that are there already."""
    packed = torch.ops.onednn.qlinear_prepack(layer.codes8.t(), list(layer.x.shape))
    codes = (kernels.quantize_per_token(layer.x)[0].to(torch.int16) + 128).to(torch.uint8)
    zeros, w_scale = torch.zeros(len(layer.codes8), dtype=torch.long), layer.scale8.flatten()
    rest: tuple[object, ...] = (0.01, 128, packed, w_scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], "")
    return partial(torch.ops.onednn.qlinear_pointwise, codes, *rest)


def _int4pack(layer: Layer) -> Call:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((layer.codes4 + 8).int(), 1)
    scale_and_zero = torch.stack([layer.scale4, torch.zeros_like(layer.scale4)], dim=-1).transpose(0, 1)
    rest = (packed, GROUP, scale_and_zero.bfloat16().contiguous())
    return partial(torch.ops.aten._weight_int4pack_mm_for_cpu, layer.x, *rest)


# Family -> path -> how to prepare it. Ours begin with "qrealign".
PATHS: Mapping[str, Mapping[str, Callable[[Layer], Call]]] = {
    "int8": {
        "qrealign w8a8": partial(_ours, num_bits=8, activation_bits=8),
        "qrealign w8a16": partial(_ours, num_bits=8, activation_bits=None),
        "torch bf16": _bfloat16,
        "torch dynamic, fbgemm": partial(_dynamic, engine="fbgemm"),
        "torch dynamic, onednn": partial(_dynamic, engine="onednn"),
        "torch dynamic, x86": partial(_dynamic, engine="x86"),
        "torch _weight_int8pack_mm": _int8pack,
        "torch _int_mm": partial(_int_mm, quantize=True),
        "torch _int_mm, codes given": partial(_int_mm, quantize=False),
        "torch onednn.qlinear, codes given": _onednn,
    },
    "int4": {
        "qrealign w4a8": partial(_ours, num_bits=4, activation_bits=8),
        "qrealign w4a16": partial(_ours, num_bits=4, activation_bits=None),
        "torch bf16": _bfloat16,
        "torch _weight_int4pack_mm": _int4pack,
    },
}
