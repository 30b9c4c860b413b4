"""Runs every quantized product once at odd shapes, for NVIDIA's checkers of memory accesses and races:

    compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck python tests/kernels/sanitize.py

PYTORCH_NO_CUDA_MEMORY_CACHING=1 in front lets memcheck see the end of every tensor. Needs a GPU; exits with 1 if a
result is wrong.
"""

from __future__ import annotations

import itertools
import sys

import torch

import qrealign_kernels as kernels
from qrealign_kernels import launches, reference_linear

ROWS, COLUMNS = 77, 384  # no multiple of any tile; three groups of 128, one block and a half of 4-bit codes
RECIPES = [  # bits, bits of activations, group size, symmetric
    (8, 8, None, True),
    (8, None, None, True),
    (4, None, 128, True),
    (4, None, 32, False),
    (4, 8, 128, False),
    (4, 4, None, True),
]
TOKENS = (1, 3, 19)
ROUTES = [  # as tuned, and the way of many tokens at few
    None,
    {"INT8_FEW": 0, "INT4_FEW": 0},
]


def check(bits: int, activation_bits: int | None, group: int | None, symmetric: bool, tokens: int) -> float:
    """Return the relative error of one product against its definition."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    groups = COLUMNS // (group or COLUMNS)
    codes = torch.randint(low, high, (ROWS, COLUMNS), dtype=torch.int8, device="cuda")
    scale = (torch.rand(ROWS, groups, device="cuda") * 0.01 + 0.001).bfloat16().float()
    zero_point = None if symmetric else torch.randint(low, high, scale.shape, dtype=torch.int8, device="cuda")
    x = torch.randn(tokens, COLUMNS, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(ROWS, device="cuda", dtype=torch.bfloat16)
    kind = {"num_bits": bits, "activation_bits": activation_bits}
    packed = kernels.repack_weight(codes, scale, zero_point, **kind)
    plain = reference_linear.repack_weight_ref(codes, scale, zero_point, **kind)
    want = reference_linear.packed_linear_ref(x, plain, bias, torch.float32)
    got = kernels.packed_linear(x, packed, bias, out_dtype=torch.float32)
    return ((got - want).norm() / want.norm()).item()


def check_calibration(tokens: int) -> float:
    """Return the larger relative error of the integer forward and of its input gradient."""
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8, device="cuda")
    scale, x_scale = torch.rand(ROWS, 3, device="cuda"), torch.rand(tokens, 1, device="cuda")
    zero_point = torch.randint(-128, 128, scale.shape, dtype=torch.int8, device="cuda")
    x = torch.randint(-128, 128, (tokens, COLUMNS), dtype=torch.int8, device="cuda")
    grad = torch.randn(tokens, ROWS, device="cuda", dtype=torch.bfloat16)
    pairs = [
        (
            kernels.int8_matmul(x, x_scale, codes, scale, None, torch.float32, zero_point=zero_point),
            reference_linear.int8_matmul_ref(x, x_scale, codes, scale, zero_point, out_dtype=torch.float32),
        ),
        (
            kernels.int8_matmul_dx(grad, codes, scale, zero_point).float(),
            reference_linear.int8_matmul_dx_ref(grad.float(), codes, scale, zero_point),
        ),
    ]
    return max(((got - want).norm() / want.norm()).item() for got, want in pairs)


def main() -> int:
    torch.manual_seed(0)
    wrong = 0
    with kernels.use_backend("triton"):
        for routes, recipe, tokens in itertools.product(ROUTES, RECIPES, TOKENS):
            if routes is None:
                error = check(*recipe, tokens)
            else:
                with launches.forced("linear_routes", routes):
                    error = check(*recipe, tokens)
            wrong += not error < 1e-2
            print(f"{recipe} {tokens} tokens, {'tuned' if routes is None else 'many tokens'}: {error:.1e}", flush=True)
        for tokens in TOKENS:
            error = check_calibration(tokens)
            wrong += not error < 1e-2
            print(f"calibration, {tokens} tokens: {error:.1e}", flush=True)
    torch.cuda.synchronize()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
