"""What the sweep times: our products and other projects', each through its own public interface.

A peer packs a weight once and multiplies tokens by it; tokens are quantized inside the timed call, but for the two that
compare the bare integer product. A peer whose package is missing says so in its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import qrealign_kernels as kernels
from qrealign_kernels.quantized import QuantizedActivations

GROUP = 128
LIBRARY_ROWS = 32  # torch._int_mm refuses 16 rows and fewer


def as_it_is(x: Tensor) -> Any:
    """Return the tokens."""
    return x


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A product.

    Attributes:
        bits: of a weight's element, which says how many copies overflow the cache.
        pack: weight `[N, K]` in `dtype` -> what `multiply` wants of it.
        multiply: packed weight, what `prepare` returned -> product `[M, N]`.
        prepare: tokens `[M, K]` in `dtype` -> what `multiply` wants of them; outside the timed call.
        dtype: of weights and tokens.
        scaled: the product is that of the floating point operands, so its error says something.
    """

    bits: int
    pack: Callable[[Tensor], Any]
    multiply: Callable[[Any, Any], Tensor]
    prepare: Callable[[Tensor], Any] = as_it_is
    dtype: torch.dtype = torch.bfloat16
    scaled: bool = True


def ours(num_bits: int, activation_bits: int | None) -> Peer:
    """Return our packed product: 8 bits per channel, 4 bits per group."""

    def pack(weight: Tensor) -> Any:
        codes, scale, _ = kernels.quantize_weight(
            weight, num_bits=num_bits, group_size=GROUP if num_bits == 4 else None
        )
        return kernels.repack_weight(codes, scale, num_bits=num_bits, activation_bits=activation_bits)

    return Peer(bits=num_bits, pack=pack, multiply=lambda weight, x: kernels.packed_linear(x, weight))


def ours_int8_forward() -> Peer:
    """Return calibration's integer product: tokens come as codes, the result is scaled."""

    def prepare(x: Tensor) -> QuantizedActivations:
        return QuantizedActivations(*kernels.quantize_per_token(x), x.dtype)

    return Peer(
        bits=8,
        pack=lambda weight: kernels.quantize_weight(weight, num_bits=8)[:2],
        multiply=lambda weight, x: kernels.int8_matmul(x.codes, x.scale, weight[0], weight[1], None, x.dtype),
        prepare=prepare,
    )


def torch_int_mm() -> Peer:
    """Return the library's integer product, which leaves the result unscaled."""

    def prepare(x: Tensor) -> Tensor:
        padding = max(0, LIBRARY_ROWS - len(x)) if len(x) <= LIBRARY_ROWS // 2 else 0
        return torch.nn.functional.pad(kernels.quantize_per_token(x)[0], (0, 0, 0, padding))

    return Peer(
        bits=8,
        pack=lambda weight: kernels.quantize_weight(weight, num_bits=8)[0].t(),
        multiply=lambda weight, x: torch._int_mm(x, weight),
        prepare=prepare,
        scaled=False,
    )


def gemlite_w8a8() -> Peer:
    """Return gemlite's product with dynamic int8 tokens."""
    from gemlite.helper import A8W8_int8_dynamic

    return Peer(
        bits=8,
        pack=lambda weight: A8W8_int8_dynamic(device="cuda", dtype=weight.dtype).from_weights(weight),
        multiply=lambda layer, x: layer(x),
    )


def gemlite_w4a16() -> Peer:
    """Return gemlite's 4-bit product, per group with zero points."""
    from gemlite.helper import A16W4_HQQ_INT

    def pack(weight: Tensor) -> Any:
        codes, scale, zero_point = kernels.quantize_weight(weight, num_bits=4, group_size=GROUP, symmetric=False)
        assert zero_point is not None
        layer = A16W4_HQQ_INT(device="cuda", dtype=weight.dtype)
        unsigned = (codes.to(torch.int16) + 8).to(torch.uint8)
        return layer.from_weights(unsigned, scale.to(weight.dtype), (zero_point + 8).to(weight.dtype))

    return Peer(bits=4, pack=pack, multiply=lambda layer, x: layer(x), dtype=torch.float16)


def torchao(bits: int) -> Peer:
    """Return torchao's dynamic int8 product, compiled as it is meant to be, or its 4-bit one by tinygemm."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_

    packing = {"group_size": GROUP, "int4_packing_format": "tile_packed_to_4d"}
    config = (
        Int8DynamicActivationInt8WeightConfig(version=2, set_inductor_config=False)
        if bits == 8
        else Int4WeightOnlyConfig(**packing, set_inductor_config=False)
    )

    def pack(weight: Tensor) -> Tensor:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(layer, config)
        return layer.weight

    def multiply(weight: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight)

    return Peer(bits=bits, pack=pack, multiply=torch.compile(multiply, dynamic=True) if bits == 8 else multiply)


def bitsandbytes_w8a8() -> Peer:
    """Return bitsandbytes' dynamic int8 product, no columns kept apart."""
    import bitsandbytes.functional as bnb

    def multiply(packed: tuple[Tensor, Tensor, Any], x: Tensor) -> Tensor:
        codes, scale, _ = bnb.int8_vectorwise_quant(x)
        scaled: Tensor = torch.ops.bitsandbytes.int8_scaled_mm.default(
            codes, packed[0], scale, packed[1], bias=None, dtype=x.dtype
        )
        return scaled

    return Peer(bits=8, pack=bnb.int8_vectorwise_quant, multiply=multiply, dtype=torch.float16)


def bitsandbytes_nf4() -> Peer:
    """Return bitsandbytes' NF4 product, blocks of 64."""
    import bitsandbytes

    return Peer(
        bits=4,
        pack=lambda weight: bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"),
        multiply=lambda packed, x: bitsandbytes.matmul_4bit(x, packed[0], quant_state=packed[1]),
    )


BASELINE = "torch bf16"
PEERS: dict[str, Callable[[], Peer]] = {
    BASELINE: lambda: Peer(bits=16, pack=as_it_is, multiply=lambda weight, x: x @ weight.T),
    "ours w8a8": lambda: ours(8, 8),
    "ours w4a16": lambda: ours(4, None),
    "ours w4a8": lambda: ours(4, 8),
    "ours int8 forward": ours_int8_forward,
    "torch._int_mm": torch_int_mm,
    "gemlite w8a8": gemlite_w8a8,
    "gemlite w4a16": gemlite_w4a16,
    "torchao w8a8": lambda: torchao(8),
    "torchao w4a16": lambda: torchao(4),
    "bitsandbytes w8a8": bitsandbytes_w8a8,
    "bitsandbytes nf4": bitsandbytes_nf4,
}
TUNING = ("gemlite w8a8", "gemlite w4a16")  # compile dozens of kernels a shape before they choose one
ROWS = (1, 8, 16, 64, 256, 2048, 4096)
LARGE = (2048, 4096)  # of them, where a product takes all the power that a GPU for servers may draw
CALIBRATION_ROWS = 1024  # tokens of a calibration step
ROWS_OF = {
    "ours int8 forward": (CALIBRATION_ROWS,),
    "torch._int_mm": (*ROWS, CALIBRATION_ROWS),
}  # other than ROWS
