"""`python -m benchmarks.cuda`: for which tokens and weights the CUDA extension is worth its compiler.

Every product is timed as the library would compute it with the extension and without, in CUDA graphs over weights that
do not stay in the L2 cache; tokens are rounded inside the timed call.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from unittest import mock

import torch

import qrealign_kernels as kernels
from benchmarks.docs import markdown_table, put_table
from benchmarks.summary import provenance
from benchmarks.timing import graph_seconds, rotations
from qrealign.files import write_text
from qrealign_kernels import cuda

RESULTS = Path(__file__).parents[1] / "results" / "cuda.csv"
TABLE = "cuda table"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (12288, 4096))  # (N, K) of a 7B model's layers
TOKENS = (1, 2, 4, 8, 16)
GROUP = 128
SCHEMES = {"w4a16_g128": (4, None), "w8a8": (8, 8)}


@dataclass(frozen=True)
class Timing:
    """One product in microseconds: torch's in bfloat16, Triton's, and the extension's."""

    scheme: str
    rows: int
    columns: int
    tokens: int
    bf16_us: float
    triton_us: float
    cuda_us: float


def measure(scheme: str, rows: int, columns: int, tokens: int) -> Timing:
    """Time one product in all three ways."""
    num_bits, activation_bits = SCHEMES[scheme]
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    dense = [
        torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(rotations(2 * rows * columns))
    ]
    bf16 = graph_seconds([partial(torch.nn.functional.linear, x, weight) for weight in dense])
    low, high = -(1 << (num_bits - 1)), 1 << (num_bits - 1)
    calls = []
    for _ in range(rotations(rows * columns * num_bits // 8)):
        codes = torch.randint(low, high, (rows, columns), dtype=torch.int8, device="cuda")
        scale = torch.rand(rows, 1 if num_bits == 8 else columns // GROUP, device="cuda").bfloat16() + 0.1
        weight = kernels.repack_weight(codes, scale, num_bits=num_bits, activation_bits=activation_bits)
        calls.append(partial(kernels.packed_linear, x, weight))
    extension = graph_seconds(calls)
    with mock.patch.object(cuda, "packed_linear", lambda *operands: None):
        triton = graph_seconds(calls)
    return Timing(scheme, rows, columns, tokens, *(round(1e6 * seconds, 2) for seconds in (bf16, triton, extension)))


def table(timings: Sequence[Timing]) -> str:
    """Return the Markdown table: microseconds, and bfloat16's time over the extension's."""
    lines = []
    for t in timings:
        times = (t.bf16_us, t.triton_us, t.cuda_us)
        shape = [t.scheme, f"{t.rows}x{t.columns}", str(t.tokens)]
        lines.append([*shape, *(f"{time:.1f}" for time in times), f"{t.bf16_us / t.cuda_us:.2f}"])
    for scheme, tokens in dict.fromkeys((t.scheme, t.tokens) for t in timings):
        here = [t for t in timings if (t.scheme, t.tokens) == (scheme, tokens)]
        gain = geometric_mean([t.bf16_us / t.cuda_us for t in here])
        over_triton = geometric_mean([t.triton_us / t.cuda_us for t in here])
        lines.append([scheme, "all, mean", str(tokens), "", f"{over_triton:.2f} x", "", f"{gain:.2f}"])
    header = ["weights", "NxK", "M", "torch bf16, µs", "Triton, µs", "with the extension, µs", "bf16 / extension"]
    return markdown_table(header, lines, "llrrrrr")


def write_csv(path: Path, timings: Sequence[Timing]) -> None:
    """Write a line a product, each with what it was measured on."""
    about = provenance()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*asdict(timings[0]), *about], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(timing) | about for timing in timings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[Timing]:
    """Return the timings of a file that `write_csv` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [
            Timing(
                row["scheme"],
                *(int(row[name]) for name in ("rows", "columns", "tokens")),
                *(float(row[name]) for name in ("bf16_us", "triton_us", "cuda_us")),
            )
            for row in csv.DictReader(lines)
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="CSV")
    parser.add_argument("--only-report", action="store_true", help="measure nothing: the table of what --output holds")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="default: %(default)s")
    parser.add_argument("--docs", type=Path, metavar="MD", help=f"document with the markers of the {TABLE!r}")
    options = parser.parse_args(arguments)
    if not options.only_report and (reason := cuda.unavailable_reason()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    if not options.only_report:
        timings: list[Timing] = []
        for scheme in SCHEMES:
            for rows, columns in SHAPES:
                for tokens in options.tokens:
                    timings.append(measure(scheme, rows, columns, tokens))
                    print(timings[-1], flush=True)
                write_csv(options.output, timings)
    text = table(read_csv(options.output))
    print(text)
    if options.docs is not None:
        put_table(options.docs, TABLE, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
