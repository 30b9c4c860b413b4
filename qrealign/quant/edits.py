"""Explicit weight edits with a declared budget, merged into the weight before it is rounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRankEdit(nn.Module):
    """Additive edit `left @ right` of rank r, held inside `norm(left @ right) <= budget * norm(weight)` (Frobenius).

    `left` is `[N, r]` and starts at zero, `right` is `[r, K]` and starts as N(0, 1/K), both float32; so training begins
    at the unedited weight. `weight_norm` is the Frobenius norm of the weight being edited.
    """

    weight_norm: Tensor

    def __init__(self, weight: Tensor, *, rank: int, budget: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        right = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.left = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.right = nn.Parameter(right.to(weight.device))
        self.budget = budget
        self.register_buffer("weight_norm", torch.linalg.matrix_norm(weight.float()), persistent=False)

    def delta(self) -> Tensor:
        """Return the edit, `[N, K]` float32."""
        return self.left @ self.right

    def norm(self) -> Tensor:
        """Return the edit's Frobenius norm from the two r x r Gram matrices, without forming the edit."""
        gram = (self.left.T @ self.left) * (self.right @ self.right.T)
        return gram.sum().clamp(min=0).sqrt()

    @torch.no_grad()
    def project(self) -> None:
        """Shrink the edit onto its budget if it has left it."""
        limit = self.budget * self.weight_norm
        self.left.mul_((limit / self.norm().clamp(min=1e-12)).clamp(max=1.0))
