"""The backend of the Triton kernels: what each op runs on a GPU."""

from __future__ import annotations

import dataclasses

from qrealign_kernels import (
    triton_activations,
    triton_attention,
    triton_block,
    triton_linear,
    triton_low_rank,
    triton_rotary,
    triton_weight,
    triton_weight_gradients,
)
from qrealign_kernels.interface import REFERENCE

BACKEND = dataclasses.replace(
    REFERENCE,
    fake_quant_per_token=triton_activations.fake_quant_per_token,
    quantize_per_token=triton_activations.quantize_per_token,
    encode_weight=triton_weight.encode_weight,
    fake_quant_edited_weight=triton_weight.fake_quant_edited_weight,
    edited_weight_gradients=triton_weight_gradients.edited_weight_gradients,
    reduced_weight_gradient=triton_weight_gradients.reduced_weight_gradient,
    low_rank_gradients=triton_low_rank.low_rank_gradients,
    rms_norm_quantize=triton_activations.rms_norm_quantize,
    rms_norm_fake_quant=triton_activations.rms_norm_fake_quant,
    rms_norm_gradients=triton_activations.rms_norm_gradients,
    silu_mul_quantize=triton_activations.silu_mul_quantize,
    silu_mul_fake_quant=triton_activations.silu_mul_fake_quant,
    silu_mul_gradients=triton_activations.silu_mul_gradients,
    rotate_heads=triton_rotary.rotate_heads,
    add_rms_norm=triton_block.add_rms_norm,
    add_rms_norm_quantize=triton_block.add_rms_norm_quantize,
    silu_mul=triton_block.silu_mul,
    gather_rows=triton_block.gather_rows,
    decode_attention=triton_attention.decode_attention,
    prompt_attention=triton_attention.prompt_attention,
    repack_weight=triton_linear.repack_weight,
    packed_linear=triton_linear.packed_linear,
    int8_matmul=triton_linear.int8_matmul,
    int8_matmul_dx=triton_linear.int8_matmul_dx,
)
