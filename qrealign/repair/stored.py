"""Repairs that had to be computed first: weights and low-rank edits kept in files, one per block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qrealign.errors import ResumeError
from qrealign.files import write_tensors
from qrealign.models.checkpoint import WeightFiles


def block_file(folder: Path, index: int) -> Path:
    """Return the file that holds what was computed for block `index`."""
    return folder / f"block-{index:05d}.safetensors"


def store_block(folder: Path, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Write one block's tensors by full name: `X.weight`, or the factors `X.left` `[N, r]` and `X.right` `[r, K]`."""
    write_tensors(block_file(folder, index), tensors)


class StoredChange:
    """Applies what `store_block` wrote: a weight replaces the tensor, factors are added to it as `left @ right`.

    Args:
        folder: holds one file for each of `num_blocks` blocks.

    Raises:
        ResumeError: a file is missing.
    """

    def __init__(self, folder: Path, num_blocks: int) -> None:
        paths = [block_file(folder, index) for index in range(num_blocks)]
        if missing := [path for path in paths if not path.exists()]:
            raise ResumeError(f"{missing[0]} is gone although this run had computed it: run again with --fresh")
        self.files = WeightFiles(paths)

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Return the changed tensor, on the device and in the dtype of `tensor`."""
        if name in self.files.tensors:
            return self.files.read([name])[name].to(tensor)
        left, right = (f"{name.removesuffix('.weight')}.{side}" for side in ("left", "right"))
        if not name.endswith(".weight") or left not in self.files.tensors:
            return tensor
        factors = {side: factor.to(tensor.device).float() for side, factor in self.files.read([left, right]).items()}
        return (tensor.float() + factors[left] @ factors[right]).to(tensor.dtype)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the files' headers and samples of their tensors."""
        return self.files.fingerprint()
