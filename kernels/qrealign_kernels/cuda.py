"""Packed linear products for a few tokens by the CUDA extension, where its launch table says that it beats Triton.

It reads the layouts of `layouts.py`, so a weight that was repacked for the Triton kernels serves both. Keys of the
launch tables `cuda_int4` and `cuda_int8` are the number of tokens rounded up to a power of two, "m1" to "m16", and
what `launches.by_shape` puts behind it; a choice gives WARPS, ROW_TILES and STAGES of csrc/cuda/decode.h. Where rows
have at most HELD_COLUMNS, `cuda_int4_held` and `cuda_int8_held` (ROW_TILES 0) are asked first. A GPU class without an
entry, a machine without the extension, and what the kernels do not do, go to Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qrealign_kernels import launches, native
from qrealign_kernels.layouts import PLANES4, ROWS8
from qrealign_kernels.quantized import PackedWeight, QuantizedActivations
from qrealign_kernels.triton_common import can_overlap


def _load() -> tuple[Any, str | None]:
    """Return the extension's module and None, or None and why it cannot be used."""
    module, reason = native.load_extension("_C_cuda")
    if module is not None and (reason := module.unusable_reason()) is not None:
        return None, f"qrealign_kernels._C_cuda: {reason}"
    return module, reason


_C, _NOT_LOADED = _load()

MAX_TOKENS = 16
HELD_COLUMNS = {"cuda_int4": 4096, "cuda_int8": 12288}  # up to here a block's warps can hold the tokens in registers
FUSED_TOKENS = 2  # up to here every block rounds the tokens for itself; beyond, one launch more does it once
_COLUMNS = 16  # K is a multiple of this: rows of x are read 16 bytes at a time
_GROUP = 128  # groups are multiples of this
_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def unavailable_reason() -> str | None:
    """Return why the extension's kernels cannot run here, or None if they can."""
    if _NOT_LOADED is not None:
        return _NOT_LOADED
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def extension() -> Any:
    """Return the extension's module; `serves` said that it is there."""
    return _C


def serves(tensor: Tensor) -> bool:
    """Tell whether the extension is there and the tensor on a GPU."""
    return _C is not None and _on_gpu(tensor)


def stream_of(device: torch.device) -> int:
    """Return the handle of the device's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def packed_linear(
    x: Tensor | QuantizedActivations, weight: PackedWeight, bias: Tensor | None, out: Tensor
) -> Tensor | None:
    """Compute `reference_linear.packed_linear_ref` into `out`, or return None and leave it to Triton.

    Args:
        x: `[M, K]` floating point, or its codes.
        weight: in a layout of `layouts.py`.
        bias: `[N]` floating point, or None.
        out: `[M, N]` on the device of x, which is the current one.
    """
    launch = _launch_for(x, weight, bias, out)
    if launch is None:
        return None
    stream = stream_of(out.device)
    cut = (launch["WARPS"], launch["ROW_TILES"], launch["STAGES"], can_overlap(out.device), stream)
    rows, columns = weight.shape
    sizes = (out.shape[0], rows, columns, weight.data.shape[1] * weight.data.element_size())
    operands = (
        weight.data.data_ptr(),
        _ELEMENTS[weight.scale.dtype],
        weight.scale.data_ptr(),
    )
    ends = (0 if bias is None else bias.data_ptr(), out.data_ptr(), *sizes)
    element = _ELEMENTS[out.dtype]
    if weight.layout == PLANES4:
        assert isinstance(x, Tensor)
        x = x.contiguous()
        zero_point = 0 if weight.zero_point is None else weight.zero_point.data_ptr()
        _C.decode_int4(element, x.data_ptr(), *operands, zero_point, *ends, weight.groups, *cut)
    elif isinstance(x, Tensor) and out.shape[0] <= FUSED_TOKENS:
        x = x.contiguous()
        _C.quantize_decode_int8(element, x.data_ptr(), *operands, *ends, *cut)
    else:
        codes, scale = _quantize(x, cut[-2:]) if isinstance(x, Tensor) else (x.codes.contiguous(), x.scale.contiguous())
        _C.decode_int8(element, codes.data_ptr(), scale.data_ptr(), *operands, *ends, *cut)
    return out


def _quantize(x: Tensor, queue: tuple[bool, int]) -> tuple[Tensor, Tensor]:
    """Compute `quantize_per_token_ref` with 8 bits; `queue`: whether it overlaps what is before it, and the stream."""
    x = x.contiguous()
    codes, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    _C.quantize_tokens(_ELEMENTS[x.dtype], x.data_ptr(), codes.data_ptr(), scale.data_ptr(), *x.shape, *queue)
    return codes, scale


def _launch_for(
    x: Tensor | QuantizedActivations, weight: PackedWeight, bias: Tensor | None, out: Tensor
) -> launches.Choice | None:
    """Return the launch for these operands, or None where the kernels do not take them or are not the fastest."""
    tokens = out.shape[0]
    if not serves(out) or tokens > MAX_TOKENS or weight.shape[1] % _COLUMNS:
        return None
    dtypes = {out.dtype, out.dtype if bias is None else bias.dtype, x.dtype if isinstance(x, Tensor) else out.dtype}
    if len(dtypes) > 1 or torch.float32 in dtypes:
        return None
    if weight.layout == ROWS8 and weight.activation_bits == 8:
        kernel = "cuda_int8"
    elif weight.layout == PLANES4 and weight.activation_bits is None and (weight.group_size or _GROUP) % _GROUP == 0:
        kernel = "cuda_int4"
    else:
        return None
    key = launches.by_shape(f"m{1 << (tokens - 1).bit_length()}", *weight.shape)
    holds = weight.shape[1] <= HELD_COLUMNS[kernel] and (kernel == "cuda_int4" or tokens > FUSED_TOKENS)
    held = launches.find(f"{kernel}_held", key, out.device) if holds else None
    return launches.find(kernel, key, out.device) if held is None else held


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
