"""Shares with intervals and paired comparisons, exact where it is affordable; shares are in percent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist, stdev

import numpy as np

from qrealign.intervals import CONFIDENCE, wilson, z_value
from qrealign.records import Score

POWER = 0.8
FEWEST_PROMPTS = 6  # with fewer, McNemar's exact test gives no p < 0.05, however the models differ
_FEWEST_DISAGREEMENTS = 8  # one-sided and expected: at least six of them, the least for p < 0.05, come with `POWER`


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Share of `second` less share of `first` on the same prompts, in percentage points, with its 95 % interval."""

    value: float
    low: float
    high: float
    only_first: int
    only_second: int
    n: int


def score(outcomes: Sequence[bool]) -> Score:
    """Return the share of true outcomes in percent with its Wilson interval.

    Raises:
        ValueError: there is no outcome.
    """
    successes = sum(outcomes)
    low, high = wilson(successes, len(outcomes))
    return Score(value=100 * successes / len(outcomes), low=low, high=high, n=len(outcomes))


def repeated_score(outcomes: Sequence[Sequence[bool]]) -> Score:
    """Return the score of prompts that were each tried once per seed; `outcomes` holds one list per seed.

    The value is the mean over prompts and seeds. The interval treats a prompt's tries as one cluster: it is Wilson's
    with as many independent tries as give the variance that the prompts' means show, never fewer than the prompts and
    never more than all tries; `n` counts prompts. With one seed this is `score`.

    Raises:
        ValueError: there is no outcome, or the seeds differ in their number of prompts.

    Source: effective sample size under clustering, L. Kish, Survey Sampling (1965); its use with Wilson's interval,
    E. L. Korn and B. I. Graubard, Survey Methodology 24 (1998).
    """
    if len(outcomes) == 1:
        return score(outcomes[0])
    seeds = len(outcomes)
    rates = [sum(tries) / seeds for tries in zip(*outcomes, strict=True)]
    n = len(rates)
    mean = sum(rates) / n
    variance = sum((rate - mean) ** 2 for rate in rates) / max(1, n - 1) / n
    effective = n * seeds if variance == 0 else min(max(mean * (1 - mean) / variance, n), n * seeds)
    if n == 1 or mean in (0.0, 1.0):
        effective = n  # nothing varied, so nothing says that a prompt's tries are independent
    low, high = wilson(mean * effective, effective)
    return Score(value=100 * mean, low=low, high=high, n=n)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the exact two-sided p-value of McNemar's test: are the two shares on the same prompts equal?

    Only prompts on which the two differ count; under equality each direction is a fair coin.

    Raises:
        ValueError: the lengths differ.
    """
    only_first, only_second = _discordant(first, second)
    n = only_first + only_second
    tail = sum(comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flip(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the exact two-sided p-value of equal shares, given each prompt's count of true tries in two models.

    Under equality a prompt's difference of counts has either sign with even chance, whatever the correlation of its
    tries; the distribution of the sum is computed exactly. With one try per prompt this is McNemar's exact test.

    Raises:
        ValueError: the lengths differ.

    Source: R. A. Fisher's randomisation test, The Design of Experiments (1935), chapter 3.
    """
    if len(first) != len(second):
        raise ValueError(f"paired counts must be of the same prompts: {len(first)} against {len(second)}")
    sizes = Counter(abs(a - b) for a, b in zip(first, second, strict=True) if a != b)
    # chance[s]: of the differences with positive sign adding up to s; the whole sum is then 2 s - total.
    chance = np.ones(1)
    for size, count in sizes.items():
        positive = np.zeros(size * count + 1)
        positive[::size] = _coins(count)
        chance = np.convolve(chance, positive)
    total, observed = len(chance) - 1, abs(sum(second) - sum(first))
    reached = np.abs(2 * np.arange(len(chance)) - total) >= observed
    return min(1.0, float(chance[reached].sum()))


def _coins(count: int) -> list[float]:
    """Return the chance of each number of heads, 0 to `count`, in so many throws of a fair coin."""
    ways, all_ways, chances = 1, 2**count, []
    for heads in range(count + 1):
        chances.append(ways / all_ways)
        ways = ways * (count - heads) // (heads + 1)
    return chances


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation between seeds, in the unit of `values`; 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], *, confidence: float = CONFIDENCE
) -> PairedDifference:
    """Return the difference of two shares on the same prompts with its score interval.

    Raises:
        ValueError: the lengths differ, or there is no outcome.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10.
    """
    only_first, only_second = _discordant(first, second)
    n, both = len(first), sum(a and b for a, b in zip(first, second, strict=True))
    neither = n - both - only_first - only_second
    p_first, p_second = (both + only_first) / n, (both + only_second) / n
    low_first, high_first = (bound / 100 for bound in wilson(both + only_first, n, confidence=confidence))
    low_second, high_second = (bound / 100 for bound in wilson(both + only_second, n, confidence=confidence))
    phi = _correlation(both, only_first, only_second, neither)
    difference = p_second - p_first

    def width(down: float, up: float) -> float:
        return sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))

    low = difference - width(p_second - low_second, high_first - p_first)
    high = difference + width(high_second - p_second, p_first - low_first)
    return PairedDifference(
        value=100 * difference,
        low=100 * max(-1.0, low),
        high=100 * min(1.0, high),
        only_first=only_first,
        only_second=only_second,
        n=n,
    )


def minimum_detectable_difference(n: int, *, discordant_share: float = 0.2) -> float:
    """Return the smallest difference in percentage points that McNemar's test finds with `POWER` at the 5 % level.

    Fewer than `FEWEST_PROMPTS` show none; the whole 100 points stand for that.

    Args:
        n: prompts.
        discordant_share: share of the prompts on which the two models differ; the more, the coarser the test.

    Raises:
        ValueError: `n` is not positive, or `discordant_share` is not in (0, 1].

    Source: R. J. Connor, Biometrics 43 (1987), 207-211, solved for the difference; never below what the exact test
    needs where all disagreements are one-sided.
    """
    if n <= 0 or not 0 < discordant_share <= 1:
        raise ValueError(f"needs n > 0 and 0 < discordant_share <= 1, got {n} and {discordant_share}")
    z_level, z_power = z_value(CONFIDENCE), NormalDist().inv_cdf(POWER)
    low, high = 0.0, discordant_share
    for _ in range(60):
        middle = (low + high) / 2
        if (z_level * sqrt(discordant_share) + z_power * sqrt(max(0.0, discordant_share - middle * middle))) / sqrt(
            n
        ) > middle:
            low = middle
        else:
            high = middle
    return 100 * min(1.0, max(high, _FEWEST_DISAGREEMENTS / n))


def _discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """Return how many pairs are true in the first only, and in the second only."""
    if len(first) != len(second):
        raise ValueError(f"paired outcomes must be of the same prompts: {len(first)} against {len(second)}")
    return sum(a and not b for a, b in zip(first, second, strict=True)), sum(
        b and not a for a, b in zip(first, second, strict=True)
    )


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Return the phi coefficient with Newcombe's continuity correction for positive association."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_first * only_second
    n = both + only_first + only_second + neither
    return (max(product - n / 2, 0.0) if product > 0 else product) / sqrt(margins)
