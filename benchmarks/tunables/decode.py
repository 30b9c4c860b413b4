"""Launch candidates of the CUDA extension's products, timed over the layers of a 7B model together."""

from __future__ import annotations

from itertools import product

from benchmarks.tunables.products import LONG, NARROW, WIDE, product_calls
from benchmarks.tunables.tunable import Calls, Tunable
from qrealign_kernels.launches import Choice

SHARED_BYTES = 220 * 2**10  # of a block on a GPU for servers; smaller ones take what fits them, and the default table
ROW_BYTES = 144  # of a unit of a row in shared memory: kUnitStride in csrc/cuda/device.cuh
KEYS, TILE_KEYS = (
    {
        f"m{tokens}{suffix}": (tokens, shape)
        for tokens in numbers
        for suffix, shape in (("", NARROW), ("-wide", WIDE), ("-long", LONG))
    }
    for numbers in ((2, 4, 8, 16), (64, 128, 256, 512, 1024, 2048, 4096))
)
HELD_KEYS = {key: arguments for key, arguments in KEYS.items() if not key.endswith("-long")}
TILES = (
    *((64, 64, 1, 0), (128, 64, 1, 0), (128, 64, 1, 1), (128, 64, 2, 0), (128, 128, 1, 0), (128, 128, 1, 1)),
    *((128, 192, 1, 0), (128, 192, 1, 1), (128, 192, 2, 0), (128, 192, 2, 1)),
    *((256, 128, 1, 0), (256, 128, 1, 1), (256, 128, 2, 0), (256, 128, 2, 1)),
)


def tile_candidates(key: str) -> list[Choice]:
    """Return every tile that was compiled and that the tokens fill at least by half."""
    tokens = int(key.partition("-")[0][1:])
    names = ("TOKENS", "ROWS", "CLUSTER", "SPLIT")
    return [dict(zip(names, cut, strict=True)) for cut in TILES if cut[0] <= 2 * tokens]


def candidates(stages: tuple[int, ...]) -> list[Choice]:
    """Return every cut that was compiled and fits."""
    return [
        {"WARPS": warps, "ROW_TILES": tiles, "STAGES": depth}
        for warps, tiles, depth in product((4, 8, 16), (1, 2), stages)
        if warps * 16 * tiles * depth * ROW_BYTES <= SHARED_BYTES
    ]


def held_candidates(key: str) -> list[Choice]:
    """Return the cuts whose warps hold the tokens."""
    return [{"WARPS": 16, "ROW_TILES": 0, "STAGES": stages} for stages in (3, 5)]


def int4_calls(tokens: int, *shapes: tuple[int, int]) -> Calls:
    """Return calls of 4-bit weights of some shapes and floating point tokens."""
    return product_calls(4, None, tokens, *shapes)


def int8_calls(tokens: int, *shapes: tuple[int, int]) -> Calls:
    """Return calls of 8-bit weights of some shapes and tokens."""
    return product_calls(8, 8, tokens, *shapes)


TUNABLES = (
    Tunable(
        name="cuda_int4",
        keys=KEYS,
        candidates=lambda key: candidates((2, 3)),
        make_calls=int4_calls,
        optional=True,
    ),
    Tunable(
        name="cuda_int4_held",
        keys=HELD_KEYS,
        candidates=held_candidates,
        make_calls=int4_calls,
        optional=True,
    ),
    Tunable(
        name="cuda_int8_held",
        keys=KEYS,
        candidates=held_candidates,
        make_calls=int8_calls,
        optional=True,
    ),
    Tunable(
        name="cuda_int8",
        keys=KEYS,
        candidates=lambda key: candidates((2, 4)),
        make_calls=int8_calls,
        optional=True,
    ),
    Tunable(name="cuda_int4_tile", keys=TILE_KEYS, candidates=tile_candidates, make_calls=int4_calls, optional=True),
)
