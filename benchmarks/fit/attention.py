"""Attention of one new token a sequence, at the sizes of a 7B layer."""

from __future__ import annotations

from benchmarks.fit.cases import Case
from qrealign_kernels import triton_attention

_CACHE = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "mask_ptr": "*u8", "out_ptr": "*bf16"}

CASES = (
    Case(
        name="decode attention",
        kernel=triton_attention._decode_attention_chunk_fwd_kernel,
        table="decode_attention",
        types=_CACHE | {"scaling": "fp32"},
        constants={"HAS_MASK": True, "WIDTH": 128},
        aligned=tuple(f"stride_{name}" for name in ("qb", "qh", "kb", "kh", "ks", "vb", "vh", "vs")),
        fp_fusion=True,
    ),
    Case(
        name="decode attention, chunks joined",
        kernel=triton_attention._decode_attention_join_fwd_kernel,
        table="decode_attention_join",
        types=_CACHE,
        constants={"WIDTH": 128, "CHUNKS": 16},
        fp_fusion=True,
    ),
)
