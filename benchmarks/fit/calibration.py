"""The kernels of calibration: fake-quantization of weights and of activations."""

from __future__ import annotations

from benchmarks.fit.cases import Case
from qrealign_kernels import triton_fake_quant as looped

_ASYMMETRIC_4 = {"QMIN": -8, "QMAX": 7, "SYMMETRIC": False}
_LOOPED = {"table": "looped_rows", "from_key": looped.looped_columns, "aligned": ("C",)}

CASES = (
    Case(
        name="fake_quant_weight_fwd, any width",
        kernel=looped._fake_quant_weight_fwd_kernel,
        types={"rows_ptr": "*bf16"},
        constants=_ASYMMETRIC_4 | {"HAS_LOW": True, "HAS_HIGH": True, "SCALE_KIND": 2, "MIN_SCALE": 2.0**-24},
        **_LOOPED,
    ),
    Case(
        name="weight_gradient_sums_bwd, any width",
        kernel=looped._weight_gradient_sums_bwd_kernel,
        constants=_ASYMMETRIC_4,
        **_LOOPED,
    ),
    Case(
        name="weight_gradient_rows_bwd, any width",
        kernel=looped._weight_gradient_rows_bwd_kernel,
        types={"rows_ptr": "*bf16"},
        **_LOOPED,
    ),
    Case(
        name="fake_quant_per_token_fwd",
        kernel=looped._quantize_per_token_fwd_kernel,
        types={"x_ptr": "*bf16", "out_ptr": "*bf16"},
        constants={"CODES": False, "QMIN": -128, "QMAX": 127, "ZERO_SCALE": 2.0**-23},
        **_LOOPED,
    ),
)
