"""Drawing tokens: every row by its own settings, and only by them."""

from __future__ import annotations

import math

import pytest
import torch

from qrealign.serve.sampling import SamplingSettings, choose

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0]).log_softmax(0)


def draw(count: int, seed: int = 0, **settings) -> torch.Tensor:
    """Return the shares of each token among many draws."""
    one = SamplingSettings(**settings)
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = choose(LOGITS.expand(count, -1), [one] * count, uniforms)
    return torch.bincount(torch.tensor([choice.token_id for choice in chosen]), minlength=5) / count


def test_temperature_scales_the_logits():
    for temperature in (0.5, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(0)
        assert torch.allclose(draw(20000, temperature=temperature), expected, atol=0.015)


def test_top_p_keeps_the_fewest_likeliest_tokens():
    probabilities = LOGITS.exp()
    kept = torch.tensor([False, True, True, True, False])  # 0.64 + 0.24 < 0.9 <= 0.64 + 0.24 + 0.09
    expected = torch.where(kept, probabilities, 0) / probabilities[kept].sum()
    assert torch.allclose(draw(20000, top_p=0.9), expected, atol=0.015)
    assert draw(100, top_p=1e-9)[1] == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 5e-324])
def test_cold_takes_the_likeliest_token(temperature):
    assert draw(50, temperature=temperature)[1] == 1


def test_rows_do_not_touch_each_other():
    settings = [
        SamplingSettings(temperature=0.0),
        SamplingSettings(temperature=1.5, top_logprobs=2),
        SamplingSettings(temperature=1.5, top_p=0.3),
        SamplingSettings(temperature=0.0, top_logprobs=0),
    ]
    uniforms = [0.9, 0.99, 0.99, 0.1]
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    together = choose(logits, settings, uniforms)
    alone = [choose(logits[i : i + 1], settings[i : i + 1], uniforms[i : i + 1])[0] for i in range(4)]
    assert together == alone


def test_reports_are_of_the_unchanged_distribution():
    settings = SamplingSettings(temperature=0.2, top_logprobs=3)
    choice = choose(LOGITS[None], [settings], [0.0])[0]
    assert choice.logprob == pytest.approx(float(LOGITS[choice.token_id]))
    assert [token for token, _ in choice.top] == [1, 3, 2]
    assert sum(math.exp(logprob) for _, logprob in choice.top) < 1
    assert choose(LOGITS[None], [SamplingSettings(top_logprobs=99)], [0.5])[0].top[4][0] == 4


def test_numbers_that_are_none_are_noticed():
    logits = LOGITS.repeat(4, 1)
    logits[1, 2], logits[2, 0], logits[3, 0] = float("nan"), float("inf"), float("-inf")
    finite = [choice.finite for choice in choose(logits, [SamplingSettings()] * 4, [0.5] * 4)]
    assert finite == [True, False, False, True]


def test_a_seed_gives_the_same_numbers_and_none_others():
    def numbers(seed):
        source = SamplingSettings(seed=seed).numbers()
        return [source.random() for _ in range(5)]

    assert numbers(3) == numbers(3) != numbers(4)
    assert numbers(-1) == numbers(-1) != numbers(1)
    assert numbers(None) != numbers(None)
