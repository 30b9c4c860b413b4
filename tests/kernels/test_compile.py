"""Every Triton kernel compiles for the GPUs that users have and fits them; no GPU is needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.fit.__main__ import problems, table
from benchmarks.fit.cases import Case, all_cases, builds, sample
from benchmarks.fit.compiling import TARGETS, Fit, compile_all
from benchmarks.fit.record import builds_by_digest, digest, read_record, write_record
from qrealign_kernels import triton_math

FIT = Fit("token, codes", "default", "4096", 89, 8, 64, 1024, 0, "3.9.0")
AGAIN = "python -m benchmarks.fit --docs docs/kernels.md"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Fit]:
    return read_record()


def test_every_kernel_with_every_choice_fits_every_target(recorded: dict[str, Fit]) -> None:
    assert builds_by_digest(TARGETS).keys() == recorded.keys(), (
        f"kernels, choices or their uses have changed since: {AGAIN}"
    )
    assert problems(list(recorded.values())) == []


def test_a_build_of_every_kernel_compiles_to_what_is_recorded(recorded: dict[str, Fit]) -> None:
    cases = all_cases()
    chosen = sample(cases.values(), TARGETS)
    assert {cases[build.case].kernel for build, _ in chosen} == {case.kernel for case in cases.values()}
    assert {target for _, target in chosen} == set(TARGETS)
    fits = compile_all([(build.case, build.gpu_class, build.key, target) for build, target in chosen])
    assert problems(fits) == []
    known = [recorded[digest(cases[build.case], build, target)] for build, target in chosen]
    # Another version of the compiler allocates registers otherwise.
    assert [(fit, old) for fit, old in zip(fits, known, strict=True) if fit.triton == old.triton and fit != old] == []


def test_the_digest_changes_with_what_is_compiled() -> None:
    case = next(case for case in all_cases().values() if case.name == FIT.case)
    build = next(builds(case))

    def of(case: Case, **change: object) -> str:
        return digest(case, dataclasses.replace(build, **change), 89)

    other = next(other for other in all_cases().values() if other.kernel is not case.kernel)
    changed = [
        dataclasses.replace(case, kernel=other.kernel),
        dataclasses.replace(case, constants={**case.constants, "ANOTHER": 1}),
        dataclasses.replace(case, fp_fusion=not case.fp_fusion),
    ]
    digests = [of(case), *map(of, changed), of(case, choice=(("num_warps", 32),)), digest(case, build, 90)]
    assert len(set(digests)) == len(digests)
    assert of(case) == of(case, choice=(*build.choice, ("PROGRAMS", 7))), "read by the launching code alone"


def test_the_digest_follows_called_functions_and_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in all_cases().values() if case.name == FIT.case)
    build = next(builds(case))
    before = digest(case, build, 89)
    monkeypatch.setattr(triton_math, "ROUNDER", 1.0)
    assert digest(case, build, 89) != before


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record({"0123": FIT}, tmp_path / "fit.csv")
    assert read_record(tmp_path / "fit.csv") == {"0123": FIT}
    assert read_record(tmp_path / "none.csv") == {}


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
