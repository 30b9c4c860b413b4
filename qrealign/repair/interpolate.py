"""Interpolation: the fine-tuned weights drawn back towards the aligned ones."""

from __future__ import annotations

from torch import Tensor

from qrealign.files import sha256_of_text
from qrealign.models.source import ModelSource


def interpolate(aligned: Tensor, finetuned: Tensor, coefficient: float) -> Tensor:
    """Return `aligned + coefficient * (finetuned - aligned)`, computed in float32, in the dtype of `finetuned`.

    Args:
        aligned: any shape.
        finetuned: the same shape.
        coefficient: 0 gives the aligned tensor, 1 the fine-tuned one.

    Source: the post-hoc form of the weight averaging of arXiv 2508.12531, which averages during fine-tuning.
    """
    start = aligned.float()
    return (start + coefficient * (finetuned.float() - start)).to(finetuned.dtype)


class InterpolationChange:
    """Interpolates every floating-point tensor with the aligned model's while it is read."""

    def __init__(self, aligned: ModelSource, coefficient: float) -> None:
        self.aligned, self.coefficient = aligned, coefficient

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Return the interpolated tensor; one that is no floating point stays."""
        if not tensor.is_floating_point():
            return tensor
        return interpolate(self.aligned.read_tensor(name).to(tensor.device), tensor, self.coefficient)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the aligned model and the coefficient."""
        return sha256_of_text("interpolate", self.aligned.fingerprint(), str(self.coefficient))
