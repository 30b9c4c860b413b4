"""Compiles every Triton kernel for the GPUs named on the command line, without one; prints a JSON line per kernel.

Run by test_compile.py in a process of its own: TRITON_INTERPRET=1, which the other tests need, stands when a kernel is
decorated, and then nothing can be compiled.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qrealign_kernels import triton_fake_quant as kernels
from qrealign_kernels.triton_common import launch_for

GROUP, CHANNEL = 128, 4096  # widths of a row: a group, a whole row; the launches between them differ less
CASES = {
    kernels._fake_quant_weight_fwd_kernel: (
        {"rows_ptr": "*bf16"},
        {
            "HAS_LOW": True,
            "HAS_HIGH": True,
            "QMIN": -8,
            "QMAX": 7,
            "SYMMETRIC": False,
            "SCALE_KIND": 2,
            "MIN_SCALE": 2.0**-24,
        },
    ),
    kernels._weight_gradient_sums_bwd_kernel: (
        {"rows_ptr": "*bf16"},
        {"QMIN": -128, "QMAX": 127, "SYMMETRIC": True},
    ),
    kernels._weight_gradient_rows_bwd_kernel: ({"rows_ptr": "*bf16"}, {}),
    kernels._quantize_per_token_fwd_kernel: (
        {"x_ptr": "*bf16", "out_ptr": "*bf16"},
        {"CODES": False, "QMIN": -128, "QMAX": 127, "ZERO_SCALE": 2.0**-23},
    ),
}


def compile_kernel(
    kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, object], capability: int, columns: int
):
    """Return the kernel compiled for one GPU and one row width, with the launch that the host would choose."""
    launch = launch_for(columns)
    constants = constants | {"BLOCK_R": launch.block_r, "BLOCK_C": launch.block_c}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    aligned = [name for name in kernel.arg_names if name.endswith("_ptr") or name == "C"]  # as real layers are
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "enable_fp_fusion": kernels.FP_FUSION},
    )


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for kernel, (types, constants) in CASES.items():
            # Vector loads of float32 lay a tile out differently from those of bfloat16, which a compiler can fail on.
            variants = [(GROUP, types), (GROUP, dict.fromkeys(types, "*fp32")), (CHANNEL, types)]
            for columns, floats in variants if capability == 89 else variants[:1]:
                compiled = compile_kernel(kernel, floats, constants, capability, columns)
                row = {"kernel": kernel.__name__, "capability": capability, "columns": columns}
                print(json.dumps(row | {"shared_bytes": compiled.metadata.shared}), flush=True)
