"""Starting a kernel before the one in front of it has ended: programmatic dependent launch, on Hopper and later.

A kernel that calls `wait_for_inputs` first lets the next one start, then waits until everything before it is done and
written. Until then it may read what no kernel writes, and packed weights are such: it pulls them into the L2 cache.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

_LINE = tl.constexpr(128)  # bytes of a cache line


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Return the arguments of a launch that may overlap the one before: OVERLAP for the kernel, and Triton's own."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"OVERLAP": True, "launch_pdl": True} if capable else {"OVERLAP": False}


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Let the next kernel start; wait for the end of the one before."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_rows(row_ptrs, row_bytes, LINES: tl.constexpr):
    """Pull the first LINES cache lines of rows of `row_bytes` into the L2 cache; `row_ptrs` `[n]` points to bytes."""
    offsets = tl.minimum(tl.arange(0, LINES) * _LINE, row_bytes - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [row_ptrs[:, None] + offsets[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
