"""Explicit weight edits with a declared budget, merged into the weight before it is rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrealign_kernels import low_rank_gradients


class LowRankEdit(nn.Module):
    """Additive edit `left @ right` of rank r, held inside `norm(left @ right) <= budget * norm(weight)` (Frobenius).

    `left` is `[N, r]` and starts at zero, `right` is `[r, K]` and starts as N(0, 1/K), both float32; so training begins
    at the unedited weight. `weight_norm` is the Frobenius norm of the weight being edited. Where `mask`, `[N, K]` bool,
    is False the edit is zero; the bound then holds for the edit without its mask, which is no smaller.
    """

    weight_norm: Tensor
    mask: Tensor | None

    def __init__(
        self, weight: Tensor, *, rank: int, budget: float, generator: torch.Generator, mask: Tensor | None = None
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        right = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.left = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.right = nn.Parameter(right.to(weight.device))
        self.budget = budget
        self.register_buffer("weight_norm", torch.linalg.matrix_norm(weight.float()), persistent=False)
        self.register_buffer("mask", None if mask is None else mask.to(weight.device), persistent=False)

    def delta(self) -> Tensor:
        """Return the edit, `[N, K]` float32."""
        edit = self.left @ self.right
        return edit if self.mask is None else edit * self.mask

    def norm(self) -> Tensor:
        """Return the unmasked edit's Frobenius norm."""
        return _norm(self.left, self.right)


@torch.no_grad()
def project_edits(edits: Iterable[LowRankEdit]) -> None:
    """Shrink every edit that has left its budget onto it; those of one shape together, in a handful of kernels."""
    by_shape: dict[tuple[torch.Size, torch.Size], list[LowRankEdit]] = {}
    for edit in edits:
        by_shape.setdefault((edit.left.shape, edit.right.shape), []).append(edit)
    for alike in by_shape.values():
        left, right = (torch.stack([getattr(edit, side) for edit in alike]) for side in ("left", "right"))
        limit = torch.stack([edit.budget * edit.weight_norm for edit in alike])
        shrunk = left * (limit / _norm(left, right).clamp(min=1e-12)).clamp(max=1.0)[:, None, None]
        torch._foreach_copy_([edit.left for edit in alike], list(shrunk.unbind()))


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """Return `norm(left @ right)` over the last two dimensions from the r x r Gram matrices, no product formed."""
    gram = (left.mT @ left) * (right @ right.mT)
    return gram.sum(dim=(-2, -1)).clamp(min=0).sqrt()


class _EditedLinear(torch.autograd.Function):
    """A linear product whose weight is passed straight through to the two factors of its edit."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, left, right)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
        x, weight, left, right = ctx.saved_tensors
        d_left, d_right = low_rank_gradients(grad.flatten(0, -2), x.flatten(0, -2), left, right)
        return grad @ weight, None, None, d_left, d_right


def edited_linear(x: Tensor, weight: Tensor, bias: Tensor | None, edit: LowRankEdit) -> Tensor:
    """Return `x @ weight.T + bias`, with gradients to `x` and to the edit's factors.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`, same dtype; the rounded weight that already contains the edit.
        bias: `[N]`, same dtype, or None; it gets no gradient.
        edit: receives the weight's gradient straight through the rounding.
    """
    return _EditedLinear.apply(x, weight, bias, edit.left, edit.right)
