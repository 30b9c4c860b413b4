"""Intervals and tests against published figures, exhaustive sums and simulation."""

from __future__ import annotations

import itertools
import random
from math import comb

import pytest

from qrealign.evaluate.compare import compare_scores, comparison
from qrealign.evaluate.statistics import (
    FEWEST_PROMPTS,
    mcnemar,
    minimum_detectable_difference,
    paired_difference,
    repeated_score,
    score,
    sign_flip,
    spread,
    wilson,
)
from qrealign.records import ModelScores, Score


def test_wilson_of_the_paper_s_figure():
    low, high = wilson(45, 520)
    assert (round(low, 1), round(high, 1)) == (6.5, 11.4)


def test_wilson_at_the_ends_stays_inside():
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 100.0
    assert wilson(0, 20)[1] == pytest.approx(100 - wilson(20, 20)[0])
    assert wilson(0, 20)[1] == pytest.approx(16.11, abs=0.01)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


def test_score_is_in_percent():
    measured = score([True, False, False, False])
    assert (measured.value, measured.n) == (25.0, 4)
    assert measured.low < 25 < measured.high


def outcomes(both, only_first, only_second, neither):
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 9), (20, 22), (400, 500)])
def test_mcnemar_is_the_two_sided_sign_test(only_first, only_second):
    n = only_first + only_second
    fewer = min(only_first, only_second)
    extreme = sum(comb(n, k) for k in range(n + 1) if k <= fewer or k >= n - fewer)
    expected = min(1.0, extreme / 2**n)
    assert mcnemar(*outcomes(7, only_first, only_second, 11)) == pytest.approx(expected)
    assert mcnemar(*outcomes(0, only_second, only_first, 3)) == pytest.approx(expected)


def test_mcnemar_needs_the_same_prompts():
    with pytest.raises(ValueError, match="same prompts"):
        mcnemar([True], [True, False])


def test_paired_difference_against_newcombe_s_example():
    # Newcombe 1998, table III, method 10: 36, 12, 2, 0 gives 0.2 (0.0569, 0.3404).
    first, second = outcomes(36, 2, 12, 0)
    difference = paired_difference(first, second)
    assert difference.value == pytest.approx(20.0)
    assert (difference.low, difference.high) == (pytest.approx(5.69, abs=0.01), pytest.approx(34.04, abs=0.01))
    assert (difference.only_first, difference.only_second, difference.n) == (2, 12, 50)


def test_paired_difference_of_equal_models_holds_zero():
    outcome = [True, False] * 30
    difference = paired_difference(outcome, outcome)
    assert difference.value == 0
    assert difference.low <= 0 <= difference.high


def test_minimum_detectable_difference_has_the_power_it_claims():
    n, discordant = 300, 0.2
    difference = minimum_detectable_difference(n, discordant_share=discordant) / 100
    more, fewer = (discordant + difference) / 2, (discordant - difference) / 2
    chance = random.Random(0)
    found = 0
    for _ in range(400):
        draws = [chance.random() for _ in range(n)]
        only_first = sum(draw < more for draw in draws)
        only_second = sum(more <= draw < more + fewer for draw in draws)
        found += mcnemar(*outcomes(0, only_first, only_second, 0)) < 0.05
    assert 0.7 <= found / 400 <= 0.88


def test_the_floor_of_the_detectable_difference_has_its_power_too():
    n = 200
    share = minimum_detectable_difference(n, discordant_share=0.001) / 100  # the models hardly differ but this way
    needed = next(k for k in range(n) if mcnemar(*outcomes(0, k, 0, n - k)) < 0.05)
    chance = sum(comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(needed, n + 1))
    assert needed == FEWEST_PROMPTS and 0.8 <= chance <= 0.85


def test_minimum_detectable_difference_falls_with_n():
    assert minimum_detectable_difference(1000) < minimum_detectable_difference(100) < minimum_detectable_difference(30)
    with pytest.raises(ValueError, match="n > 0"):
        minimum_detectable_difference(0)


def test_comparison_pairs_the_scores_that_both_have():
    realigned = ModelScores(perplexity=11.0, outcomes={"harmful_score": [False] * 40, "task_accuracy": [True]})
    quantized = ModelScores(
        perplexity=10.0,
        outcomes={"harmful_score": [True] * 38 + [False] * 2, "refusal_rate": [False], "task_accuracy": []},
    )
    result = comparison(realigned, quantized)
    assert set(result) == {"harmful_score", "perplexity"}
    assert result["harmful_score"]["delta"] == -95.0
    assert result["harmful_score"]["p_value"] < 1e-10
    assert result["harmful_score"]["low"] < -95 < result["harmful_score"]["high"]
    assert result["harmful_score"]["only_quantized"] == 38
    assert result["perplexity"]["ratio"] == pytest.approx(1.1)


def test_comparison_of_equal_models_finds_nothing():
    same = ModelScores(outcomes={"harmful_score": [True, False, True]})
    result = comparison(same, same)["harmful_score"]
    assert (result["p_value"], result["delta"]) == (1.0, 0.0)


def test_one_seed_is_the_plain_score():
    outcomes = [True, False, True, True]
    assert repeated_score([outcomes]) == score(outcomes)


def test_clusters_count_for_what_they_tell():
    steady = [[True] * 5 + [False] * 15] * 4  # every prompt always the same: the tries tell nothing new
    assert repeated_score(steady).n == 20
    assert (repeated_score(steady).low, repeated_score(steady).high) == pytest.approx(wilson(5, 20))
    mixed = [[(prompt + seed) % 4 == 0 for prompt in range(20)] for seed in range(4)]  # every prompt a quarter
    interval = repeated_score(mixed)
    assert (interval.low, interval.high) == pytest.approx(wilson(20, 80))
    assert interval.value == 25.0
    assert repeated_score([[True] * 6] * 3) == Score(value=100.0, low=wilson(6, 6)[0], high=100.0, n=6)
    one = repeated_score([[True], [False], [True]])  # of a single prompt nothing is known but that it is one
    assert (one.low, one.high) == pytest.approx(wilson(2 / 3, 1))
    with pytest.raises(ValueError):
        repeated_score([[True], [True, False]])


def test_sign_flip_is_mcnemar_for_one_try():
    generator = random.Random(0)
    for _ in range(20):
        first = [generator.random() < 0.4 for _ in range(30)]
        second = [generator.random() < 0.6 for _ in range(30)]
        assert sign_flip(first, second) == pytest.approx(mcnemar(first, second))


def test_sign_flip_of_counts_is_the_exact_distribution():
    first, second = [3, 0, 2, 1], [0, 1, 2, 3]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    sums = [
        sum(sign * size for sign, size in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=4)
    ]
    expected = sum(abs(value) >= abs(sum(differences)) for value in sums) / len(sums)
    assert sign_flip(first, second) == pytest.approx(expected)
    assert sign_flip([1, 1], [1, 1]) == 1.0
    with pytest.raises(ValueError, match="same prompts"):
        sign_flip([1], [1, 2])


def test_spread_between_seeds():
    assert spread([10.0, 14.0]) == pytest.approx(2.8284, abs=1e-3)
    assert spread([10.0]) == 0.0


def test_comparing_sampled_models_counts_prompts():
    first = ModelScores(
        outcomes={"harmful_score": [True] * 6, "refusal_rate": [True]}, seeds={"harmful_score": [100.0, 100.0]}
    )
    second = ModelScores(
        outcomes={"harmful_score": [False] * 6, "refusal_rate": [True]}, seeds={"harmful_score": [0.0, 0.0]}
    )
    found = compare_scores(first, second)
    assert found["harmful_score"] == {"p_value": 0.25, "delta": 100.0, "n": 3, "seeds": 2}
    assert found["refusal_rate"]["only_other"] == 0 and found["refusal_rate"]["only_model"] == 0
    greedy = ModelScores(outcomes={"harmful_score": [False] * 6})
    assert "harmful_score" not in compare_scores(first, greedy)
