"""Quantization ops of qrealign: each with its definition in PyTorch, Triton kernels for GPUs and C++ for CPUs."""

from qrealign_kernels.backend import BackendUnavailableError, build_info, use_backend
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

__all__ = [
    "BackendUnavailableError",
    "build_info",
    "dequantize_weight",
    "fake_quant_per_token",
    "fake_quant_weight",
    "pack_codes",
    "pack_int4",
    "quantize_per_token",
    "quantize_weight",
    "unpack_codes",
    "unpack_int4",
    "use_backend",
]
