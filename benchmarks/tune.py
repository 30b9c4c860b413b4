"""`python -m benchmarks.tune [--kernels NAME ...]`: find launch choices for the present GPU and write its table.

Every kernel that has a launch table is a `Tunable` of `benchmarks.tunables`. Candidates are compiled by many
processes first, then timed one after the other as CUDA graphs over inputs that do not stay in the L2 cache. A table is
changed for the keys that were tuned alone, and only where the best candidate beats what stands there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.timing import graph_seconds
from benchmarks.tunables.tunable import all_tunables
from qrealign.files import write_text
from qrealign_kernels import launches
from qrealign_kernels.launches import Choice, Table

WORTH = 0.98  # of the time of the choice that stands: what a new one must stay below


def compile_candidates(name: str, key: str, choices: Sequence[Choice]) -> None:
    """Launch each candidate once, which leaves its machine code in Triton's cache; `tune` drops what cannot run."""
    tunable = all_tunables()[name]
    call = tunable.make_calls(*tunable.keys[key])[0]
    for choice in choices:
        try_launch(name, choice, call)


def try_launch(name: str, choice: Choice, call: Callable[[], object]) -> str | None:
    """Return why a candidate cannot run on this GPU (mostly too much shared memory), or None."""
    from triton.runtime.errors import OutOfResources

    try:
        with launches.forced(name, choice):
            call()
        torch.cuda.synchronize()
    except OutOfResources as error:
        return str(error)
    return None


def tune(name: str, key: str) -> list[tuple[float, Choice | None]]:
    """Return seconds and choice of every candidate that runs, the fastest first; None is the way without the kernel."""
    tunable = all_tunables()[name]
    calls = tunable.make_calls(*tunable.keys[key])
    found: list[tuple[float, Choice | None]] = []
    for choice in [*tunable.candidates(key), *([None] if tunable.optional else [])]:
        if choice is not None and (reason := try_launch(name, choice, calls[0])) is not None:
            print(f"{name} {key} {choice}: {reason}", flush=True)
            continue
        with launches.forced(name, choice):
            found.append((graph_seconds(calls), choice))
    return sorted(found, key=lambda pair: pair[0])


def better_choice(found: Sequence[tuple[float, Choice | None]], standing: Choice | None) -> Choice | None:
    """Return what the table is to hold for a key, where it held `standing`; None for no entry."""
    if not found:
        return standing
    best_seconds, best = found[0]
    before = next((seconds for seconds, choice in found if choice == standing), None)
    return best if before is None or best_seconds < WORTH * before else standing


def write_table(path: Path, table: Table) -> None:
    """Write a launch table, a line a key."""
    kernels = []
    for kernel, entries in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(choice)}" for key, choice in entries.items())
        kernels.append(f"  {json.dumps(kernel)}: {{\n{lines}\n  }}")
    write_text(path, "{\n" + ",\n".join(kernels) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--kernels", nargs="+", help="names in the launch tables; default: all")
    parser.add_argument("--keys", nargs="+", help="only these keys of theirs")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile (default: 8)")
    parser.add_argument("--output", type=Path, help="default: the committed table of this GPU's class")
    args = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    path = args.output or launches.TABLES / f"sm{major}{minor}.json"
    table: Table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    work = [
        (tunable, key)
        for tunable in all_tunables().values()
        for key in tunable.keys
        if (args.kernels is None or tunable.name in args.kernels) and (args.keys is None or key in args.keys)
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        compiled = [
            pool.apply_async(compile_candidates, (tunable.name, key, candidates[index :: args.jobs]))
            for tunable, key in work
            for candidates in [tunable.candidates(key)]
            for index in range(min(args.jobs, len(candidates)))
        ]
        for task in compiled:
            task.get()
    for tunable, key in work:
        found = tune(tunable.name, key)
        for seconds, choice in found[:5]:
            print(f"{tunable.name} {key} {seconds * 1e6:.1f} us {choice}", flush=True)
        entries = table.setdefault(tunable.name, {})
        if (best := better_choice(found, entries.get(key))) is None:
            entries.pop(key, None)
        else:
            entries[key] = best
        write_table(path, {kernel: choices for kernel, choices in table.items() if choices})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
