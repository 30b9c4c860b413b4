"""Triton kernel that turns queries and keys by their positions, in one pass instead of five.

Every product is rounded to the dtype of the heads, and then their sum, as the operations of a model's own code are: so
values and gradients have the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches
from qrealign_kernels.triton_common import on_device_of
from qrealign_kernels.triton_math import FLOAT_KINDS, FP_FUSION, convert, round_to


@triton.jit
def _rotate_heads_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, T, H, D, stride_xb, stride_xh, stride_xt, stride_cosb, stride_cost, stride_sinb,
    stride_sint, TRANSPOSED: tl.constexpr, KIND: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Turn heads of one token, `[BLOCK_H, D]`; the result lies token by token."""
    b = (tl.program_id(0) // T).to(tl.int64)
    t = tl.program_id(0) % T
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    d = tl.arange(0, HALF)[None, :]
    half = D // 2
    mask = (h < H) & (d < half)
    x_ptrs = x_ptr + b * stride_xb + t * stride_xt + h * stride_xh + d
    cos_ptrs = cos_ptr + b * stride_cosb + t * stride_cost + d
    sin_ptrs = sin_ptr + b * stride_sinb + t * stride_sint + d
    b_first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    b_second = tl.load(x_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    cos_first = tl.load(cos_ptrs, mask=d < half, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptrs + half, mask=d < half, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptrs, mask=d < half, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptrs + half, mask=d < half, other=0.0).to(tl.float32)
    if TRANSPOSED:
        turned_first = round_to(b_second * sin_second, KIND)
        turned_second = -round_to(b_first * sin_first, KIND)
    else:
        turned_first = -round_to(b_second * sin_first, KIND)
        turned_second = round_to(b_first * sin_second, KIND)
    out_ptrs = out_ptr + (tl.program_id(0).to(tl.int64) * H + h) * D + d
    tl.store(out_ptrs, convert(round_to(b_first * cos_first, KIND) + turned_first, out_ptr.dtype.element_ty), mask=mask)
    second = round_to(b_second * cos_second, KIND) + turned_second
    tl.store(out_ptrs + half, convert(second, out_ptr.dtype.element_ty), mask=mask)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool) -> Tensor:
    """Compute `reference_calibration.rotate_heads_ref`; in memory the result's heads stand behind its tokens."""
    batch, heads, tokens, width = x.shape
    x, cos, sin = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, cos, sin))
    cos, sin = (each.expand(batch, tokens, width) for each in (cos, sin))
    out = torch.empty(batch, tokens, heads, width, dtype=x.dtype, device=x.device)
    if out.numel():
        choice = launches.choice("rotate_heads", launches.DEFAULT, x.device)
        with on_device_of(x):
            _rotate_heads_kernel[(batch * tokens, triton.cdiv(heads, choice["BLOCK_H"]))](
                x,
                cos,
                sin,
                out,
                tokens,
                heads,
                width,
                *x.stride()[:3],
                *cos.stride()[:2],
                *sin.stride()[:2],
                TRANSPOSED=transposed,
                KIND=FLOAT_KINDS[x.dtype],
                HALF=triton.next_power_of_2(width // 2),
                enable_fp_fusion=FP_FUSION,
                **choice,
            )
    return out.transpose(1, 2)
