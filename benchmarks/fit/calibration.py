"""The kernels of calibration: rounding weights and its gradients, quantizing tokens."""

from __future__ import annotations

from benchmarks.fit.cases import Case
from qrealign_kernels import triton_activations as activations
from qrealign_kernels import triton_weight as weights
from qrealign_kernels import triton_weight_gradients as gradients

_GRID = {"QMIN": -128, "QMAX": 127, "SYMMETRIC": True, "SCALE_KIND": 2, "MIN_SCALE": 2.0**-24}
_ASYMMETRIC = {"QMIN": -8, "QMAX": 7, "SYMMETRIC": False, "SCALE_KIND": 0, "MIN_SCALE": 2.0**-24}
_LEARNED = {"HAS_LOW": True, "HAS_HIGH": True, "HAS_COLUMN": True, "HAS_ROW": True}
_TOKENS = {"CODES": True, "QMIN": -128, "QMAX": 127, "ZERO_SCALE": 2.0**-23}
_CODED = {"out_ptr": "*i8", "zero_point_ptr": "*i8"}

CASES = (
    Case(
        name="weight, rounded",
        kernel=weights._fake_quant_edited_fwd_kernel,
        table="fake_quant_edited_fwd",
        types={"weight_ptr": "*bf16", "out_ptr": "*bf16"},
        constants=_GRID | _LEARNED | {"CODES": False},
        from_key=weights.row_tile_columns,
        aligned=("K", "C"),
    ),
    Case(
        name="weight with an edit, codes",
        kernel=weights._fake_quant_edited_steps_fwd_kernel,
        table="fake_quant_edited_steps_fwd",
        types={"weight_ptr": "*bf16"} | _CODED,
        constants=_ASYMMETRIC
        | {"HAS_LOW": False, "HAS_HIGH": False, "HAS_COLUMN": False, "HAS_ROW": False}
        | {"HAS_EDIT": True, "CODES": True, "ONE_STEP": False},
        from_key=weights.edited_tile_rank,
        aligned=("K", "C"),
    ),
    Case(
        name="weight, gradients",
        kernel=gradients._weight_gradients_bwd_kernel,
        table="weight_gradients_bwd",
        types={"weight_ptr": "*bf16", "grad_ptr": "*bf16"},
        constants=_GRID | _LEARNED | {"TO_COLUMN": True, "TO_ROW": True, "TO_WEIGHT": False},
        from_key=weights.row_tile_columns,
        aligned=("K", "C"),
    ),
    Case(
        name="product and gradients",
        kernel=gradients._product_gradients_bwd_kernel,
        table="product_gradients_bwd",
        types={"weight_ptr": "*bf16", "grad_ptr": "*bf16", "x_ptr": "*bf16"},
        constants=_ASYMMETRIC | {"SCALE_KIND": 2} | _LEARNED | {"TO_COLUMN": True, "TO_ROW": True, "BLOCK_C": 128},
        aligned=("M", "N", "K", "C"),
    ),
    Case(
        name="token, codes",
        kernel=activations._quantize_per_token_fwd_kernel,
        table="quantize_per_token",
        types={"x_ptr": "*bf16", "out_ptr": "*i8"},
        constants=_TOKENS,
        from_key=activations.token_columns,
        aligned=("C", "stride_xr"),
    ),
    Case(
        name="RMS norm and token, codes",
        kernel=activations._rms_norm_quantize_fwd_kernel,
        table="rms_norm_quantize",
        types={"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*i8", "eps": "fp32", "offset": "fp32"},
        constants=_TOKENS | {"WEIGHT_LAST": True, "X_KIND": 2, "OUT_KIND": 2},
        from_key=activations.token_columns,
        aligned=("C", "stride_xr"),
    ),
    Case(
        name="gate and token, codes",
        kernel=activations._silu_mul_quantize_fwd_kernel,
        table="silu_mul_quantize",
        types={"gate_ptr": "*bf16", "up_ptr": "*bf16", "out_ptr": "*i8"},
        constants=_TOKENS | {"KIND": 2},
        from_key=activations.token_columns,
        aligned=("C", "stride_gr", "stride_ur"),
    ),
    Case(
        name="RMS norm, gradients",
        kernel=activations._rms_norm_bwd_kernel,
        table="rms_norm_bwd",
        types={name: "*bf16" for name in ("grad_ptr", "x_ptr", "weight_ptr", "grad_x_ptr")}
        | {"eps": "fp32", "offset": "fp32"},
        from_key=activations.token_columns,
        aligned=("C", "stride_xr"),
    ),
    Case(
        name="gate, gradients",
        kernel=activations._silu_mul_bwd_kernel,
        table="silu_mul_bwd",
        types={name: "*bf16" for name in ("grad_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr")},
        aligned=("C", "stride_gr", "stride_ur"),
    ),
)
