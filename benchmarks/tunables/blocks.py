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
# Key -> rows, heads of queries and heads of keys.
ATTENTION = {"p8": (1, 32, 8), "p32": (1, 32, 32), "p64": (8, 32, 8), "p256": (8, 32, 32), "p1024": (32, 32, 32)}
GATE = {"few": (1, 11008), "default": (1024, 11008)}


def attention_candidates(key: str) -> list[Choice]:
    """Return cuts into 1 to 32 runs by tiles of 32 to 128 cells, fewer runs where rows and heads are many."""
    return [
        {"SPLITS": splits, "BLOCK_S": cells, "num_warps": warps, "num_stages": stages}
        for splits, cells, warps, stages in product((1, 2, 4, 8, 16, 32), (32, 64, 128), (2, 4, 8), (2, 3))
        if 128 <= splits * int(key[1:]) <= 1024 and 16 <= cells // warps <= 32
    ]


def attention_calls(batch: int, heads: int, groups: int) -> Calls:
    """Return steps of all rows in a half-filled cache; the mask of padding is read as in generation."""
    count = rotations(2 * batch * groups * FILLED * HEAD_SIZE * 2)
    shape = (batch, groups, CELLS, HEAD_SIZE)
    calls: Calls = []
    for _ in range(count):
        states = torch.randn(batch, heads + 2 * groups, HEAD_SIZE, device="cuda").bfloat16()
        turn = torch.rand(1, HEAD_SIZE, device="cuda").bfloat16().expand(batch, -1)
        query, key, value = states.split([heads, groups, groups], dim=1)
        calls.append(
            partial(
                kernels.decode_attention,
                query,
                key,
                value,
                cos=turn,
                sin=turn,
                keys=torch.randn(shape, device="cuda", dtype=torch.bfloat16),
                values=torch.randn(shape, device="cuda", dtype=torch.bfloat16),
                cells=torch.full((1,), FILLED, device="cuda"),
                mask=torch.ones(batch, CELLS, device="cuda", dtype=torch.bool),
                length=CELLS,
                scaling=HEAD_SIZE**-0.5,
            )
        )
    return calls


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
    Tunable(name="silu_mul", keys=GATE, candidates=gate_candidates, make_calls=gate_calls),
)
