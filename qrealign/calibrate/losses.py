"""The per-sample losses of both engines: masked, vectorised, the mean over a batch of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return each sample's mean squared error over real positions and channels.

    Args:
        output: `[B, T, H]`, the quantized block's output.
        target: `[B, T, H]`, what it should have been.
        mask: `[B, T]`, 1 at real tokens, 0 at padding.

    Returns:
        `[B]` float32.
    """
    squared = (output.float() - target.float()).square().mean(dim=-1)  # [B, T]
    return (squared * mask).sum(dim=-1) / mask.sum(dim=-1)


def alignment_loss(logit: Tensor) -> Tensor:
    """Return `softplus(-logit)` per sample: small where the aligned model's probe says "malicious".

    Source: arXiv 2601.08089, section on the class-conditional objective.
    """
    return F.softplus(-logit)


def divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return `KL(teacher || student)` at each position, float32, from `[P, V]` logits."""
    teacher = torch.log_softmax(teacher_logits.float(), dim=-1)
    student = torch.log_softmax(student_logits.float(), dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)
