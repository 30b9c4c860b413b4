"""The kernels of a decoding step beside its products, at the sizes of 7B models."""

from __future__ import annotations

from benchmarks.fit.cases import Case
from qrealign_kernels import triton_attention, triton_block
from qrealign_kernels.triton_activations import token_columns

_HALVES = {
    f"{name}_ptr": "*bf16" for name in ("x", "branch", "weight", "sum", "out", "gate", "up", "query", "key", "value")
} | {f"{name}_ptr": "*bf16" for name in ("cos", "sin", "keys", "values", "key_scale", "value_scale")}
_CELLS = {"cells_ptr": "*i64", "mask_ptr": "*i1"}
_SCALARS = {"eps": "fp32", "offset": "fp32", "scaling": "fp32"}
_FEW = ("4096-few", "8192-few")
_CACHE = ("keysb", "keysh", "keyss", "valuesb", "valuesh", "valuess")
_TOKENS = {"CODES": True, "QMIN": -128, "QMAX": 127, "ZERO_SCALE": 2.0**-23}
_HEADS = {"D": 128, "DP": 128, "OVERLAP": False}
_CODES = {"keys_ptr": "*i8", "values_ptr": "*i8", "key_scale_ptr": "*fp32", "value_scale_ptr": "*fp32"}
_PIECE = {"FROM_FIRST": False, "HAS_ROWS": True, "KIND": 2}


def _attention(note: str, group: int, *, codes: bool = False) -> Case:
    """Return the case of `group` query heads to a key head."""
    return Case(
        name=f"decode_attention{note}",
        kernel=triton_attention._decode_attention_fwd_kernel,
        table="decode_attention",
        types=_HALVES | _CELLS | _SCALARS | {"sum_ptr": "*fp32"} | (_CODES if codes else {}),
        constants=_HEADS | {"HEADS": 8, "GROUP": group, "GROUP_P": 16, "HAS_MASK": True, "KIND": 2, "CODES": codes},
        aligned=tuple(f"stride_{name}" for name in ("qb", "kb", "vb", "scale", *_CACHE)),
    )


def _prompt(note: str, *, codes: bool) -> Case:
    """Return the case of a prompt in the rows of a server."""
    return Case(
        name=f"prompt_attention{note}",
        kernel=triton_attention._prompt_attention_fwd_kernel,
        table="prompt_attention",
        types=_HALVES | _CELLS | _SCALARS | {"rows_ptr": "*i64"} | (_CODES if codes else {}),
        constants=_HEADS | _PIECE | {"HEADS": 8, "GROUP": 4, "HAS_MASK": True, "CODES": codes},
        hot=False,  # what spills is the turning of the queries, once; with smaller tiles and no spills it is slower
        aligned=tuple(f"stride_{name}" for name in ("qb", "qt", "cosb", "cost", "sinb", "sint", "scale", *_CACHE)),
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
    _attention(", codes", 1, codes=True),
    _prompt("", codes=False),
    _prompt(", codes", codes=True),
    Case(
        name="store_states",
        kernel=triton_attention._store_states_fwd_kernel,
        table="store_states",
        types=_HALVES | _CELLS | _CODES | {"rows_ptr": "*i64"},
        constants=_HEADS | _PIECE | {"HEADS": 8, "HEADS_P": 8, "CODES": True},
        aligned=tuple(f"stride_{name}" for name in ("kb", "kt", "vb", "vt", "scale", *_CACHE)),
    ),
    Case(
        name="gather_rows",
        kernel=triton_block._gather_rows_fwd_kernel,
        table="gather_rows",
        types={"table_ptr": "*bf16", "out_ptr": "*bf16", "indices_ptr": "*i64"},
        constants={"OVERLAP": False},
        aligned=("C",),
    ),
    Case(
        name="join_attention",
        kernel=triton_attention._join_attention_fwd_kernel,
        table="join_attention",
        types={"out_ptr": "*bf16", "cells_ptr": "*i64"},
        constants=_HEADS | {"ADVANCE": True, "SPLITS": 32},
    ),
)
