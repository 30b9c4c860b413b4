"""`python -m benchmarks.fit [--docs docs/kernels.md]`: compile every kernel with every launch choice a target can get.

That is all of the default table, for each target, and all of a target's own table. What has not changed since it was
compiled last is taken from the record (`results/fit.csv`), which the tests hold against the kernels and the tables.

Needs no GPU. Prints the table of the documentation, which `--docs` renders, and what does not fit; all anew, some ten
minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.docs import markdown_table, put_table
from benchmarks.fit.cases import all_cases
from benchmarks.fit.compiling import SHARED_LIMIT, TARGETS, Fit, compile_all
from benchmarks.fit.record import builds_by_digest, read_record, write_record

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
    """Return the table: a row a kernel, a column a target, and in it the most and the least of all launch choices."""
    body = []
    for case in dict.fromkeys(row.case for row in rows):
        fits = [[row for row in rows if row.case == case and row.target == target] for target in TARGETS]
        body.append([case, str(len(fits[0])), *map(_cell, fits)])
    return markdown_table(["kernel", "choices", *(f"sm_{target}" for target in TARGETS)], body, "lr")


def _cell(fits: Sequence[Fit]) -> str:
    registers, shared = max(fit.registers for fit in fits), max(fit.shared_bytes for fit in fits)
    spilled = max(fit.spilled_bytes for fit in fits)
    text = f"{registers} / {shared / 1024:.1f} / {100 * min(fit.occupancy for fit in fits):.0f} %"
    return f"{text}, {spilled} B spilled" if spilled else text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__)
    parser.add_argument("--docs", type=Path, help="document that holds the table")
    parser.add_argument("--all", action="store_true", help="compile what is recorded too")
    args = parser.parse_args()
    wanted = builds_by_digest(TARGETS)
    known = {} if args.all else read_record()
    new = {name: job for name, job in wanted.items() if name not in known}
    print(f"{len(wanted)} builds, {len(new)} of them to compile", flush=True)
    compiled = compile_all([(build.case, build.gpu_class, build.key, target) for build, target in new.values()])
    fits = known | dict(zip(new, compiled, strict=True))
    write_record({name: fits[name] for name in wanted})
    rows = [fits[name] for name in wanted]
    text = f"{table(rows)}\nCompiled by triton {', '.join(sorted({row.triton for row in rows}))}.\n"
    print(text)
    if args.docs is not None:
        put_table(args.docs, DOCS_NAME, text)
    for problem in (wrong := problems(rows)):
        print(problem)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
