"""Launch candidates of the quantized linear products, and the calls that time them, at the shapes of Llama-2-7B."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch

import qrealign_kernels as kernels
from benchmarks.timing import rotations
from benchmarks.tunables.tunable import Calls, Tunable
from qrealign_kernels import launches, triton_linear
from qrealign_kernels.launches import Choice
from qrealign_kernels.quantized import QuantizedActivations

NARROW, WIDE, LONG = (4096, 4096), (4096, 11008), (11008, 4096)  # (K, N)
GROUP = 128
FEW_TOKENS = 16
# Key -> tokens, and the layers that it serves, all of which are timed.
GEMV_KEYS = {"k4096": (1, NARROW), "k4096-wide": (1, WIDE), "k16384": (1, LONG)}
FEW_KEYS = {
    f"m{tokens}{suffix}": (tokens, *shapes)
    for tokens in (2, 4, 8, 16, 32, 64)
    for suffix, shapes in (("", (NARROW, LONG)), ("-wide", (WIDE,)), ("-long", (LONG,)))
}
TILE_KEYS = {f"m{tokens}": (tokens, NARROW, WIDE, LONG) for tokens in (32, 64, 128, 256, 512, 1024, 2048, 4096)}


def product_calls(num_bits: int, activation_bits: int | None, tokens: int, *shapes: tuple[int, int]) -> Calls:
    """Return calls of the product over layers (default: all); a few tokens are rounded in the call."""
    calls: Calls = []
    shapes = shapes or (NARROW, WIDE, LONG)
    for columns, rows in shapes:
        groups = 1 if num_bits == 8 else columns // GROUP
        for _ in range(rotations(sum(k * n for k, n in shapes) * num_bits // 8)):
            low, high = -(1 << (num_bits - 1)), 1 << (num_bits - 1)
            codes = torch.randint(low, high, (rows, columns), dtype=torch.int8, device="cuda")
            scale = (torch.rand(rows, groups, device="cuda") + 0.1).bfloat16()
            weight = kernels.repack_weight(codes, scale, num_bits=num_bits, activation_bits=activation_bits)
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            if activation_bits is None or tokens <= FEW_TOKENS:
                calls.append(partial(kernels.packed_linear, x, weight))
            else:
                codes_of_x = QuantizedActivations(*kernels.quantize_per_token(x, num_bits=activation_bits), x.dtype)
                calls.append(partial(kernels.packed_linear, codes_of_x, weight))
    return calls


def routed_calls(num_bits: int, activation_bits: int | None, few: bool, tokens: int, *shapes: tuple[int, int]) -> Calls:
    """Return the same calls, held to the kernel for few tokens or to tiles, whichever the tables would take."""
    limit = tokens if few else 0
    routes = {"INT8_FEW": limit, "INT4_FEW": limit}

    def run(call: Callable[[], object]) -> object:
        with launches.forced("linear_routes", routes):
            return call()

    return [partial(run, call) for call in product_calls(num_bits, activation_bits, tokens, *shapes)]


def gemv_candidates(key: str) -> list[Choice]:
    """Return tiles of one token's kernels: rows of a program by threads along K."""
    return [
        {"BLOCK_N": rows, "THREADS": threads, "num_warps": threads // 32}
        for rows, threads in itertools.product((2, 4, 8, 16), (64, 128, 256, 512))
        if rows * threads <= 8192
    ]


def int8_few_candidates(key: str) -> list[Choice]:
    """Return tiles whose stages fit the shared memory of a GPU for servers."""
    tokens = triton_linear.few_tokens(key)["BLOCK_M"]
    return [
        {"SPLIT": split, "BLOCK_N": rows, "BLOCK_K": k, "AHEAD": 0, "num_warps": warps, "num_stages": stages}
        for split, rows, k, warps, stages in itertools.product((2, 4, 8), (16, 32), (64, 128, 256), (4, 8), (3, 4, 6))
        if warps >= split and 2**16 <= split * (rows + tokens) * k * stages <= 2**18
    ]


def int4_few_candidates(key: str) -> list[Choice]:
    """Return tiles whose stages fit the shared memory of a GPU for servers."""
    tokens = triton_linear.few_tokens(key)["BLOCK_M"]
    return [
        {"SPLIT": split, "BLOCK_N": rows, "AHEAD": ahead, "num_warps": warps, "num_stages": stages}
        for split, rows, ahead, warps, stages in itertools.product((2, 4, 8, 16), (16, 32), (0, 16), (4, 8), (2, 3))
        if split * (rows * 128 + tokens * 512) * (stages - 1) <= 2**18
    ]


def int8_tile_candidates(key: str) -> list[Choice]:
    """Return tiles of integer products for many tokens."""
    tokens = int(key[1:])
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "STRIP": strip, "num_warps": warps, "num_stages": stages}
        for m, n, k, strip, warps, stages in itertools.product(
            (32, 64, 128), (64, 128), (128, 256), (4, 8), (4, 8), (3, 4, 5)
        )
        if m <= tokens and (m + n) * k * stages <= 2**18
    ]


TUNABLES = (
    Tunable(name="int8_gemv", keys=GEMV_KEYS, candidates=gemv_candidates, make_calls=partial(product_calls, 8, 8)),
    Tunable(name="int4_gemv", keys=GEMV_KEYS, candidates=gemv_candidates, make_calls=partial(product_calls, 4, 8)),
    Tunable(
        name="int4_float_gemv",
        keys=GEMV_KEYS,
        candidates=gemv_candidates,
        make_calls=partial(product_calls, 4, None),
    ),
    Tunable(
        name="int4_fixed_gemv",
        keys=GEMV_KEYS,
        candidates=gemv_candidates,
        make_calls=partial(product_calls, 4, None),
    ),
    Tunable(
        name="int8_few",
        keys=FEW_KEYS,
        candidates=int8_few_candidates,
        make_calls=partial(routed_calls, 8, 8, True),
    ),
    Tunable(
        name="int4_few",
        keys=FEW_KEYS,
        candidates=int4_few_candidates,
        make_calls=partial(routed_calls, 4, None, True),
    ),
    Tunable(
        name="int4_int_few",
        keys=FEW_KEYS,
        candidates=int4_few_candidates,
        make_calls=partial(routed_calls, 4, 8, True),
    ),
    Tunable(
        name="int8_tile",
        keys=TILE_KEYS,
        candidates=int8_tile_candidates,
        make_calls=partial(routed_calls, 8, 8, False),
    ),
    Tunable(
        name="int8_group_tile",
        keys={key: TILE_KEYS[key] for key in ("m1024", "m4096")},
        candidates=int8_tile_candidates,
        make_calls=partial(routed_calls, 4, 8, False),
    ),
)
