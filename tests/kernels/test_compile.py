"""Every Triton kernel compiles for the GPUs that users have and fits them; no GPU is needed."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from benchmarks.fit.__main__ import problems, table
from benchmarks.fit.cases import all_cases, sample
from benchmarks.fit.compiling import TARGETS, Fit, compile_all

FIT = Fit("token, codes", "default", "4096", 89, 8, 64, 1024, 0)


def test_kernels_compile_and_fit(request: pytest.FixtureRequest) -> None:
    chosen = sample(all_cases().values())
    jobs = [(build.case, build.gpu_class, build.key, target) for build, target in chosen]
    rows = compile_all(jobs, cache=request.config.cache.mkdir("triton"))
    assert len(rows) == len(jobs)
    assert problems(rows) == []


def test_sample_has_every_kernel_for_every_target_but_one() -> None:
    cases = all_cases()
    targets = {(cases[build.case].kernel, target) for build, target in sample(cases.values())}
    assert targets == {(case.kernel, target) for case in cases.values() for target in TARGETS if target != 86}


def test_a_failure_ends_the_compilation_with_its_words() -> None:
    with pytest.raises(RuntimeError, match="no-such-key"):
        compile_all([("token, codes", "default", "no-such-key", 89)])


def test_what_does_not_fit_is_named() -> None:
    wrong = [dataclasses.replace(FIT, shared_bytes=99 * 1024 + 1), dataclasses.replace(FIT, spilled_bytes=8)]
    assert [problem.rpartition(": ")[2] for problem in problems([FIT, *wrong])] == [
        "101377 bytes of shared memory",
        "8 bytes of spills a thread",
    ]


@pytest.mark.parametrize(
    ("change", "occupancy"),
    [
        ({}, 32 / 48),  # registers: 4 programs of 8 warps
        ({"registers": 32}, 1.0),
        ({"shared_bytes": 60 * 1024}, 8 / 48),
        ({"registers": 255, "num_warps": 4}, 8 / 48),
    ],
)
def test_occupancy(change: dict[str, int], occupancy: float) -> None:
    assert dataclasses.replace(FIT, **change).occupancy == pytest.approx(occupancy)


def test_table_has_the_most_of_all_choices_for_every_target() -> None:
    more = dataclasses.replace(FIT, key="8192", registers=128, spilled_bytes=8)
    text = table([dataclasses.replace(fit, target=target) for target in TARGETS for fit in (FIT, more)])
    assert text.splitlines()[2].count("| 128 / 1.0 / ") == len(TARGETS)
    assert text.splitlines()[2].startswith("| token, codes | 2 |")
    assert "8 B spilled" in text
