"""The quantized linear products, at the sizes of a 7B layer."""

from __future__ import annotations

from collections.abc import Mapping

import triton

from benchmarks.fit.cases import Case, no_constants
from qrealign_kernels import triton_decode, triton_few, triton_tiles
from qrealign_kernels.triton_linear import few_tokens

_CODES = {"x_ptr": "*i8", "w_ptr": "*i8", "w_scale_ptr": "*bf16", "zero_ptr": "*i8", "out_ptr": "*bf16"}
_WORDS = _CODES | {"w_ptr": "*i32"}
_FLOATS = _WORDS | {"x_ptr": "*bf16"}
_FLAGS: dict[str, object] = {"HAS_BIAS": True, "EVEN": True, "OVERLAP": False}
_ROW: dict[str, object] = {"K": 4096, "KP": 4096, "OVERLAP": False, "HAS_BIAS": True}
_TOKEN: dict[str, object] = _ROW | {"QUANTIZE": True, "QMIN": -128, "QMAX": 127, "ZERO_SCALE": 2.0**-23}
_GROUPS: dict[str, object] = {"GROUP": 128, "HAS_ZERO": True}


def _product(
    table: str,
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    note: str = "",
    keys: tuple[str, ...] | None = None,
    hot: bool = True,
) -> Case:
    return Case(
        name=f"{table}{note}",
        from_key=few_tokens if table.endswith("_few") else no_constants,
        kernel=kernel,
        table=table,
        types=types,
        constants=constants,
        aligned=tuple(name for name in ("N", "K", "KP", "stride_wn") if name not in constants),
        keys=keys,
        hot=hot,
        fp_fusion=True,
    )


CASES = (
    _product("int8_gemv", triton_decode._int8_gemv_fwd_kernel, _FLOATS, _TOKEN),
    _product("int4_gemv", triton_decode._int4_gemv_fwd_kernel, _FLOATS, _TOKEN | _GROUPS | {"G": 32}),
    _product("int4_float_gemv", triton_decode._int4_float_gemv_fwd_kernel, _FLOATS, _ROW | _GROUPS | {"G": 32}),
    _product("int4_fixed_gemv", triton_decode._int4_fixed_gemv_fwd_kernel, _FLOATS, _ROW | _GROUPS | {"G": 32}),
    _product(
        "int8_few",
        triton_few._int8_few_fwd_kernel,
        _CODES,
        {"INTEGER": True, "HAS_BIAS": True, "EVEN": True, "OVERLAP": False},
    ),
    _product(
        "int8_few",
        triton_few._int8_few_fwd_kernel,
        _CODES | {"x_ptr": "*bf16"},
        _FLAGS | {"INTEGER": False},
        ", floating point tokens",
    ),
    _product(
        "int4_few",
        triton_few._int4_few_fwd_kernel,
        _FLOATS,
        _FLAGS | _GROUPS | {"HAS_ZERO": False, "INTEGER": False},
        keys=("default", "m2-wide", "m4-wide", "m8-wide", "m32"),
    ),
    _product(
        "int4_few",
        triton_few._int4_few_fwd_kernel,
        _FLOATS,
        _FLAGS | _GROUPS | {"INTEGER": False},
        ", zero points or more tokens",
        hot=False,
    ),
    _product(
        "int4_int_few",
        triton_few._int4_few_fwd_kernel,
        _WORDS,
        _FLAGS | _GROUPS | {"INTEGER": True},
    ),
    _product(
        "int8_tile",
        triton_tiles._int8_tile_fwd_kernel,
        _CODES,
        _FLAGS | {"GROUP": 0, "HAS_ZERO": False},
    ),
    _product(
        "int8_group_tile",
        triton_tiles._int8_tile_fwd_kernel,
        _CODES,
        _FLAGS | {"GROUP": 128, "HAS_ZERO": False},
    ),
    _product("unpack4", triton_tiles._unpack4_kernel, _WORDS, _GROUPS | {"SCALED": True}),
    _product("scale8", triton_tiles._scale8_kernel, _CODES, {"GROUP": 0, "HAS_ZERO": False}),
)
