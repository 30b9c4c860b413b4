"""Runs every kernel at odd shapes, for NVIDIA's checkers of accesses and races:

    compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck python tests/kernels/sanitize.py

Triton's kernels and, where it is built, the CUDA extension's. PYTORCH_NO_CUDA_MEMORY_CACHING=1 in front lets memcheck
see the end of every tensor; `--part 0/4` runs every fourth check. Needs a GPU; exits with 1 if a result is wrong.
`test_sanitize.py` fails where a kernel is missing here.
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
from qrealign_kernels import cuda, launches, reference, reference_attention, reference_block, reference_linear
from qrealign_kernels import reference_calibration as definitions
from qrealign_kernels.launches import Choice
from qrealign_kernels.reference_calibration import WeightTransform

MANY_ROWS = 12900  # more tiles than the blocks of a launch keep in flight
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
    {"TOKENS": tokens, "ROWS": rows, "CLUSTER": cluster, "SPLIT": split}
    for tokens, rows, cluster, split in (
        (64, 64, 1, 0),
        (128, 64, 2, 0),
        (128, 64, 1, 1),
        (128, 128, 1, 0),
        (128, 192, 1, 1),
        (256, 128, 2, 0),
        (256, 128, 2, 1),
    )
]
LEARNED = [(False, False, 0), (True, False, 0), (True, True, 0), (True, True, 2), (False, False, 16)]
IN_PRODUCT = {"product_gradients_bwd": {"BLOCK_M": 64, "BLOCK_N": 64, "AHEAD": 3, "num_warps": 8, "TOKENS": 64}}
EPS = 1e-5
Check = tuple[str, dict[str, Choice | None], Callable[[], float]]


def product(
    bits: int,
    activation_bits: int | None,
    group: int | None,
    symmetric: bool,
    tokens: int,
    out: torch.dtype,
    rows: int = ROWS,
) -> float:
    """Return the relative error of one product against its definition."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    groups = COLUMNS // (group or COLUMNS)
    codes = torch.randint(low, high, (rows, COLUMNS), dtype=torch.int8)
    scale = (torch.rand(rows, groups) * 0.01 + 0.001).bfloat16().float()
    zero_point = None if symmetric else torch.randint(low, high, scale.shape, dtype=torch.int8)
    x = torch.randn(tokens, COLUMNS, dtype=torch.bfloat16)
    bias = torch.randn(rows, dtype=torch.bfloat16)
    kind = {"num_bits": bits, "activation_bits": activation_bits}
    packed = kernels.repack_weight(codes, scale, zero_point, **kind)
    plain = reference_linear.repack_weight_ref(codes, scale, zero_point, **kind)
    want = reference_linear.packed_linear_ref(x, plain, bias, torch.float32)
    return error_of(kernels.packed_linear(x, packed, bias, out_dtype=out), want)


def calibration_products(tokens: int) -> float:
    """Return the larger relative error of the integer forward and of its input gradient."""
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8)
    scale, x_scale = torch.rand(ROWS, 3), torch.rand(tokens, 1)
    zero_point = torch.randint(-128, 128, scale.shape, dtype=torch.int8)
    x = torch.randint(-128, 128, (tokens, COLUMNS), dtype=torch.int8)
    grad = torch.randn(tokens, ROWS, dtype=torch.bfloat16)
    out = kernels.int8_matmul(x, x_scale, codes, scale, None, torch.float32, zero_point=zero_point)
    want = reference_linear.int8_matmul_ref(x, x_scale, codes, scale, zero_point, out_dtype=torch.float32)
    dx = kernels.int8_matmul_dx(grad, codes, scale, zero_point)
    return max(
        error_of(out, want), error_of(dx, reference_linear.int8_matmul_dx_ref(grad.float(), codes, scale, zero_point))
    )


def random_leaves(columns: int, group: int | None, scaled: bool, divided: bool, rank: int) -> dict[str, torch.Tensor]:
    """Return what a weight's rounding learns, by the names of the ops' arguments."""
    shape = (ROWS, columns // (group or columns))
    leaves = {"low_logit": torch.randn(shape) + 3, "high_logit": torch.randn(shape) + 3}
    if scaled:
        leaves["column_scale"] = torch.rand(columns) + 0.5
    if divided:
        leaves["row_divisor"] = torch.rand(ROWS) + 0.5
    if rank:
        leaves |= {"left": torch.randn(ROWS, rank) * 0.01, "right": torch.randn(rank, columns) * 0.01}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def by_definition(leaves: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the same as the definitions take it."""
    logits = {name: leaves[name] for name in ("low_logit", "high_logit")}
    return logits | {"transform": WeightTransform(*(leaves.get(name) for name in WeightTransform._fields))}


def weight(columns: int, group: int | None, scaled: bool, divided: bool, rank: int) -> float:
    """Return the largest relative error of a rounded weight, its codes and its gradients."""
    kind: dict[str, Any] = {"num_bits": 8, "group_size": group}
    w = (torch.randn(ROWS, columns) * 0.02).bfloat16()
    leaves = random_leaves(columns, group, scaled, divided, rank)
    got = kernels.fake_quant_weight(w, **leaves, **kind, out_dtype=torch.bfloat16)
    want = definitions.fake_quant_edited_weight_ref(w, **by_definition(leaves), **kind)
    codes = kernels.encode_weight(w, **leaves, **kind)[0]
    expected_codes = definitions.encode_weight_ref(w, **by_definition(leaves), **kind)[0]
    grad = torch.randn_like(w)
    found = torch.autograd.grad(got, list(leaves.values()), grad)
    expected = torch.autograd.grad(want, list(leaves.values()), grad.float())
    errors = map(error_of, (got, codes, *found), (want, expected_codes, *expected))
    return max(errors)


def reduced_gradient(scaled: bool, divided: bool) -> float:
    """Return the largest relative error of a weight gradient that is consumed where it is made."""
    kind: dict[str, Any] = {"num_bits": 8, "group_size": 128}
    w = (torch.randn(ROWS, COLUMNS) * 0.02).bfloat16()
    leaves = random_leaves(COLUMNS, 128, scaled, divided, 0)
    grad, x = torch.randn(37, ROWS).bfloat16(), torch.randn(37, COLUMNS).bfloat16()
    got = kernels.reduced_weight_gradient(grad, x, w, **leaves, **kind)
    want = definitions.reduced_weight_gradient_ref(
        grad.float(), x.float(), w, **by_definition(leaves), **kind, symmetric=True, scale_dtype=torch.bfloat16
    )
    pairs = zip(got, want, strict=True)
    return max(error_of(one, other) for one, other in pairs if one is not None and other is not None)


def edit_gradients(rank: int, coded: bool) -> float:
    """Return the largest relative error of the gradients of an edit of a linear layer's weight."""
    x, scale = torch.randn(37, 1160).bfloat16(), None
    if coded:
        x, scale = reference.quantize_per_token_ref(x)
    given = (torch.randn(37, ROWS).bfloat16(), x, torch.randn(ROWS, rank), torch.randn(rank, 1160), scale)
    pairs = zip(kernels.low_rank_gradients(*given), definitions.low_rank_gradients_ref(*given), strict=True)
    return max(error_of(one, other) for one, other in pairs)


def turned_heads(heads: int, width: int) -> float:
    """Return the larger relative error of turned heads and of their gradient."""
    x = torch.randn(2, 19, heads, width).bfloat16().transpose(1, 2).requires_grad_()
    cos, sin = torch.rand(2, 1, 19, width).bfloat16()
    turned, grad = kernels.rotate_heads(x, cos, sin), torch.randn(2, heads, 19, width).bfloat16()
    (found,) = torch.autograd.grad(turned, x, grad)
    wanted = definitions.rotate_heads_ref(grad, cos, sin, transposed=True)
    return max(error_of(turned, definitions.rotate_heads_ref(x, cos, sin)), error_of(found, wanted))


def tokens_alone(columns: int) -> float:
    """Return the largest relative error of rounded tokens, alone and behind a gate or an RMS norm, and of gradients."""
    x, gate, up = (torch.randn(5, columns).bfloat16().requires_grad_() for _ in range(3))
    norm = (torch.rand(columns) + 0.5).bfloat16().requires_grad_()
    grad = torch.randn(5, columns).bfloat16()
    normed, gated = kernels.rms_norm_fake_quant(x, norm, EPS), kernels.silu_mul_fake_quant(gate, up)
    pairs = [
        (kernels.quantize_per_token(x)[0], reference.quantize_per_token_ref(x)[0]),
        (kernels.fake_quant_per_token(x), reference.fake_quant_per_token_ref(x)),
        (kernels.rms_norm_quantize(x, norm, EPS).codes, definitions.rms_norm_quantize_ref(x, norm, EPS)[0]),
        (kernels.silu_mul_quantize(gate, up).codes, definitions.silu_mul_quantize_ref(gate, up)[0]),
        (normed, definitions.rms_norm_fake_quant_ref(x, norm, EPS)),
        (gated, definitions.silu_mul_fake_quant_ref(gate, up)),
        *zip(
            torch.autograd.grad(normed, (x, norm), grad),
            definitions.rms_norm_gradients(grad, x.detach(), norm.detach(), EPS, offset=0.0),
            strict=True,
        ),
        *zip(
            torch.autograd.grad(gated, (gate, up), grad),
            definitions.silu_mul_gradients(grad, gate.detach(), up.detach()),
            strict=True,
        ),
    ]
    return max(error_of(one, other) for one, other in pairs)


def step_between_products(columns: int, offset: float) -> float:
    """Return the largest relative error of what a decoder block does to one step's tokens outside of attention."""
    x, branch = (torch.randn(3, columns).bfloat16() for _ in range(2))
    norm = (torch.rand(columns) + 0.5).bfloat16()
    gate, up = torch.randn(3, 2 * columns).bfloat16().chunk(2, dim=1)
    total, codes = kernels.add_rms_norm_quantize(x, branch, norm, EPS, offset=offset)
    got = [*kernels.add_rms_norm(x, branch, norm, EPS, offset=offset), total, codes.codes, codes.scale]
    want = [
        *reference_block.add_rms_norm_ref(x, branch, norm, EPS, offset=offset),
        *reference_block.add_rms_norm_quantize_ref(x, branch, norm, EPS, offset=offset),
    ]
    got += [kernels.add_rms_norm(x, None, norm, EPS, offset=offset)[1], kernels.silu_mul(gate, up)]
    want += [reference_block.add_rms_norm_ref(x, None, norm, EPS, offset=offset)[1], definitions.silu_mul_ref(gate, up)]
    return max(map(error_of, got, want))


def attention(op: str, heads: int, groups: int, size: int, masked: bool, coded: bool) -> float:
    """Return the largest relative error of an op's attention over a cache and of what it leaves in the buffers."""
    device, length, tokens = torch.get_default_device(), 133, () if op == "decode_attention" else (19,)
    with torch.device("cpu"):  # where the definition is computed: racecheck takes minutes over the library's products
        states = torch.randn(3, *tokens, heads + 2 * groups, size).bfloat16()
        turns = torch.rand(2, 3, *tokens, size).bfloat16()
        buffers = dict(zip(("keys", "values"), torch.randn(2, 3, groups, length, size).bfloat16(), strict=True))
        mask = torch.rand(3, *tokens, length) < 0.5 if masked else None
        each = torch.tensor([0, 57, 132 - sum(tokens)])
        places = (each[:, None] + torch.arange(*tokens) if tokens else each, torch.tensor([57]))
    if coded:
        for name, scale in (("keys", "key_scale"), ("values", "value_scale")):
            buffers[name], scales = reference.quantize_per_token_ref(buffers[name])
            buffers[scale] = scales[..., 0].contiguous()

    def attend(call: Callable[..., torch.Tensor], held: dict[str, torch.Tensor]) -> torch.Tensor:
        where = held["cells"].device
        new = kernels.TokenStates(*states.to(where).split([heads, groups, groups], dim=-2), *turns.to(where))
        place = kernels.CachePlace(**held, length=length, advance=len(held["cells"]) == 1)
        return call(new, place, None if mask is None else mask.to(where), scaling=size**-0.5)

    errors = []
    for cells in places:
        tensors = buffers | {"cells": cells}
        ours = {name: held.to(device, copy=True) for name, held in tensors.items()}
        theirs = {name: held.clone() for name, held in tensors.items()}
        got = attend(getattr(kernels, op), ours)
        want = attend(getattr(reference_attention, f"{op}_ref"), theirs)
        pairs = zip((got, *ours.values()), (want, *theirs.values()), strict=True)
        errors += [error_of(one.cpu(), other) for one, other in pairs]
    return max(errors)


def rows_of_the_host() -> float:
    """Return the relative error of rows that are gathered from pinned memory."""
    table, indices = torch.randn(7, 1160, device="cpu").bfloat16(), torch.tensor([[6, 0, 3]])
    table = table.pin_memory() if indices.is_cuda else table
    return error_of(kernels.gather_rows(table, indices).cpu(), table[indices.cpu()])


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the relative error."""
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def checks() -> Iterator[Check]:
    """Yield what to run: a name, the launches to force, and the check."""
    many: list[dict[str, Choice | None]] = [{}, {**MANY}]
    for forced, recipe, tokens in itertools.product(many, RECIPES, TOKENS):
        yield f"{recipe} {tokens} tokens, {list(forced)}", forced, partial(product, *recipe, tokens, torch.float32)
    for tokens in TOKENS:
        yield f"calibration, {tokens} tokens", {}, partial(calibration_products, tokens)
    for learned, (columns, group) in itertools.product(LEARNED, ((1160, None), (COLUMNS, 128), (5144, None))):
        yield f"weight of {columns}, {group}, {learned}", {}, partial(weight, columns, group, *learned)
    for scaled, divided, forced in ((True, True, {}), (True, True, IN_PRODUCT), (False, False, IN_PRODUCT)):
        yield f"reduced gradient, {scaled}, {list(forced)}", forced, partial(reduced_gradient, scaled, divided)
    for columns in (1160, 5144):
        yield f"tokens of {columns}", {}, partial(tokens_alone, columns)
        for offset in (0.0, 1.0):
            yield f"step of {columns}, {offset}", {}, partial(step_between_products, columns, offset)
    for rank, coded in ((2, True), (3, False)):
        yield f"gradients of an edit of rank {rank}", {}, partial(edit_gradients, rank, coded)
    for heads, width in ((5, 24), (20, 128)):
        yield f"{heads} heads of {width}, turned", {}, partial(turned_heads, heads, width)
    yield "rows of the host", {}, rows_of_the_host
    shapes, ops = ((6, 2, 40), (4, 4, 128), (7, 1, 64)), ("decode_attention", "prompt_attention")
    for op, shape, masked, coded in itertools.product(ops, shapes, (False, True), (False, True)):
        yield f"{op} {shape}, {masked}, {coded}", {}, partial(attention, op, *shape, masked, coded)
    if cuda.unavailable_reason() is not None:
        return
    for cut, tokens in itertools.product(DECODE_CUTS, (1, 9, 16)):
        for table, recipe in (
            ("cuda_int8", RECIPES[0]),
            ("cuda_int4", RECIPES[2]),
            ("cuda_int4", (4, None, 128, False)),
        ):
            forced = {table: cut, f"{table}_held": None}
            yield f"{table} {cut} {tokens} tokens", forced, partial(product, *recipe, tokens, torch.bfloat16)
    for (tokens, symmetric), stages in itertools.product(((3, True), (9, True), (16, False)), (3, 5)):
        for table, recipe in (("cuda_int4", (4, None, 128, symmetric)), ("cuda_int8", RECIPES[0])):
            held = {f"{table}_held": {"WARPS": 16, "ROW_TILES": 0, "STAGES": stages}}
            yield f"{held} {tokens} tokens", held, partial(product, *recipe, tokens, torch.bfloat16, MANY_ROWS)
    if torch.cuda.get_device_capability()[0] == 9:
        for cut, symmetric in itertools.product(TILE_CUTS, (True, False)):
            recipe = (4, None, 128, symmetric)
            yield f"cuda_int4_tile {cut}", {"cuda_int4_tile": cut}, partial(product, *recipe, 139, torch.bfloat16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="only every N-th check, from the I-th on")
    parser.add_argument("--only", default="", metavar="WORDS", help="only checks with these words in their names")
    args = parser.parse_args()
    first, step = map(int, args.part.split("/"))
    chosen = [check for check in checks() if args.only in check[0]]
    torch.manual_seed(0)
    wrong = 0
    with kernels.use_backend("triton"), torch.device("cuda"):
        for name, forced, check in chosen[first::step]:
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
