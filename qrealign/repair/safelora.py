"""SafeLoRA: updates that leave the direction of alignment are projected onto it, one linear at a time."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from qrealign.files import sha256_of_text
from qrealign.models.source import ModelSource


def projected_update(base: Tensor, aligned: Tensor, finetuned: Tensor) -> tuple[Tensor, float]:
    """Return the projected update `P dW` and its cosine with the update itself.

    With `V = aligned - base`, the direction that alignment took: `P = V V^T / norm(V)` (Frobenius) and
    `dW = finetuned - aligned`. `P` is no orthogonal projector: its scale grows with the norm of `V`.

    Args:
        base, aligned, finetuned: `[N, K]`, any floating-point dtype.

    Returns:
        `[N, K]` float32, and the cosine in [-1, 1]; 1 where nothing was updated or aligned.

    Source: SafeLoRA, arXiv 2405.16833, which multiplies the LoRA factor B by P; for `dW = B A` that is the same.
    """
    direction = aligned.float() - base.float()
    update = finetuned.float() - aligned.float()
    norm = torch.linalg.matrix_norm(direction)
    projected = direction @ (direction.T @ update) / norm.clamp(min=torch.finfo(torch.float32).tiny)
    if not (update.any() and direction.any()):
        return update, 1.0
    return projected, float(torch.nn.functional.cosine_similarity(projected.flatten(), update.flatten(), dim=0))


def choose_projected(cosines: dict[str, float], *, threshold: float, lowest: int) -> list[str]:
    """Return the linears to project: those under `threshold`, or the `lowest` ones where that is not 0."""
    if lowest:
        return sorted(cosines, key=lambda name: cosines[name])[:lowest]
    return [name for name, cosine in cosines.items() if cosine < threshold]


class SafeLoraChange:
    """Replaces the update of the chosen linears by its projection while they are read; everything else stays."""

    def __init__(self, base: ModelSource, aligned: ModelSource, projected: Collection[str]) -> None:
        self.base, self.aligned = base, aligned
        self.projected = frozenset(f"{linear}.weight" for linear in projected)

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Return `aligned + P dW` for a chosen linear's weight."""
        if name not in self.projected:
            return tensor
        base, aligned = (source.read_tensor(name).to(tensor.device) for source in (self.base, self.aligned))
        update, _ = projected_update(base, aligned, tensor)
        return (aligned.float() + update).to(tensor.dtype)

    def fingerprint(self) -> str:
        """Return a SHA-256 over both models and the linears that are projected."""
        return sha256_of_text("safelora", self.base.fingerprint(), self.aligned.fingerprint(), *sorted(self.projected))


def update_cosines(base: ModelSource, aligned: ModelSource, finetuned: ModelSource) -> dict[str, float]:
    """Return the cosine of every linear's update with its projection, reading one linear of each model at a time."""
    cosines = {}
    for linear in finetuned.linear_shapes():
        name = f"{linear}.weight"
        tensors = (source.read_tensor(name) for source in (base, aligned, finetuned))
        cosines[linear] = projected_update(*tensors)[1]
    return cosines
