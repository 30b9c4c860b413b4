"""The kernels of calibration: rounding weights and its gradients, quantizing tokens."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.fit.cases import Case
from qrealign_kernels import triton_activations as activations
from qrealign_kernels import triton_gradient_kernels as gradients
from qrealign_kernels import triton_low_rank as low_rank
from qrealign_kernels import triton_rotary as rotary
from qrealign_kernels import triton_strip_kernels as strips
from qrealign_kernels import triton_weight as weights

_GRID = {"QMIN": -128, "QMAX": 127, "SYMMETRIC": True, "SCALE_KIND": 2, "MIN_SCALE": 2.0**-24}
_ASYMMETRIC = {"QMIN": -8, "QMAX": 7, "SYMMETRIC": False, "SCALE_KIND": 0, "MIN_SCALE": 2.0**-24}
_LEARNED = {"HAS_LOW": True, "HAS_HIGH": True, "HAS_COLUMN": True, "HAS_ROW": True}
# A kernel may spill where its tiles hold the longest rows; down projections have these, which no column scale is
# learned for.
_NARROW, _WIDE, _WIDEST = ("128", "1024", "4096", "8192"), ("16384",), ("32768",)
_SHORT, _LONG = ("128", "1024", "4096"), ("8192", "16384", "32768")
_TOKENS = {"CODES": True, "QMIN": -128, "QMAX": 127, "ZERO_SCALE": 2.0**-23, "OVERLAP": False}
_CODED = {"out_ptr": "*i8", "zero_point_ptr": "*i8"}
_MANY = (*_NARROW, *_WIDE)
_FEW = tuple(f"{key}-few" for key in _NARROW)


def _rounding(
    name: str, given: Mapping[str, object], keys: tuple[str, ...], *, pieces: int = 1, hot: bool = True
) -> Case:
    """Return the case of rounding a bfloat16 weight to bfloat16; pieces of a row are quarters of a tile."""
    return Case(
        name=name,
        kernel=weights._fake_quant_edited_fwd_kernel,
        table="fake_quant_edited_fwd",
        types={"weight_ptr": "*bf16", "out_ptr": "*bf16"},
        constants={**_GRID, **given}
        | {"CODES": False, "KEEP_EXTREMES": True, "FULL": False, "RANK": 0, "PIECES": pieces},
        from_key=weights.row_tile_columns if pieces == 1 else weights.row_piece_columns,
        aligned=("N", "K", "C"),
        keys=keys,
        hot=hot,
    )


def _slightly_edited(name: str, keys: tuple[str, ...]) -> Case:
    """Return the case of encoding a bfloat16 weight with an edit of rank 2, that of the default recipe."""
    nothing_else = {"HAS_LOW": False, "HAS_HIGH": False, "HAS_COLUMN": False, "HAS_ROW": False}
    flags = {"CODES": True, "KEEP_EXTREMES": False, "FULL": False, "RANK": 2, "PIECES": 1}
    return Case(
        name=name,
        kernel=weights._fake_quant_edited_fwd_kernel,
        table="fake_quant_edited_fwd",
        types={"weight_ptr": "*bf16"} | _CODED,
        constants={**_GRID, **nothing_else, **flags},
        from_key=weights.row_tile_columns,
        aligned=("N", "K", "C"),
        keys=keys,
    )


def _in_steps(name: str, keys: tuple[str, ...]) -> Case:
    """Return the case of rounding a bfloat16 weight whose rows fill no tile."""
    flags = {"HAS_EDIT": False, "CODES": False, "ONE_STEP": False, "FULL": True}
    return Case(
        name=name,
        kernel=weights._fake_quant_edited_steps_fwd_kernel,
        table="fake_quant_edited_steps_fwd",
        types={"weight_ptr": "*bf16", "out_ptr": "*bf16"},
        constants={**_GRID, **_LEARNED, **flags, "BLOCK_RANK": 16},
        aligned=("N", "K", "C"),
        keys=keys,
    )


def _edited(name: str, keys: tuple[str, ...], *, hot: bool = True) -> Case:
    """Return the case of encoding a bfloat16 weight with an edit."""
    nothing_else = {"HAS_LOW": False, "HAS_HIGH": False, "HAS_COLUMN": False, "HAS_ROW": False}
    return Case(
        name=name,
        kernel=weights._fake_quant_edited_steps_fwd_kernel,
        table="fake_quant_edited_steps_fwd",
        types={"weight_ptr": "*bf16"} | _CODED,
        constants=_ASYMMETRIC | nothing_else | {"HAS_EDIT": True, "CODES": True, "ONE_STEP": False, "FULL": False},
        from_key=weights.edited_tile_rank,
        aligned=("N", "K", "C"),
        keys=keys,
        hot=hot,
    )


def _gradients(name: str, given: Mapping[str, object], keys: tuple[str, ...], *, hot: bool = True) -> Case:
    """Return the case of reducing a bfloat16 gradient."""
    return Case(
        name=name,
        kernel=gradients.weight_gradients_bwd_kernel,
        table="weight_gradients_bwd",
        types={"weight_ptr": "*bf16", "grad_ptr": "*bf16"},
        constants={**_GRID, **given} | {"HAS_EXTREMES": True, "TO_WEIGHT": False, "FULL": True},
        from_key=weights.row_tile_columns,
        aligned=("N", "K", "C"),
        keys=keys,
        hot=hot,
    )


def _in_strips(name: str, divided: bool, keys: tuple[str, ...]) -> Case:
    """Return the case of reducing a bfloat16 gradient down strips of columns."""
    return Case(
        name=name,
        kernel=strips.strip_gradients_bwd_kernel,
        table="strip_gradients_bwd",
        types={"weight_ptr": "*bf16", "grad_ptr": "*bf16"},
        constants=_GRID | _LEARNED | {"HAS_ROW": divided, "TO_ROW": divided, "FULL": True, "OVERLAP": False},
        aligned=("N", "K"),
        keys=keys,
    )


def _norm(name: str, keys: tuple[str, ...], *, hot: bool = True) -> Case:
    """Return the case of normalizing and quantizing bfloat16 tokens."""
    return Case(
        name=name,
        kernel=activations._rms_norm_quantize_fwd_kernel,
        table="rms_norm_quantize",
        types={"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*i8", "eps": "fp32", "offset": "fp32"},
        constants=_TOKENS | {"WEIGHT_LAST": True, "X_KIND": 2, "OUT_KIND": 2},
        from_key=activations.token_columns,
        aligned=("C", "stride_xr"),
        keys=keys,
        hot=hot,
    )


def _gate(name: str, keys: tuple[str, ...], *, hot: bool = True) -> Case:
    """Return the case of gating and quantizing bfloat16 tokens."""
    return Case(
        name=name,
        kernel=activations._silu_mul_quantize_fwd_kernel,
        table="silu_mul_quantize",
        types={"gate_ptr": "*bf16", "up_ptr": "*bf16", "out_ptr": "*i8"},
        constants=_TOKENS | {"KIND": 2},
        from_key=activations.token_columns,
        aligned=("C", "stride_gr", "stride_ur"),
        keys=keys,
        hot=hot,
    )


def _norm_gradients(name: str, keys: tuple[str, ...], *, hot: bool = True) -> Case:
    """Return the case of the backward of a norm of bfloat16 tokens."""
    floats = ("grad_ptr", "x_ptr", "weight_ptr", "grad_x_ptr")
    return Case(
        name=name,
        kernel=activations._rms_norm_bwd_kernel,
        table="rms_norm_bwd",
        types=dict.fromkeys(floats, "*bf16") | {"eps": "fp32", "offset": "fp32"},
        from_key=activations.token_columns,
        aligned=("C", "stride_xr"),
        keys=keys,
        hot=hot,
    )


CASES = (
    _rounding("weight, rounded", _LEARNED, _MANY),
    _rounding("weight, rounded, widest", _LEARNED, _WIDEST, hot=False),
    _rounding("weight, rounded in pieces", _LEARNED, _WIDE, pieces=3),
    _slightly_edited("weight with an edit of rank 2, codes", ("4096", "8192", "16384", "16384-edit")),
    _edited("weight with an edit, codes", ("16", "32", "64")),
    _edited("weight with an edit of a rank over 64, codes", ("default",), hot=False),
    _in_steps("weight, rounded in steps", ("rows",)),
    _gradients("weight, gradients", _LEARNED | {"TO_COLUMN": True, "TO_ROW": True}, _SHORT),
    Case(
        name="weight, gradients of logits",
        kernel=gradients.bound_gradients_bwd_kernel,
        table="bound_gradients_bwd",
        types={"weight_ptr": "*bf16", "grad_ptr": "*bf16"},
        constants=_GRID | _LEARNED | {"TO_ROW": True, "FULL": True},
        aligned=("N", "K", "C"),
    ),
    _in_strips("weight, gradients in strips", False, ("default", "plain", "plain-wide")),
    _in_strips("weight with a row divisor, gradients in strips", True, ("default", "divided")),
    Case(
        name="weight, sums of its columns",
        kernel=strips.add_rows_kernel,
        table="add_rows",
        constants={"OVERLAP": False},
        aligned=("K",),
    ),
    Case(
        name="weight, gradients of extremes",
        kernel=strips.extreme_gradients_bwd_kernel,
        table="extreme_gradients_bwd",
        types={"weight_ptr": "*bf16"},
        constants=_GRID | _LEARNED | {"TO_ROW": True, "PIECES": 2, "STRIPS": 8, "OVERLAP": False},
        aligned=("N", "K"),
    ),
    _gradients("weight, gradients, long rows", _LEARNED | {"TO_COLUMN": True, "TO_ROW": True}, _LONG, hot=False),
    Case(
        name="product and gradients",
        kernel=gradients.product_gradients_bwd_kernel,
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
    _norm("RMS norm and token, codes", (*_FEW, *_MANY)),
    _norm("RMS norm and token, codes, widest", _WIDEST, hot=False),
    _gate("gate and token, codes", (*_FEW, *_MANY)),
    _gate("gate and token, codes, widest", _WIDEST, hot=False),
    _norm_gradients("RMS norm, gradients", (*_FEW, *_NARROW)),
    _norm_gradients("RMS norm, gradients, wide", (*_WIDE, *_WIDEST), hot=False),
    Case(
        name="edit, inner products",
        kernel=low_rank._low_rank_inner_kernel,
        table="low_rank_inner",
        types={"grad_ptr": "*bf16", "x_ptr": "*i8"},
        constants={"HAS_SCALE": True},
        aligned=("N", "K"),
    ),
    Case(
        name="edit, gradients",
        kernel=low_rank._low_rank_outer_kernel,
        table="low_rank_outer",
        types={"grad_ptr": "*bf16", "x_ptr": "*i8"},
        aligned=("N", "K"),
    ),
    Case(
        name="heads, turned",
        kernel=rotary._rotate_heads_kernel,
        table="rotate_heads",
        types={name: "*bf16" for name in ("x_ptr", "cos_ptr", "sin_ptr", "out_ptr")},
        constants={"TRANSPOSED": False, "KIND": 2, "HALF": 64},
        aligned=(
            "D",
            "stride_xb",
            "stride_xh",
            "stride_xt",
            "stride_cosb",
            "stride_cost",
            "stride_sinb",
            "stride_sint",
        ),
    ),
    Case(
        name="gate, gradients",
        kernel=activations._silu_mul_bwd_kernel,
        table="silu_mul_bwd",
        types={name: "*bf16" for name in ("grad_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr")},
        aligned=("C", "stride_gr", "stride_ur"),
    ),
)
