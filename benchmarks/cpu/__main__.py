"""`python -m benchmarks.cpu`: times every path, and writes the table, the CSV and the headline figure."""

from __future__ import annotations

import argparse
import csv
import io
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import quantiles
from time import perf_counter, process_time

import torch

from benchmarks.cpu.paths import PATHS, Call, Layer
from benchmarks.docs import markdown_table, put_table
from benchmarks.summary import SUMMARY, provenance, record
from qrealign.files import write_text
from qrealign_kernels import cpu_linear

RESULTS = Path(__file__).parents[1] / "results" / "cpu.csv"
TABLE = "cpu table"
OURS = "qrealign w8a8"
CODES_GIVEN = "codes given"  # of a path that does not round its tokens, and so does less than a layer has to
TOKENS = (1, 16, 128)
HEADLINE = ((4096, 4096), (1, 128))  # shape and tokens of the figure in summary.json


@dataclass(frozen=True)
class Timing:
    """One path at one shape, in milliseconds: of processor time with one thread, else of wall-clock time."""

    rows: int
    columns: int
    tokens: int
    family: str
    path: str
    p50: float
    p20: float
    p80: float


def measure(rows: int, columns: int, tokens: int, seconds: float) -> list[Timing]:
    """Time all paths at one shape, each round in another order: what disturbs the machine meets all of them alike.

    In turn they also push each other's weights out of the caches, as the other layers of a model do. With one thread,
    time during which the system gave the core to someone else does not count.
    """
    clock = process_time if torch.get_num_threads() == 1 else perf_counter
    shuffle = Random(0).shuffle
    layer = Layer.random(rows, columns, tokens)
    calls: dict[tuple[str, str], Call] = {}
    for family, paths in PATHS.items():
        for name, prepare in paths.items():
            try:
                call = prepare(layer)
                call()
            except (RuntimeError, NotImplementedError) as error:
                print(f"{name}: {next(iter(str(error).splitlines()), error)}", file=sys.stderr)
                continue
            calls[family, name] = call
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    end = perf_counter() + seconds
    while perf_counter() < end or min(map(len, times.values())) < 5:
        order = list(calls)
        shuffle(order)
        for key in order:
            start = clock()
            calls[key]()
            times[key].append(1e3 * (clock() - start))
    timings = []
    for (family, name), all_times in times.items():
        deciles = quantiles(all_times, n=10, method="inclusive")
        timings.append(Timing(rows, columns, tokens, family, name, p50=deciles[4], p20=deciles[1], p80=deciles[7]))
    return timings


def best_of_torch(timings: Sequence[Timing], family: str) -> Timing:
    """Return torch's fastest path of a family from floating point tokens to floating point outputs."""
    whole = [t for t in timings if t.family == family and t.path.startswith("torch") and CODES_GIVEN not in t.path]
    return min(whole, key=lambda t: t.p50)


def headline(timings: Sequence[Timing]) -> float | None:
    """Return the smaller of the ratios torch's best / ours at one and at 128 tokens, None if they were not measured."""
    (rows, columns), tokens = HEADLINE
    ratios = []
    for count in tokens:
        here = [t for t in timings if (t.rows, t.columns, t.tokens) == (rows, columns, count)]
        if not here:
            return None
        ours = next(t for t in here if t.path == OURS)
        ratios.append(best_of_torch(here, "int8").p50 / ours.p50)
    return min(ratios)


def table(timings: Sequence[Timing]) -> str:
    """Return the Markdown table: a line a path, a column a shape and number of tokens."""
    cells = {(t.family, t.path, t.rows, t.columns, t.tokens): t for t in timings}
    columns = list(dict.fromkeys((t.rows, t.columns, t.tokens) for t in timings))
    lines = []
    for family, path in dict.fromkeys((t.family, t.path) for t in timings):
        found = [cells.get((family, path, *column)) for column in columns]
        name = f"**{path}**" if path.startswith("qrealign") else path
        lines.append([family, name, *("" if t is None else f"{t.p50:.2f}" for t in found)])
    header = ["weights", "path", *(f"{rows}x{k}, M = {tokens}" for rows, k, tokens in columns)]
    return markdown_table(header, lines, "ll" + "r" * len(columns))


def write_csv(path: Path, timings: Sequence[Timing], threads: int, stamp: Mapping[str, str]) -> None:
    """Write a line a timing, each with what it was measured on; `stamp` as `provenance` gave it."""
    about = {
        "threads": threads,
        "isa": cpu_linear.isa(),
        "cpu": processor(),
        "torch": stamp["torch"],
        "commit": stamp["commit"],
    }
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*asdict(timings[0]), *about], lineterminator="\n")
    writer.writeheader()
    for timing in timings:
        times = {name: f"{getattr(timing, name):.4f}" for name in ("p50", "p20", "p80")}
        writer.writerow(asdict(timing) | times | about)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M")
    parser.add_argument("--seconds", type=float, default=20.0, help="per shape and number of tokens (default: 20)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="CSV")
    parser.add_argument("--summary", type=Path, default=SUMMARY, metavar="JSON")
    parser.add_argument("--docs", type=Path, metavar="MD", help=f"document with the markers of the {TABLE!r}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    stamp = provenance(f"{processor()}, {options.threads} threads")  # before a file is written and the tree another
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    timings = [
        timing
        for rows, columns in shapes
        for tokens in options.tokens
        for timing in measure(rows, columns, tokens, options.seconds)
    ]
    write_csv(options.output, timings, options.threads, stamp)
    print(table(timings))
    if options.docs is not None:
        put_table(options.docs, TABLE, table(timings))
    if (ratio := headline(timings)) is not None:
        print(f"torch's best / ours, the smaller of M = {HEADLINE[1]}: {ratio:.2f}")
        record("serving", {"cpu_int8_linear_vs_torch": round(ratio, 3)}, stamp=stamp, path=options.summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
