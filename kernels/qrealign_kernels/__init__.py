"""Quantization ops of qrealign: each with its definition in PyTorch, Triton kernels for GPUs and C++ for CPUs."""

from qrealign_kernels.attention_ops import decode_attention, prompt_attention
from qrealign_kernels.backend import build_info, use_backend
from qrealign_kernels.block_ops import add_rms_norm, add_rms_norm_quantize, gather_rows, silu_mul
from qrealign_kernels.calibration_ops import (
    encode_weight,
    low_rank_gradients,
    reduced_weight_gradient,
    rms_norm_fake_quant,
    rms_norm_gradients,
    rms_norm_quantize,
    rotate_heads,
    silu_mul_fake_quant,
    silu_mul_gradients,
    silu_mul_quantize,
)
from qrealign_kernels.interface import BackendUnavailableError
from qrealign_kernels.linear_ops import int8_matmul, int8_matmul_dx, packed_linear, repack_weight
from qrealign_kernels.ops import (
    dequantize_weight,
    fake_quant_per_token,
    fake_quant_weight,
    pack_codes,
    pack_int4,
    quantize_per_token,
    quantize_weight,
    unpack_codes,
    unpack_int4,
)
from qrealign_kernels.quantized import PackedWeight, QuantizedActivations
from qrealign_kernels.reference_attention import CachePlace, TokenStates

__all__ = [
    "BackendUnavailableError",
    "CachePlace",
    "PackedWeight",
    "QuantizedActivations",
    "TokenStates",
    "add_rms_norm",
    "add_rms_norm_quantize",
    "build_info",
    "decode_attention",
    "dequantize_weight",
    "encode_weight",
    "fake_quant_per_token",
    "fake_quant_weight",
    "gather_rows",
    "int8_matmul",
    "int8_matmul_dx",
    "low_rank_gradients",
    "pack_codes",
    "pack_int4",
    "packed_linear",
    "prompt_attention",
    "quantize_per_token",
    "quantize_weight",
    "reduced_weight_gradient",
    "repack_weight",
    "rms_norm_fake_quant",
    "rms_norm_gradients",
    "rms_norm_quantize",
    "rotate_heads",
    "silu_mul",
    "silu_mul_fake_quant",
    "silu_mul_gradients",
    "silu_mul_quantize",
    "unpack_codes",
    "unpack_int4",
    "use_backend",
]
