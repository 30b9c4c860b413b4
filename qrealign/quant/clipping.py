"""Learnable weight clipping (LWC): two logits per group pull in the low and the high end of the grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qrealign.config import QuantArgs


class LearnableWeightClipping(nn.Module):
    """Two-sided clipping of a weight: the group's extremes are multiplied by `sigmoid(logit)`.

    `clip_low_logit` and `clip_high_logit` are `[N, G]` float32, G groups along K (1 when per channel). A start of 4.0
    keeps 98.2 % of each extreme.

    Source: OmniQuant, arXiv 2308.13137; start and two-sidedness as in arXiv 2601.08089.
    """

    def __init__(
        self, shape: tuple[int, int], args: QuantArgs, *, start: float = 4.0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        groups = shape[1] // args.group_size if args.group_size else 1
        self.clip_low_logit = nn.Parameter(torch.full((shape[0], groups), start, device=device))
        self.clip_high_logit = nn.Parameter(torch.full((shape[0], groups), start, device=device))

    def logits(self) -> tuple[Tensor, Tensor]:
        """Return the two logits, low first."""
        return self.clip_low_logit, self.clip_high_logit
