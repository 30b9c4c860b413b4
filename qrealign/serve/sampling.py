"""The next token of every running sequence: each with its own temperature, top-p and random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qrealign.data.generate import draw_tokens

_COLDEST = 1e-3  # temperatures below take the likeliest token: logits divided by less would overflow


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How one sequence draws its tokens.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, and so does all below 0.001.
        top_p: tokens are drawn from the likeliest ones that together reach this probability, 1 for all.
        seed: of the random numbers, None for numbers that nobody knows.
        max_tokens: most tokens to generate.
        stops: strings that end the answer and are left out of it.
        top_logprobs: alternatives that are reported with each token's log-probability, None for no report.
        ignore_eos: go on behind the model's own end, for measurements.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _COLDEST

    def numbers(self) -> random.Random:
        """Return the sequence's source of random numbers: whoever else is in the batch, they come in the same order."""
        # Python seeds with the absolute value of an integer: -1 and 1 would be one seed.
        return random.Random(None if self.seed is None else self.seed % 2**64)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A token that was drawn.

    Attributes:
        token_id: which.
        logprob: natural logarithm of its probability under the unchanged logits, None where no report is wanted.
        top: the likeliest tokens and their log-probabilities.
        finite: whether the logits were numbers; `token_id` means nothing otherwise.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finite: bool = True


def choose(logits: Tensor, settings: Sequence[SamplingSettings], uniforms: Sequence[float]) -> list[Choice]:
    """Return the next token of each row.

    Args:
        logits: `[B, V]` in any floating dtype.
        settings: of each row.
        uniforms: a random number in [0, 1) for each row.
    """
    logits = logits.float()
    greedy = logits.argmax(dim=-1)  # [B]
    finite = torch.isfinite(logits.amax(dim=-1))  # the largest of numbers with a NaN among them is NaN
    chosen = greedy
    if not all(row.greedy for row in settings):
        scaled = logits / _column([1.0 if row.greedy else row.temperature for row in settings], logits)
        if any(row.top_p < 1 for row in settings):
            scaled = _within_nucleus(scaled, _column([row.top_p for row in settings], logits))
        numbers = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
        is_greedy = torch.tensor([row.greedy for row in settings], device=logits.device)
        chosen = torch.where(is_greedy, greedy, draw_tokens(scaled, 1.0, numbers))
    reports = _report(logits, chosen, settings)
    ids, are_finite = chosen.tolist(), finite.tolist()
    return [
        Choice(token_id=ids[row], logprob=reports[row][0], top=reports[row][1], finite=are_finite[row])
        for row in range(len(settings))
    ]


def _column(values: list[float], like: Tensor) -> Tensor:
    """Return `[B, 1]` in the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _within_nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """Return `logits` `[B, V]` with minus infinity outside the fewest likeliest tokens that reach `top_p` `[B, 1]`."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the likelier ones
    outside = (before >= top_p) & (top_p < 1)
    outside[:, 0] = False
    return logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))


def _report(
    logits: Tensor, chosen: Tensor, settings: Sequence[SamplingSettings]
) -> list[tuple[float | None, tuple[tuple[int, float], ...]]]:
    """Return each row's log-probability and alternatives, where they are wanted."""
    reports: list[tuple[float | None, tuple[tuple[int, float], ...]]] = [(None, ())] * len(settings)
    rows = [row for row, wanted in enumerate(settings) if wanted.top_logprobs is not None]
    if not rows:
        return reports
    logprobs = logits[rows].log_softmax(dim=-1)
    own = logprobs.gather(1, chosen[rows][:, None]).squeeze(1).tolist()
    most = min(max(settings[row].top_logprobs or 0 for row in rows), logits.shape[-1])
    values, ids = (found.tolist() for found in logprobs.topk(most, dim=-1)) if most else ([()] * len(rows),) * 2
    for place, row in enumerate(rows):
        count = settings[row].top_logprobs or 0
        reports[row] = own[place], tuple(zip(ids[place][:count], values[place][:count], strict=True))
    return reports
