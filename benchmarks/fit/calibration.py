"""The kernels of calibration: fake-quantization of weights and of activations."""

from __future__ import annotations

from collections.abc import Mapping

import triton

from benchmarks.fit.cases import Case
from qrealign_kernels import triton_fake_quant as looped

_ASYMMETRIC_4 = {"QMIN": -8, "QMAX": 7, "SYMMETRIC": False}


def _any_width(
    name: str, kernel: triton.JITFunction, types: Mapping[str, str], constants: Mapping[str, object]
) -> Case:
    """Return the case of a kernel that walks rows in steps."""
    return Case(
        name=name,
        kernel=kernel,
        table="looped_rows",
        types=types,
        constants=constants,
        from_key=looped.looped_columns,
        aligned=("C",),
    )


CASES = (
    _any_width(
        "fake_quant_weight_fwd, any width",
        looped._fake_quant_weight_fwd_kernel,
        {"rows_ptr": "*bf16"},
        _ASYMMETRIC_4 | {"HAS_LOW": True, "HAS_HIGH": True, "SCALE_KIND": 2, "MIN_SCALE": 2.0**-24},
    ),
    _any_width(
        "weight_gradient_sums_bwd, any width",
        looped._weight_gradient_sums_bwd_kernel,
        {"rows_ptr": "*fp32"},  # vector loads lay a float32 tile out unlike a bfloat16 one, and a compiler failed on it
        _ASYMMETRIC_4,
    ),
    _any_width(
        "weight_gradient_rows_bwd, any width", looped._weight_gradient_rows_bwd_kernel, {"rows_ptr": "*bf16"}, {}
    ),
    _any_width(
        "fake_quant_per_token_fwd",
        looped._quantize_per_token_fwd_kernel,
        {"x_ptr": "*bf16", "out_ptr": "*bf16"},
        {"CODES": False, "QMIN": -128, "QMAX": 127, "ZERO_SCALE": 2.0**-23},
    ),
)
