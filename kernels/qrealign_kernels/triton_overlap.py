"""Starting a kernel before the one in front of it has ended: programmatic dependent launch, on Hopper and later.

A kernel that calls `wait_for_inputs` first lets the next one start, then waits until everything before it is done and
written. Until then it may read what no kernel writes, and packed weights are such: it pulls them into the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qrealign_kernels.triton_common import can_overlap

_LINE = tl.constexpr(128)  # bytes of a cache line


def overlap(device: torch.device) -> dict[str, bool]:
    """Return the arguments of a launch that may overlap the one before: OVERLAP for the kernel, and Triton's own."""
    return {"OVERLAP": True, "launch_pdl": True} if can_overlap(device) else {"OVERLAP": False}


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Let the next kernel start; wait for the end of the one before."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_rows(ptr, rows, columns, LINES: tl.constexpr):
    """Pull up to LINES cache lines of each of the rows `[n]`, `columns` elements long, into the L2 cache."""
    size: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    offsets = tl.minimum(tl.arange(0, LINES) * (_LINE // size), columns - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptr + rows[:, None] * columns + offsets[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
