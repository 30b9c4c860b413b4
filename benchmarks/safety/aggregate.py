"""Results over seeds: means, intervals, spread between seeds, and paired tests against named rivals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from benchmarks.safety.plan import BASELINE, OURS, Job, Plan, is_seedless
from qrealign.errors import DataError
from qrealign.evaluate.serialise import from_json
from qrealign.evaluate.statistics import minimum_detectable_difference, repeated_score, sign_flip, spread
from qrealign.files import read_json
from qrealign.records import ModelScores

# Scores that are shares of prompts, in the order of the table.
SHARES = ("harmful_score", "over_refusal", "refusal_rate", "degenerate_rate", "task_accuracy", "prefill_attack")
RIVALS = (BASELINE, OURS, "aligned", "finetuned")
_MEASURING = frozenset({"evaluate", "analyse"})  # the other stages are what a repair costs


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured model. `seconds` is the repair's, without its evaluation; `evaluation_seconds` the latter's."""

    job: Job
    scores: ModelScores
    seconds: float
    evaluation_seconds: float
    commit: str | None
    date: str
    machine: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A job without a result, and why."""

    job: Job
    error: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure over seeds: the mean, its 95 % interval where it is a share, and the spread between seeds.

    `spread` is the standard deviation of the seeds' values, 0 for a single one; `n` counts prompts. The interval pools
    the seeds as tries of the same prompts (see `repeated_score`), so it says what other prompts might give, and the
    spread what another seed might.
    """

    mean: float
    spread: float = 0.0
    low: float | None = None
    high: float | None = None
    n: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a model, or a method under a scheme, over its seeds.

    `outcomes` maps a score to one list per seed, in the order of `seeds`; `by_source` holds mean harmful scores.
    """

    variant: str
    scheme: str
    method: str
    seeds: tuple[int, ...]
    figures: dict[str, Estimate]
    by_source: dict[str, float]
    outcomes: dict[str, list[list[bool]]] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row against a rival on the same prompts: `delta` is row less rival, in percentage points.

    `p_value` is exact: McNemar's test with one seed, with several the sign-flip test over prompts. The smallest
    difference that McNemar's test would have found with 80 % power is that for one seed, given on how many prompts of
    one seed the two differ, on average.
    """

    variant: str
    scheme: str
    method: str
    rival: str
    score: str
    delta: float
    p_value: float
    minimum_detectable_difference: float
    n: int
    seeds: int


def load_results(plan: Plan) -> tuple[list[Result], list[Failure]]:
    """Return what the plan's jobs have left, in their order; jobs that never ran are failures too.

    Raises:
        DataError: a result cannot be read.
    """
    results, failures = [], []
    for job in plan.measurements():
        file = plan.result_file(job)
        if not file.is_file():
            failures.append(Failure(job=job, error="not measured"))
            continue
        try:
            value = read_json(file)
            if "error" in value:
                failures.append(Failure(job=job, error=value["error"]))
            else:
                results.append(_result(job, value))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is no result of this benchmark ({error}): remove it and run again") from error
    return results, failures


def _result(job: Job, value: dict) -> Result:
    seconds = {stage["name"]: stage["wall_seconds"] for stage in value["cost"]}
    return Result(
        job=job,
        scores=from_json(value["scores"]),
        seconds=sum(second for name, second in seconds.items() if name not in _MEASURING),
        evaluation_seconds=seconds["evaluate"],
        commit=value["commit"],
        date=value["created"][:10],
        machine=value["versions"],
    )


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Return the results over seeds: variant by variant, references first, then scheme by scheme."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.job.variant, result.job.scheme, result.job.method), []).append(result)
    variants, schemes = (list(dict.fromkeys(key[part] for key in groups)) for part in (0, 1))
    order = sorted(groups, key=lambda key: (variants.index(key[0]), key[1] != "", schemes.index(key[1])))
    return [_row(groups[key]) for key in order]


def _row(group: Sequence[Result]) -> Row:
    scores = [result.scores for result in group]
    outcomes = {name: [s.outcomes[name] for s in scores] for name in SHARES if all(name in s.outcomes for s in scores)}
    figures = {name: _share(tries) for name, tries in outcomes.items()}
    perplexities = [s.perplexity for s in scores if s.perplexity is not None]
    if perplexities:
        figures["perplexity"] = Estimate(mean=fmean(perplexities), spread=spread(perplexities))
    seconds = [result.seconds for result in group]
    figures["seconds"] = Estimate(mean=fmean(seconds), spread=spread(seconds))
    job = group[0].job
    return Row(
        variant=job.variant,
        scheme=job.scheme,
        method=job.method,
        seeds=tuple(result.job.seed for result in group),
        figures=figures,
        by_source={source: fmean(s.by_source[source].value for s in scores) for source in scores[0].by_source},
        outcomes=outcomes,
    )


def _share(tries: Sequence[Sequence[bool]]) -> Estimate:
    """Return the estimate of a score from one list of outcomes per seed."""
    pooled = repeated_score(tries)
    return Estimate(
        mean=pooled.value,
        spread=spread([100 * sum(seed) / len(seed) for seed in tries]),
        low=pooled.low,
        high=pooled.high,
        n=pooled.n,
    )


def comparisons_of(rows: Sequence[Row]) -> list[Comparison]:
    """Return every method's row against each rival of the same variant and scheme, per score."""
    found = []
    for row in (row for row in rows if row.scheme):
        for rival in RIVALS:
            other = _find(rows, row.variant, row.scheme, rival)
            if other is not None and other is not row:
                found += [c for name in row.outcomes if (c := compare(row, other, name)) is not None]
    return found


def _find(rows: Iterable[Row], variant: str, scheme: str, method: str) -> Row | None:
    """Return a method's row under a scheme, or a reference's, which has none."""
    return next(
        (row for row in rows if (row.variant, row.method) == (variant, method) and row.scheme in (scheme, "")), None
    )


def compare(row: Row, rival: Row, score: str) -> Comparison | None:
    """Return the paired comparison of one score over the seeds that both have; None where they share none.

    What does not depend on the seed (plain rounding, a reference) counts once per seed of the other.
    """
    mine, theirs = _by_seed(row, rival, score), _by_seed(rival, row, score)
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds or len(mine[seeds[0]]) != len(theirs[seeds[0]]):
        return None
    first, second = _counts([theirs[seed] for seed in seeds]), _counts([mine[seed] for seed in seeds])
    n = len(first)
    pairs = [pair for seed in seeds for pair in zip(mine[seed], theirs[seed], strict=True)]
    differing = max(1.0, sum(a != b for a, b in pairs) / len(seeds))  # in one seed
    return Comparison(
        variant=row.variant,
        scheme=row.scheme,
        method=row.method,
        rival=rival.method,
        score=score,
        delta=100 * (sum(second) - sum(first)) / (n * len(seeds)),
        p_value=sign_flip(first, second),
        minimum_detectable_difference=minimum_detectable_difference(n, discordant_share=differing / n),
        n=n,
        seeds=len(seeds),
    )


def _by_seed(row: Row, other: Row, score: str) -> dict[int, list[bool]]:
    """Return a row's outcomes per seed; one that all seeds share stands for each seed of `other`."""
    outcomes = row.outcomes.get(score, [])
    if outcomes and (not row.scheme or is_seedless(row.method)):
        return dict.fromkeys({*row.seeds, *other.seeds}, outcomes[0])
    return dict(zip(row.seeds, outcomes, strict=False))


def _counts(tries: Sequence[Sequence[bool]]) -> list[int]:
    """Return, per prompt, in how many tries its outcome is true."""
    return [sum(outcomes) for outcomes in zip(*tries, strict=True)]
