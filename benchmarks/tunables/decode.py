"""Launch candidates of the CUDA extension's decode kernels, timed over the layers of a 7B model together."""

from __future__ import annotations

from itertools import product

from benchmarks.tunables.products import product_calls
from benchmarks.tunables.tunable import Calls, Tunable
from qrealign_kernels.launches import Choice

SHARED_BYTES = 220 * 2**10  # of a block on a GPU for servers; smaller ones take what fits them, and the default table
ROW_BYTES = 144  # of a unit of a row in shared memory: kUnitStride in csrc/cuda/device.cuh
KEYS = {f"m{tokens}": (tokens,) for tokens in (1, 2, 4, 8, 16)}


def candidates(stages: tuple[int, ...]) -> list[Choice]:
    """Return every cut that was compiled and fits."""
    return [
        {"WARPS": warps, "ROW_TILES": tiles, "STAGES": depth}
        for warps, tiles, depth in product((4, 8, 16), (1, 2), stages)
        if warps * 16 * tiles * depth * ROW_BYTES <= SHARED_BYTES
    ]


def int4_calls(tokens: int) -> Calls:
    """Return calls of 4-bit weights and floating point tokens."""
    return product_calls(4, None, tokens)


def int8_calls(tokens: int) -> Calls:
    """Return calls of 8-bit weights and tokens, which are codes already unless it is a single one."""
    return product_calls(8, 8, tokens)


TUNABLES = (
    Tunable(name="cuda_int4", keys=KEYS, candidates=lambda key: candidates((2, 3)), make_calls=int4_calls),
    Tunable(name="cuda_int8", keys=KEYS, candidates=lambda key: candidates((2, 4)), make_calls=int8_calls),
)
