"""The layouts of packed weights that the kernels for GPUs read.

`ROWS8`: int8 codes `[N, KP]`, row by row, KP = K rounded up to 16, with zeros behind K.

`PLANES4`: 4-bit codes as int32 words `[N, KP / 8]`, KP = K rounded up to 256. Each block of 256 columns is 32 words;
nibble p of word i holds code + 8 of column `32 * plane + i` of the block, with plane = p / 2 for even p and 4 + p / 2
for odd p. So consecutive words hold consecutive columns (wide loads of words and of tokens), the same nibble of 32
words is a tile of 32 columns for tensor cores, and the four even, or odd, nibbles of a word are four bytes of one group
of 128 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS8 = "rows8"
PLANES4 = "planes4"
PLANE = 32  # columns of a plane
BLOCK = 8 * PLANE
ALIGNMENT = 16  # bytes of the widest load


def to_rows8(codes: Tensor) -> Tensor:
    """Return int8 codes `[N, K]` in layout `ROWS8`."""
    return pad_columns(codes, ALIGNMENT).contiguous()


def to_planes4(codes: Tensor) -> Tensor:
    """Return 4-bit codes `[N, K]` int8 in layout `PLANES4`; columns behind K hold the code 0."""
    nibbles = (pad_columns(codes, BLOCK) + 8).to(torch.uint8).reshape(len(codes), -1, 2, 4, PLANE)
    by_word = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).transpose(2, 3)  # [N, blocks, 32 words, 4 bytes]
    return by_word.contiguous().view(torch.int32).reshape(len(codes), -1)


def pad_columns(tensor: Tensor, multiple: int) -> Tensor:
    """Return a tensor with zero columns up to a multiple; itself where nothing is missing."""
    missing = -tensor.shape[1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def narrowest_scale(scale: Tensor) -> Tensor:
    """Return scales in bfloat16 or float16 if that holds every one exactly, else float32: fewer bytes to stream."""
    scale = scale.float()
    for dtype in (torch.bfloat16, torch.float16):
        if bool((scale.to(dtype).float() == scale).all()):
            return scale.to(dtype).contiguous()
    return scale.contiguous()
