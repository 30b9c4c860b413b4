"""What a backend offers: one function per op, on rows.

`reference.py`, `reference_linear.py` and `packing.py` document each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qrealign_kernels import packing, reference, reference_linear
from qrealign_kernels.quantized import PackedWeight
from qrealign_kernels.reference import GradientSums


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The functions that the public ops call; a backend replaces those of the reference that it does faster.

    `keeps_fake`: the backward wants the forward's result instead of recomputing it.
    """

    fake_quant_weight: Callable[..., tuple[Tensor, Tensor]]
    weight_gradient_sums: Callable[..., GradientSums]
    weight_gradient_rows: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    fake_quant_per_token: Callable[[Tensor, int], Tensor]
    quantize_per_token: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    pack_codes: Callable[[Tensor, int, int], Tensor]
    unpack_codes: Callable[[Tensor, int, tuple[int, int], int], Tensor]
    repack_weight: Callable[..., PackedWeight]
    packed_linear: Callable[..., Tensor]
    int8_matmul: Callable[..., Tensor]
    int8_matmul_dx: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    keeps_fake: bool


REFERENCE = Backend(
    fake_quant_weight=reference.fake_quant_weight_rows,
    weight_gradient_sums=reference.weight_gradient_sums,
    weight_gradient_rows=reference.weight_gradient_rows,
    fake_quant_per_token=reference.fake_quant_per_token_rows,
    quantize_per_token=reference.quantize_per_token_rows,
    pack_codes=packing.pack_codes_ref,
    unpack_codes=packing.unpack_codes_ref,
    repack_weight=reference_linear.repack_weight_ref,
    packed_linear=reference_linear.packed_linear_ref,
    int8_matmul=reference_linear.int8_matmul_ref,
    int8_matmul_dx=reference_linear.int8_matmul_dx_ref,
    keeps_fake=True,
)
