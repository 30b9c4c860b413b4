"""Products of 4-bit weights and more than a few tokens by the CUDA extension, where its launch table says that it wins.

What it beats is a dequantized copy and the library's product. It is for GPUs of compute capability 9.0, bfloat16 tokens
and scales, groups of 128 times a power of two or whole rows. Keys of the launch table `cuda_int4_tile` are those of
`triton_linear`: the number of tokens rounded up to a power of two, "m32" to "m8192", and what `launches.by_shape` puts
behind it. A choice gives TOKENS, ROWS and CLUSTER of csrc/cuda/matmul.h, and in SPLIT whether tiles that are
left for fewer than all multiprocessors are split between them. Everything else goes to Triton.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qrealign_kernels import cuda, launches
from qrealign_kernels.layouts import PLANES4
from qrealign_kernels.quantized import PackedWeight

_COLUMNS = 8  # K is a multiple of this: rows of x begin at multiples of 16 bytes
_GROUP = 128
_GROUPS = tuple(_GROUP << shift for shift in range(8))


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, key: str) -> Tensor | None:
    """Compute `reference_linear.packed_linear_ref` into `out`, or return None and leave it to Triton.

    Args:
        x: `[M, K]` floating point, contiguous.
        weight: in a layout of `layouts.py`.
        bias: `[N]` floating point, or None.
        out: `[M, N]` on the device of x, which is the current one.
        key: of the launch table.
    """
    if not cuda.serves(out) or weight.layout != PLANES4 or weight.activation_bits is not None:
        return None
    dtypes = {x.dtype, out.dtype, weight.scale.dtype, torch.bfloat16 if bias is None else bias.dtype}
    if dtypes != {torch.bfloat16} or x.shape[1] % _COLUMNS or x.data_ptr() % 16:
        return None
    if (weight.group_size or _GROUP) not in _GROUPS:
        return None
    launch = launches.find("cuda_int4_tile", key, out.device)
    if launch is None:
        return None
    pointers = (x, weight.data, weight.scale, weight.zero_point, bias, out)
    stream = cuda.stream_of(out.device)
    sums = arrivals = None
    if launch["SPLIT"]:
        places = 2 * launch["TOKENS"] * max(launch["ROWS"], 128)
        sums = torch.empty(multiprocessors(out.device), places, dtype=torch.float32, device=out.device)
        arrivals = _arrivals(out.device, stream)
    cuda.extension().matmul_int4(
        *(0 if tensor is None else tensor.data_ptr() for tensor in pointers),
        *(x.shape[0], *weight.shape, weight.data.shape[1] * weight.data.element_size(), weight.groups),
        *(launch["TOKENS"], launch["ROWS"], launch["CLUSTER"]),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (sums, arrivals)),
        stream,
    )
    return out


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _arrivals(device: torch.device, stream: int) -> Tensor:
    """Return counters that are zero whenever no product runs on the stream; each product leaves them so."""
    return torch.zeros(multiprocessors(device), dtype=torch.int32, device=device)
