"""The linear layer being calibrated, and how it enters and leaves Hugging Face's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrealign.config import QuantScheme
from qrealign.quant.clipping import LearnableWeightClipping
from qrealign.quant.coded import InputCodes, Rounding, coded_linear
from qrealign.quant.edits import LowRankEdit, edited_linear
from qrealign.quant.packed import QuantizedLinear
from qrealign_kernels import encode_weight, fake_quant_weight, quantize_weight


class _GridArguments(TypedDict):
    """What the grid of a weight depends on, as the ops' keyword arguments."""

    low_logit: Tensor | None
    high_logit: Tensor | None
    num_bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype


class FakeQuantLinear(nn.Module):
    """A linear layer whose weight and input pass through the quantization grid, straight-through in the backward.

    The weight of the forward pass is `grid(weight * column_scale / row_divisor + edit)`. Everything learned is
    optional: `clipping` and `edit` are submodules, `bias_edit` `[N]` is added to the bias; the two vectors of an
    equivalent transform are live tensors that `quant.transform` sets while it trains (`column_scale` `[K]`,
    `row_divisor` `[N]`).

    With `quantize` False the layer computes what the original linear computes, bit for bit. With `coded` True an edit
    that learns alone is computed by `quant.coded`, which keeps no copy of the weight for the backward pass; None, the
    default, does so on a GPU. With `keeps_codes` it keeps the weight's codes, half the copy. `inputs` is shared by the
    linears that may read the same tensor.
    """

    def __init__(
        self, linear: nn.Linear, scheme: QuantScheme, scale_dtype: torch.dtype, inputs: InputCodes | None = None
    ) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.out_features, self.in_features = linear.weight.shape
        self.scheme = scheme
        self.scale_dtype = scale_dtype
        self.quantize = True
        self.coded: bool | None = None
        self.keeps_codes = False
        self.inputs = inputs or InputCodes()
        self.clipping: LearnableWeightClipping | None = None
        self.edit: LowRankEdit | None = None
        self.bias_edit: nn.Parameter | None = None
        self.column_scale: Tensor | None = None
        self.row_divisor: Tensor | None = None

    def float_weight(self) -> Tensor:
        """Return the weight before the grid, `[N, K]` float32, transform and edit included."""
        weight = self.weight.float()
        if self.column_scale is not None:
            weight = weight * self.column_scale
        if self.row_divisor is not None:
            weight = weight / self.row_divisor[:, None]
        if self.edit is not None:
            weight = weight + self.edit.delta()
        return weight

    def float_bias(self) -> Tensor | None:
        """Return the bias with the transform's row divisor and the edit applied."""
        bias: Tensor | None = self.bias
        if bias is not None and self.row_divisor is not None:
            bias = bias / self.row_divisor
        if bias is not None and self.bias_edit is not None:
            bias = bias + self.bias_edit.to(bias.dtype)
        return bias

    def _grid_arguments(self) -> _GridArguments:
        low, high = self.clipping.logits() if self.clipping is not None else (None, None)
        args = self.scheme.weights
        return {
            "low_logit": low,
            "high_logit": high,
            "num_bits": args.num_bits,
            "group_size": args.group_size,
            "symmetric": args.symmetric,
            "scale_dtype": self.scale_dtype,
        }

    def forward(self, x: Tensor) -> Tensor:
        bias = self.float_bias()
        bias = None if bias is None else bias.to(x.dtype)
        if self.edit is not None and self.is_coded():
            rounding = self._rounding()
            return coded_linear(x, self.weight, bias, self.edit, rounding, self.inputs, keep=self.keeps_codes)
        if self.quantize and self.scheme.activations is not None:
            x = self.inputs.fake(x, self.scheme.activations.num_bits)
        if self.edit is None or not self._only_edit_learns():
            return F.linear(x, self._forward_weight(x.dtype), bias)
        with torch.no_grad():
            weight = self._forward_weight(x.dtype)
        return edited_linear(x, weight, bias, self.edit)

    def _forward_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of the forward pass, `[N, K]` in `dtype`.

        The op transforms and edits the weight on its way to the grid; a masked edit it cannot take.
        """
        if not self.quantize:
            return self.float_weight().to(dtype)
        if self.edit is not None and self.edit.mask is not None:
            return fake_quant_weight(self.float_weight(), **self._grid_arguments(), out_dtype=dtype)
        return fake_quant_weight(self.weight, **self._grid_arguments(), **self._changes(), out_dtype=dtype)

    def _changes(self) -> dict[str, Tensor | None]:
        """Return the transform and an unmasked edit, as the ops' keyword arguments."""
        left, right = (None, None) if self.edit is None else (self.edit.left, self.edit.right)
        return {"column_scale": self.column_scale, "row_divisor": self.row_divisor, "left": left, "right": right}

    def _only_edit_learns(self) -> bool:
        """Whether an unmasked edit is all that the layer's gradient has to reach."""
        others = (self.clipping, self.column_scale, self.row_divisor, self.bias_edit)
        return self.edit is not None and self.edit.mask is None and all(other is None for other in others)

    def is_coded(self) -> bool:
        """Whether the product is that of `quant.coded`."""
        wanted = self.weight.is_cuda if self.coded is None else self.coded
        return wanted and self.quantize and self._only_edit_learns()

    def _rounding(self) -> Rounding:
        weights, activations = self.scheme.weights, self.scheme.activations
        return Rounding(
            num_bits=weights.num_bits,
            group_size=weights.group_size,
            symmetric=weights.symmetric,
            scale_dtype=self.scale_dtype,
            activation_bits=None if activations is None else activations.num_bits,
        )

    @torch.no_grad()
    def freeze(self) -> QuantizedLinear:
        """Return the frozen layer with exactly the codes that the forward pass uses."""
        if self.edit is not None and self.edit.mask is not None:
            codes, scale, zero_point = quantize_weight(self.float_weight(), **self._grid_arguments())
        else:
            codes, scale, zero_point = encode_weight(self.weight, **self._grid_arguments(), **self._changes())
        bias = self.float_bias()
        bias = None if bias is None else bias.detach().to(self.scale_dtype).to(bias.dtype)
        return QuantizedLinear(codes, scale, zero_point, bias, self.scheme)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}"


def replace_modules(root: nn.Module, old: type[nn.Module], build, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Replace every submodule of type `old` by `build(module)`; return the new ones by name.

    `skip` holds name endings.
    """
    names = [
        name
        for name, module in root.named_modules()
        if isinstance(module, old) and not f".{name}".endswith(tuple(skip))
    ]
    replaced = {}
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = root.get_submodule(parent_name)
        replaced[name] = build(getattr(parent, child))
        setattr(parent, child, replaced[name])
    return replaced


def swap_linears(
    block: nn.Module, scheme: QuantScheme, *, scale_dtype: torch.dtype, skip: Sequence[str] = ()
) -> dict[str, FakeQuantLinear]:
    """Replace every `nn.Linear` of `block`, except those whose name ends in one of `skip`, by a `FakeQuantLinear`.

    `scale_dtype` is the dtype that the checkpoint stores scales in; codes are computed from scales rounded to it.
    """
    inputs = InputCodes()
    return replace_modules(block, nn.Linear, lambda linear: FakeQuantLinear(linear, scheme, scale_dtype, inputs), skip)  # type: ignore[return-value]


def fake_quant_linears(block: nn.Module) -> dict[str, FakeQuantLinear]:
    """Return the fake-quantized linears of `block` by name, in module order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, FakeQuantLinear)}


def quantized_linears(block: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the frozen linears of `block` by name, in module order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, QuantizedLinear)}


def freeze_linears(block: nn.Module) -> dict[str, QuantizedLinear]:
    """Replace every `FakeQuantLinear` of `block` by its frozen form; return them by name."""
    return replace_modules(block, FakeQuantLinear, lambda layer: layer.freeze())  # type: ignore[return-value]


def set_quantize(modules: Iterable[nn.Module], enabled: bool) -> None:
    """Switch the grids of every `FakeQuantLinear` below `modules` on or off."""
    for module in modules:
        for layer in fake_quant_linears(module).values():
            layer.quantize = enabled
