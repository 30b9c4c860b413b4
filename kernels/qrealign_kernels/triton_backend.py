"""The backend "triton": every op that has Triton kernels."""

from __future__ import annotations

import dataclasses

from qrealign_kernels import triton_fake_quant, triton_linear

BACKEND = dataclasses.replace(
    triton_fake_quant.BACKEND,
    repack_weight=triton_linear.repack_weight,
    packed_linear=triton_linear.packed_linear,
    int8_matmul=triton_linear.int8_matmul,
    int8_matmul_dx=triton_linear.int8_matmul_dx,
)
