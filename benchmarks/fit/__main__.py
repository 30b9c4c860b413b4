"""`python -m benchmarks.fit [--docs docs/kernels.md]`: compile every kernel with every launch choice for every target.

Needs no GPU. Prints a row a build and target; `--docs` renders the table of the documentation, a row a kernel with the
launch choices of 7B layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.docs import markdown_table, put_table
from benchmarks.fit.cases import all_cases, builds
from benchmarks.fit.compiling import SHARED_LIMIT, TARGETS, Fit, compile_all

DOCS_NAME = "fit table"


def problems(rows: Sequence[Fit]) -> list[str]:
    """Return what does not fit: too much shared memory for the target, or spills in a hot kernel."""
    cases = all_cases()
    found = []
    for row in rows:
        where = f"{row.case}, {row.gpu_class}/{row.key}, sm_{row.target}"
        if row.shared_bytes > SHARED_LIMIT[row.target]:
            found.append(f"{where}: {row.shared_bytes} bytes of shared memory")
        if row.spilled_bytes and cases[row.case].hot:
            found.append(f"{where}: {row.spilled_bytes} bytes of spills a thread")
    return found


def table(rows: Sequence[Fit]) -> str:
    """Return the table: a row a kernel and launch choice, a column a target."""
    cells = {(row.case, row.gpu_class, row.key, row.target): row for row in rows}
    body = []
    for case, gpu_class, key in dict.fromkeys(name[:3] for name in cells):
        fits = [cells.get((case, gpu_class, key, target)) for target in TARGETS]
        warps = next(fit.num_warps for fit in fits if fit is not None)
        body.append([case, f"{gpu_class}/{key}", str(warps), *map(_cell, fits)])
    return markdown_table(["kernel", "launch", "warps", *(f"sm_{target}" for target in TARGETS)], body, "llr")


def _cell(fit: Fit | None) -> str:
    if fit is None:
        return ""
    spills = f", {fit.spilled_bytes} B spilled" if fit.spilled_bytes else ""
    return f"{fit.registers} / {fit.shared_bytes / 1024:.1f} / {100 * fit.occupancy:.0f} %{spills}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__)
    parser.add_argument("--docs", type=Path, help="document that holds the table")
    parser.add_argument("--cases", nargs="+", help="only these")
    args = parser.parse_args()
    chosen = [case for name, case in all_cases().items() if args.cases is None or name in args.cases]
    jobs = [
        (build.case, build.gpu_class, build.key, target)
        for case in chosen
        for build in builds(case)
        for target in build.targets(TARGETS)
    ]
    rows = compile_all(jobs)
    text = table(sorted(rows, key=lambda row: jobs.index((row.case, row.gpu_class, row.key, row.target))))
    print(text)
    if args.docs is not None:
        put_table(args.docs, DOCS_NAME, text)
    for problem in (wrong := problems(rows)):
        print(problem)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
