"""The frozen linear layer: integer codes and scales, exactly what the checkpoint stores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrealign.config import QuantScheme
from qrealign_kernels import dequantize_weight, fake_quant_per_token


class QuantizedLinear(nn.Module):
    """A linear layer held as codes; it computes what any runtime computes that follows the checkpoint format.

    Args:
        codes: `[N, K]` int8, 4-bit codes too (in [-8, 7]).
        scale: `[N, G]` float32, each value exactly representable in the checkpoint's dtype.
        zero_point: `[N, G]` int8, or None when symmetric.
        bias: `[N]` or None.
        scheme: names the grid and how activations are quantized.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, scheme: QuantScheme
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", bias)
        self._dense: Tensor | None = None

    @classmethod
    def empty(cls, linear: nn.Linear, scheme: QuantScheme) -> QuantizedLinear:
        """Return a layer of the shape of `linear` without values (meta device), to be given them by `fill`."""
        rows, columns = linear.weight.shape
        grid = (rows, columns // scheme.weights.group_size if scheme.weights.group_size else 1)
        zero_point = None if scheme.weights.symmetric else torch.empty(grid, dtype=torch.int8, device="meta")
        bias = None if linear.bias is None else torch.empty(rows, device="meta")
        return cls(
            torch.empty(rows, columns, dtype=torch.int8, device="meta"),
            torch.empty(grid, device="meta"),
            zero_point,
            bias,
            scheme,
        )

    def fill(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> None:
        """Set the values of every tensor; see the class for shapes and dtypes."""
        self.codes, self.scale, self.zero_point, self.bias = codes, scale, zero_point, bias

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized weight, `[N, K]` in `dtype`."""
        return dequantize_weight(self.codes, self.scale, self.zero_point, out_dtype=dtype)

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Hold the dequantized weight in the compute dtype: forward passes are then as fast as a plain linear's."""
        self._dense = self.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme.activations is not None:
            x = fake_quant_per_token(x, num_bits=self.scheme.activations.num_bits)
        weight = self.dequantize(x.dtype) if self._dense is None else self._dense
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}"
