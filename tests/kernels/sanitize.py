"""Runs the kernels of weights and of quantized products at odd shapes, for NVIDIA's checkers of accesses and races:

    compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck python tests/kernels/sanitize.py

Triton's kernels and, where it is built, the CUDA extension's. PYTORCH_NO_CUDA_MEMORY_CACHING=1 in front lets memcheck
see the end of every tensor; `--part 0/4` runs every fourth check. Needs a GPU; exits with 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import qrealign_kernels as kernels
from qrealign_kernels import cuda, launches, reference_linear
from qrealign_kernels.launches import Choice
from qrealign_kernels.reference_calibration import WeightTransform, encode_weight_ref, fake_quant_edited_weight_ref

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
MANY = {"linear_routes": {"INT8_FEW": 0, "INT4_FEW": 0}}  # the way of many tokens, at few
DECODE_CUTS = [{"WARPS": warps, "ROW_TILES": tiles, "STAGES": 2} for warps, tiles in ((4, 1), (8, 2))]
TILE_CUTS = [
    {"TOKENS": tokens, "SHARED_ROWS": shared, "CLUSTER": cluster}
    for tokens, shared, cluster in ((64, 1, 1), (128, 1, 2), (128, 0, 1), (256, 0, 2))
]
LEARNED = [(False, False), (True, False), (True, True)]  # column scale, row divisor
Check = tuple[str, dict[str, Choice], Callable[[], float]]


def product(
    bits: int, activation_bits: int | None, group: int | None, symmetric: bool, tokens: int, out: torch.dtype
) -> float:
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
    return error_of(kernels.packed_linear(x, packed, bias, out_dtype=out), want)


def calibration_products(tokens: int) -> float:
    """Return the larger relative error of the integer forward and of its input gradient."""
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8, device="cuda")
    scale, x_scale = torch.rand(ROWS, 3, device="cuda"), torch.rand(tokens, 1, device="cuda")
    zero_point = torch.randint(-128, 128, scale.shape, dtype=torch.int8, device="cuda")
    x = torch.randint(-128, 128, (tokens, COLUMNS), dtype=torch.int8, device="cuda")
    grad = torch.randn(tokens, ROWS, device="cuda", dtype=torch.bfloat16)
    out = kernels.int8_matmul(x, x_scale, codes, scale, None, torch.float32, zero_point=zero_point)
    want = reference_linear.int8_matmul_ref(x, x_scale, codes, scale, zero_point, out_dtype=torch.float32)
    dx = kernels.int8_matmul_dx(grad, codes, scale, zero_point)
    return max(
        error_of(out, want), error_of(dx, reference_linear.int8_matmul_dx_ref(grad.float(), codes, scale, zero_point))
    )


def weight(columns: int, group: int | None, scaled: bool, divided: bool) -> float:
    """Return the largest relative error of a rounded weight, its codes and its gradients."""
    kind: dict[str, Any] = {"num_bits": 8, "group_size": group}
    w = (torch.randn(ROWS, columns, device="cuda") * 0.02).bfloat16()
    leaves = {
        "low_logit": torch.randn(ROWS, columns // (group or columns), device="cuda") + 3,
        "high_logit": torch.randn(ROWS, columns // (group or columns), device="cuda") + 3,
    }
    if scaled:
        leaves["column_scale"] = torch.rand(columns, device="cuda") + 0.5
    if divided:
        leaves["row_divisor"] = torch.rand(ROWS, device="cuda") + 0.5
    for leaf in leaves.values():
        leaf.requires_grad_()
    logits = {name: leaves[name] for name in ("low_logit", "high_logit")}
    transform = WeightTransform(leaves.get("column_scale"), leaves.get("row_divisor"))
    got = kernels.fake_quant_weight(w, **leaves, **kind, out_dtype=torch.bfloat16)
    want = fake_quant_edited_weight_ref(w, **logits, transform=transform, **kind)
    codes = kernels.encode_weight(w, **leaves, **kind)[0]
    expected_codes = encode_weight_ref(w, **logits, transform=transform, **kind)[0]
    grad = torch.randn_like(w)
    found = torch.autograd.grad(got, list(leaves.values()), grad)
    expected = torch.autograd.grad(want, list(leaves.values()), grad.float())
    errors = [error_of(one, other) for one, other in zip(found, expected, strict=True)]
    return max(error_of(got, want), error_of(codes, expected_codes), *errors)


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the relative error."""
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def checks() -> Iterator[Check]:
    """Yield what to run: a name, the launches to force, and the check."""
    many: list[dict[str, Choice]] = [{}, MANY]
    for forced, recipe, tokens in itertools.product(many, RECIPES, TOKENS):
        yield f"{recipe} {tokens} tokens, {list(forced)}", forced, partial(product, *recipe, tokens, torch.float32)
    for tokens in TOKENS:
        yield f"calibration, {tokens} tokens", {}, partial(calibration_products, tokens)
    for learned in LEARNED:
        for columns, group in ((1160, None), (COLUMNS, 128), (5144, None)):
            yield f"weight of {columns}, {group}, {learned}", {}, partial(weight, columns, group, *learned)
    if cuda.unavailable_reason() is not None:
        return
    for cut, tokens in itertools.product(DECODE_CUTS, (1, 9, 16)):
        for table, recipe in (
            ("cuda_int8", RECIPES[0]),
            ("cuda_int4", RECIPES[2]),
            ("cuda_int4", (4, None, 128, False)),
        ):
            yield f"{table} {cut} {tokens} tokens", {table: cut}, partial(product, *recipe, tokens, torch.bfloat16)
    if torch.cuda.get_device_capability()[0] == 9:
        for cut, symmetric in itertools.product(TILE_CUTS, (True, False)):
            recipe = (4, None, 128, symmetric)
            yield f"cuda_int4_tile {cut}", {"cuda_int4_tile": cut}, partial(product, *recipe, 139, torch.bfloat16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="only every N-th check, from the I-th on")
    first, step = map(int, parser.parse_args().part.split("/"))
    torch.manual_seed(0)
    wrong = 0
    with kernels.use_backend("triton"):
        for name, forced, check in itertools.islice(checks(), first, None, step):
            with contextlib.ExitStack() as stack:
                for table, launch in forced.items():
                    stack.enter_context(launches.forced(table, launch))
                error = check()
            wrong += not error < 1e-2
            print(f"{name}: {error:.1e}", flush=True)
    torch.cuda.synchronize()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
