"""What every build takes, kept beside a digest of all that it was compiled from.

All builds take minutes to compile and change seldom. A build whose digest stands in the record needs no compiling to
know that it fits; one whose kernel, constants or launch choice has changed is not found there.
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import inspect
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import FunctionType
from typing import Any

import triton.language as tl

from benchmarks.fit.cases import HOST, Build, Case, all_cases, jobs
from benchmarks.fit.compiling import Fit
from benchmarks.summary import SUMMARY
from qrealign.files import write_text

RECORD = SUMMARY.parent / "fit.csv"
_OF_THE_MODE = ("INTERPRETED",)  # globals that say whether kernels are interpreted: compiled ones never are


def builds_by_digest(targets: Sequence[int]) -> dict[str, tuple[Build, int]]:
    """Return every build with every target that uses it, by their digests."""
    cases = all_cases()
    return {
        digest(cases[build.case], build, target): (build, target) for build, target in jobs(cases.values(), targets)
    }


def digest(case: Case, build: Build, target: int) -> str:
    """Return 16 hexadecimal digits for what the build's machine code follows from, Triton's version aside."""
    choice = [(name, value) for name, value in build.choice if name not in HOST]
    use = (case.types, case.constants, case.from_key(build.key), case.aligned, case.fp_fusion, choice, target)
    parts = (build.case, build.gpu_class, build.key, *map(str, use), *_sources(case.kernel))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _sources(kernel: object) -> Iterator[str]:
    """Yield the source of a kernel and of the functions it calls, and the values of the constants they name."""
    waiting: list[Any] = [kernel]
    seen = {id(kernel)}
    while waiting:
        function: FunctionType = getattr(waiting[0], "fn", waiting[0])
        del waiting[0]
        source, names = _read(function)
        yield source
        for name in names:
            value = function.__globals__[name]
            if isinstance(value, tl.constexpr | int | float | str):
                yield f"{name} = {value}"
            elif inspect.isfunction(getattr(value, "fn", value)) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)


@functools.cache
def _read(function: FunctionType) -> tuple[str, list[str]]:
    """Return the source of a function and the globals that it names."""
    source = textwrap.dedent(inspect.getsource(function))
    named = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    return source, sorted(named & function.__globals__.keys() - set(_OF_THE_MODE))


def read_record(path: Path = RECORD) -> dict[str, Fit]:
    """Return the recorded builds by digest; none if there is no record yet."""
    if not path.exists():
        return {}
    numbers = {field.name for field in fields(Fit) if field.type == "int"}
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    return {
        row.pop("digest"): Fit(**{name: int(text) if name in numbers else text for name, text in row.items()})  # type: ignore[arg-type]
        for row in rows
    }


def write_record(fits: Mapping[str, Fit], path: Path = RECORD) -> None:
    """Write the builds by digest, in place of what stood there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["digest", *(field.name for field in fields(Fit))], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"digest": name, **asdict(fit)} for name, fit in fits.items())
    write_text(path, text.getvalue())
