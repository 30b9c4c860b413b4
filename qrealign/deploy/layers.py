"""Modules of a deployed model: products over packed weights, and what can be joined with them.

They stand in the places of Hugging Face's own modules, whose blocks call them as before:

- linears that get the same input become one product, of which each of the places returns its own rows;
- a norm whose output only quantized products read moves into them, where it quantizes what it has normalized;
- a norm behind a sum normalizes while the sum is made;
- a gated MLP makes the product of its two branches in one pass, and quantizes it meanwhile where that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from qrealign.errors import CheckpointFormatError, DeviceError
from qrealign_kernels import (
    PackedWeight,
    QuantizedActivations,
    add_rms_norm,
    add_rms_norm_quantize,
    packed_linear,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from qrealign_kernels.reference_calibration import silu_mul_quantize_ref


class PackedLinear(nn.Module):
    """A linear layer over a packed weight.

    The weight's tensors are buffers too, so that they are counted, but they are no state: a packed layout belongs to
    the kind of device it was made for, and the checkpoint stays the only file.

    Args:
        weight: `[N, K]` in the layout of its device.
        bias: `[N]` or None.
        column_order: `[K]` int64, the input's columns in the order of the weight's; None where it is their own.
    """

    bias: Tensor | None
    column_order: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, column_order: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.norm: NormQuantizer | None = None
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("column_order", column_order, persistent=False)
        self._hold(weight)

    def _hold(self, weight: PackedWeight) -> None:
        self.weight = weight
        for field in fields(weight):
            if isinstance(tensor := getattr(weight, field.name), Tensor):
                if tensor.is_cuda:
                    # A graph of torch.compile must read the weight where it lies, not copy it at every call.
                    torch._dynamo.mark_static_address(tensor)
                self.register_buffer(f"packed_{field.name}", tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move the layer within its kind of device; neither codes nor scales ever change their dtype."""
        moved: dict[str, Any] = {}
        for name in [name for name in self._buffers if name.startswith("packed_")]:
            tensor = self._buffers.pop(name)
            assert tensor is not None
            target = fn(tensor).device
            if target.type != tensor.device.type:
                raise DeviceError(
                    f"weights packed for {tensor.device.type} do not run on {target.type}: "
                    f"load the checkpoint there, with load_packed(folder, device={target.type!r})"
                )
            moved[name.removeprefix("packed_")] = tensor.to(target)
        super()._apply(fn, recurse)
        self._hold(replace(self.weight, **moved))
        return self

    def _save_to_state_dict(self, *_: object) -> None:
        raise CheckpointFormatError(
            "a deployed model is laid out for its device and is not saved again: copy the folder it was loaded from"
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            return packed_linear(self.norm(x), self.weight, self.bias)
        if self.column_order is not None:
            x = x.index_select(-1, self.column_order)
        return packed_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, num_bits={self.weight.num_bits}"
        return f"{text}, activation_bits={self.weight.activation_bits}, group_size={self.weight.group_size}"


class JoinedLinears(PackedLinear):
    """Several linears of one input as a single product, the rows of one behind those of the other.

    Args:
        sizes: rows of each linear, in order; their sum is N.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None, *, sizes: tuple[int, ...]) -> None:
        super().__init__(weight, bias)
        self.sizes = sizes
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """Return what linear `index` gives for `x`, `[..., sizes[index]]`.

        The product is computed for the first of the linears that is called with `x` and let go of by the last; a call
        with another tensor computes it anew, so the result never depends on the order of calls.
        """
        last = self._last
        if last is None or last[0] is not x:
            last = (x, self(x).split(self.sizes, dim=-1))
        self._last = None if index == len(self.sizes) - 1 else last
        return last[1][index]


class JoinedPart(nn.Module):
    """Stands in the place of one of the linears that `JoinedLinears` holds."""

    def __init__(self, joined: JoinedLinears, index: int) -> None:
        super().__init__()
        self.joined = joined
        self.index = index
        self.in_features, self.out_features = joined.in_features, joined.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.joined.part(x, self.index)


class SummingNorm(nn.Module):
    """An RMS norm that can make the sum it normalizes, in one pass.

    Args:
        weight: `[H]`, the norm's own parameter.
        eps: added to the mean square.
        offset: 1 where the norm multiplies by `1 + weight`.
    """

    def __init__(self, weight: nn.Parameter, eps: float, *, offset: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps, self.offset = eps, offset
        self._last: tuple[Tensor, Tensor | QuantizedActivations] | None = None

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return `x + branch` and keep what the norm gives for it until the next call."""
        self._last = self._sum(x, branch)
        return self._last[0]

    def forward(self, x: Tensor) -> Tensor | QuantizedActivations:
        last, self._last = self._last, None
        return last[1] if last is not None and last[0] is x else self._normalize(x)

    def _sum(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor | QuantizedActivations]:
        return add_rms_norm(x, branch, self.weight, self.eps, offset=self.offset)

    def _normalize(self, x: Tensor) -> Tensor | QuantizedActivations:
        return add_rms_norm(x, None, self.weight, self.eps, offset=self.offset)[1]


class NormQuantizer(SummingNorm):
    """An RMS norm and the quantization of its output per token, as one step, within the product that reads it.

    Args:
        num_bits: of the codes.
    """

    def __init__(self, weight: nn.Parameter, eps: float, *, offset: float, num_bits: int) -> None:
        super().__init__(weight, eps, offset=offset)
        self.num_bits = num_bits

    def _sum(self, x: Tensor, branch: Tensor) -> tuple[Tensor, QuantizedActivations]:
        return add_rms_norm_quantize(x, branch, self.weight, self.eps, offset=self.offset, num_bits=self.num_bits)

    def _normalize(self, x: Tensor) -> QuantizedActivations:
        return rms_norm_quantize(x, self.weight, self.eps, offset=self.offset, num_bits=self.num_bits)


class MovedNorm(nn.Module):
    """Stands in the place of a norm that a product computes: it passes on what the product will normalize.

    Args:
        product: whose norm it was made to be.
    """

    def __init__(self, product: PackedLinear) -> None:
        super().__init__()
        self.product = product

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return `x + branch`, which the product's norm makes."""
        assert self.product.norm is not None
        return self.product.norm.add(x, branch)

    def forward(self, x: Tensor) -> Tensor:
        return x


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, whose inner product is made in one pass, and quantized where `down` wants codes.

    Args:
        gate_up: gate and up, joined in this order.
        down: takes the product of both.
    """

    def __init__(self, gate_up: JoinedLinears, down: PackedLinear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).split(self.gate_up.sizes, dim=-1)
        bits = self.down_proj.weight.activation_bits
        one_token = gate.numel() == gate.shape[-1]
        if bits is None or self.down_proj.column_order is not None or one_token:
            # A product of one token rounds it by itself; the op that would do so here gives it to one program, which
            # takes 8.4 us for 11,008 columns on an H200.
            return self.down_proj(silu_mul(gate, up))
        if torch.compiler.is_compiling():
            # The compiler spreads a row over many programs; the op gives a token to one.
            inner = QuantizedActivations(*silu_mul_quantize_ref(gate, up, num_bits=bits), gate.dtype)
        else:
            inner = silu_mul_quantize(gate, up, num_bits=bits)
        return packed_linear(inner, self.down_proj.weight, self.down_proj.bias)
