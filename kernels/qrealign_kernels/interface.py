"""What a backend offers: one function per op, on rows.

The modules `reference*.py` and `packing.py` document each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qrealign_kernels import (
    packing,
    reference,
    reference_attention,
    reference_block,
    reference_calibration,
    reference_linear,
)
from qrealign_kernels.quantized import PackedWeight
from qrealign_kernels.reference import GradientSums
from qrealign_kernels.reference_calibration import WeightGradients


class BackendUnavailableError(RuntimeError):
    """A backend, or an instruction set of one, was asked for by name and cannot be used here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The functions that the public ops call; a backend replaces those of the reference that it does faster.

    `keeps_fake`: the backward wants the forward's result instead of recomputing it. `fake_quant_edited_weight` and
    `edited_weight_gradients` are None where a weight is transformed and edited in plain PyTorch before it is rounded.
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
    encode_weight: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    fake_quant_edited_weight: Callable[..., tuple[Tensor, Tensor | None]] | None
    edited_weight_gradients: Callable[..., WeightGradients] | None
    reduced_weight_gradient: Callable[..., WeightGradients]
    low_rank_gradients: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    rms_norm_quantize: Callable[..., tuple[Tensor, Tensor]]
    rms_norm_fake_quant: Callable[..., Tensor]
    rms_norm_gradients: Callable[..., tuple[Tensor, Tensor]]
    silu_mul_quantize: Callable[..., tuple[Tensor, Tensor]]
    silu_mul_fake_quant: Callable[..., Tensor]
    silu_mul_gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rotate_heads: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    add_rms_norm_quantize: Callable[..., tuple[Tensor, Tensor, Tensor]]
    silu_mul: Callable[[Tensor, Tensor], Tensor]
    gather_rows: Callable[[Tensor, Tensor], Tensor]
    decode_attention: Callable[..., Tensor]
    prompt_attention: Callable[..., Tensor]
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
    encode_weight=reference_calibration.encode_weight_ref,
    fake_quant_edited_weight=None,
    edited_weight_gradients=None,
    reduced_weight_gradient=reference_calibration.reduced_weight_gradient_ref,
    low_rank_gradients=reference_calibration.low_rank_gradients_ref,
    rms_norm_quantize=reference_calibration.rms_norm_quantize_ref,
    rms_norm_fake_quant=reference_calibration.rms_norm_fake_quant_ref,
    rms_norm_gradients=reference_calibration.rms_norm_gradients,
    silu_mul_quantize=reference_calibration.silu_mul_quantize_ref,
    silu_mul_fake_quant=reference_calibration.silu_mul_fake_quant_ref,
    silu_mul_gradients=reference_calibration.silu_mul_gradients,
    rotate_heads=reference_calibration.rotate_heads_ref,
    add_rms_norm=reference_block.add_rms_norm_ref,
    add_rms_norm_quantize=reference_block.add_rms_norm_quantize_ref,
    silu_mul=reference_calibration.silu_mul_ref,
    gather_rows=reference_block.gather_rows_ref,
    decode_attention=reference_attention.decode_attention_ref,
    prompt_attention=reference_attention.prompt_attention_ref,
    keeps_fake=True,
)
