"""The kernels of a decoding step beside its products, at the sizes of 7B models."""

from __future__ import annotations

from benchmarks.fit.cases import Case
from qrealign_kernels import triton_block
from qrealign_kernels.triton_activations import token_columns

_HALVES = {
    f"{name}_ptr": "*bf16" for name in ("x", "branch", "weight", "sum", "out", "gate", "up", "query", "key", "value")
} | {f"{name}_ptr": "*bf16" for name in ("cos", "sin", "keys", "values")}
_CELLS = {"cells_ptr": "*i64", "mask_ptr": "*i1"}
_SCALARS = {"eps": "fp32", "offset": "fp32", "scaling": "fp32"}
_FEW = ("4096-few", "8192-few")
_CACHE = ("keysb", "keysh", "keyss", "valuesb", "valuesh", "valuess")
_TOKENS = {"CODES": True, "QMIN": -128, "QMAX": 127, "ZERO_SCALE": 2.0**-23}
_HEADS = {"D": 128, "DP": 128, "OVERLAP": False}


def _attention(note: str, group: int) -> Case:
    """Return the case of `group` query heads to a key head."""
    return Case(
        name=f"decode_attention{note}",
        kernel=triton_block._decode_attention_fwd_kernel,
        table="decode_attention",
        types=_HALVES | _CELLS | _SCALARS | {"sum_ptr": "*fp32"},
        constants=_HEADS | {"HEADS": 8, "GROUP": group, "GROUP_P": 16, "HAS_MASK": True, "KIND": 2},
        aligned=tuple(f"stride_{name}" for name in ("qb", "kb", "vb", *_CACHE)),
    )


CASES = (
    Case(
        name="add_rms_norm",
        kernel=triton_block._add_rms_norm_fwd_kernel,
        table="rms_norm_quantize",
        types=_HALVES | _SCALARS,
        constants=_TOKENS | {"HAS_BRANCH": True, "WEIGHT_LAST": True, "X_KIND": 2, "OUT_KIND": 2, "OVERLAP": False},
        from_key=token_columns,
        aligned=("C", "stride_xr", "stride_br"),
        keys=_FEW,
    ),
    Case(
        name="silu_mul",
        kernel=triton_block._silu_mul_fwd_kernel,
        table="silu_mul",
        types=_HALVES,
        constants={"KIND": 2, "OVERLAP": False},
        aligned=("C", "stride_gr", "stride_ur"),
    ),
    _attention("", 1),
    _attention(", four query heads to a key head", 4),
    Case(
        name="join_attention",
        kernel=triton_block._join_attention_fwd_kernel,
        table="join_attention",
        types={"out_ptr": "*bf16", "cells_ptr": "*i64"},
        constants=_HEADS | {"ADVANCE": True, "SPLITS": 32},
    ),
)
