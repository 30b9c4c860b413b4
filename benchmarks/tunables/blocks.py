"""Launch candidates of the kernels of a decoding step beside its products, at the sizes of a 7B model."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch

import qrealign_kernels as kernels
from benchmarks.timing import rotations
from benchmarks.tunables.tunable import Calls, Tunable
from qrealign_kernels.launches import Choice

HEAD_SIZE, CELLS, FILLED = 128, 2048, 1100
# Key -> rows, heads of queries and heads of keys, and whether the cache holds codes.
_SIZES = {"p8": (1, 32, 8), "p32": (1, 32, 32), "p64": (8, 32, 8), "p256": (8, 32, 32), "p1024": (32, 32, 32)}
ATTENTION = {
    f"{key}{'-codes' if codes else ''}": (*sizes, codes) for key, sizes in _SIZES.items() for codes in (False, True)
}
PROMPTS = {"plain": (False,), "codes": (True,)}
PIECE = 512  # tokens of a prompt, behind as many
GATE = {"few": (1, 11008), "default": (1024, 11008)}


def attention_candidates(key: str) -> list[Choice]:
    """Return cuts into 1 to 32 runs by tiles of 32 to 128 cells, fewer runs where rows and heads are many."""
    pairs = int(key[1:].partition("-")[0])
    return [
        {"SPLITS": splits, "BLOCK_S": cells, "num_warps": warps, "num_stages": stages}
        for splits, cells, warps, stages in product((1, 2, 4, 8, 16, 32), (32, 64, 128), (2, 4, 8), (2, 3))
        if 128 <= splits * pairs <= 1024 and 16 <= cells // warps <= 32
    ]


def _place(batch: int, groups: int, first: int, codes: bool) -> kernels.CachePlace:
    """Return a cache of random keys and values whose rows go on at the cell `first`."""
    shape, cells = (batch, groups, CELLS, HEAD_SIZE), torch.full((1,), first, device="cuda")
    if not codes:
        keys, values = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
        return kernels.CachePlace(keys, values, cells, CELLS)
    keys, values = torch.randint(-128, 128, (2, *shape), device="cuda", dtype=torch.int8)
    key_scale, value_scale = torch.rand(2, *shape[:3], device="cuda") / 64
    return kernels.CachePlace(keys, values, cells, CELLS, key_scale, value_scale)


def attention_calls(batch: int, heads: int, groups: int, codes: bool) -> Calls:
    """Return steps of all rows in a half-filled cache; the mask of padding is read as in generation."""
    count = rotations(2 * batch * groups * FILLED * HEAD_SIZE * (1 if codes else 2))
    calls: Calls = []
    for _ in range(count):
        states = torch.randn(batch, heads + 2 * groups, HEAD_SIZE, device="cuda").bfloat16()
        query, key, value = states.split([heads, groups, groups], dim=1)
        turn = torch.rand(1, HEAD_SIZE, device="cuda").bfloat16().expand(batch, -1)
        calls.append(
            partial(
                kernels.decode_attention,
                kernels.TokenStates(query, key, value, turn, turn),
                _place(batch, groups, FILLED, codes),
                torch.ones(batch, CELLS, device="cuda", dtype=torch.bool),
                scaling=HEAD_SIZE**-0.5,
            )
        )
    return calls


def prompt_candidates(key: str) -> list[Choice]:
    """Return tiles of 64 or 128 tokens by 32 to 128 cells."""
    return [
        {"BLOCK_T": tokens, "BLOCK_S": cells, "num_warps": warps, "num_stages": stages}
        for tokens, cells, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3))
        if tokens // warps >= 8
    ]


def prompt_calls(codes: bool) -> Calls:
    """Return pieces of a prompt of one row behind a piece that was read before; the mask is read as in generation."""
    heads, states = 32, torch.randn(1, PIECE, 3 * 32, HEAD_SIZE, device="cuda").bfloat16()
    query, key, value = states.split(heads, dim=2)
    turn = torch.rand(1, PIECE, HEAD_SIZE, device="cuda").bfloat16()
    seen = torch.arange(CELLS, device="cuda") <= torch.arange(PIECE, 2 * PIECE, device="cuda")[None, :, None]
    return [
        partial(
            kernels.prompt_attention,
            kernels.TokenStates(query, key, value, turn, turn),
            _place(1, heads, PIECE, codes),
            seen,
            scaling=HEAD_SIZE**-0.5,
        )
        for _ in range(rotations(4 * heads * PIECE * HEAD_SIZE * (1 if codes else 2)))
    ]


def gate_candidates(key: str) -> list[Choice]:
    """Return tiles of a row."""
    return [
        {"BLOCK_C": columns, "num_warps": warps}
        for columns, warps in product((128, 256, 512, 1024, 2048), (1, 2, 4, 8))
        if 2 <= columns // (32 * warps) <= 16
    ]


def gate_calls(tokens: int, columns: int) -> Calls:
    """Return calls on the halves of a joined product's result."""
    halves = [
        torch.randn(tokens, 2 * columns, device="cuda").bfloat16().split(columns, dim=-1)
        for _ in range(rotations(6 * tokens * columns))
    ]
    return [partial(kernels.silu_mul, gate, up) for gate, up in halves]


TUNABLES = (
    Tunable(name="decode_attention", keys=ATTENTION, candidates=attention_candidates, make_calls=attention_calls),
    Tunable(name="prompt_attention", keys=PROMPTS, candidates=prompt_candidates, make_calls=prompt_calls),
    Tunable(name="silu_mul", keys=GATE, candidates=gate_candidates, make_calls=gate_calls),
)
