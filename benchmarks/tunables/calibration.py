"""Launch candidates of the calibration kernels, and the calls that time them, at the widths of 7B layers."""

from __future__ import annotations

from functools import partial

import torch

import qrealign_kernels as kernels
from benchmarks.timing import rotations
from benchmarks.tunables.tunable import Calls, Tunable
from qrealign_kernels.launches import Choice


def per_token_candidates(key: str) -> list[Choice]:
    """Return tiles of at most 4,096 values."""
    return [
        {"BLOCK_R": rows, "num_warps": warps} for rows in (1, 2, 4) if rows * int(key) <= 4096 for warps in (2, 4, 8)
    ]


def per_token_calls(tokens: int, width: int) -> Calls:
    """Return calls that quantize `[tokens, width]` bfloat16 activations."""
    sets = [
        torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(rotations(3 * tokens * width))
    ]
    return [partial(kernels.quantize_per_token, x) for x in sets]


TUNABLES = (
    Tunable(
        name="looped_rows",
        keys={"2048": (2048, 4096)},
        candidates=per_token_candidates,
        make_calls=per_token_calls,
    ),
)
