"""`python -m benchmarks.kernels`: time every calibration kernel on the present GPU, beside its definition.

An op is first checked against its definition on the inputs that are timed: what differs gives no number.
`--only-report` renders the rows that are there, also those of another machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import torch

from benchmarks.calibration.ceilings import Ceilings, measure_ceilings
from benchmarks.kernels.measures import Measure, all_measures
from benchmarks.kernels.results import RESULTS, Row, publish, read_rows, write_rows
from benchmarks.summary import SUMMARY, provenance
from benchmarks.timing import bring_clocks_up, eager_seconds, graph_seconds


def measure_row(measure: Measure, ceilings: Ceilings) -> Row:
    """Check and time one op.

    Raises:
        AssertionError: the op does not give what its definition gives.
    """
    prepared = measure.prepare()
    prepared.check()
    floor = max(measure.bytes / (ceilings.copy * 1e9), measure.operations / (ceilings.bf16 * 1e12))
    return Row(
        kernel=measure.kernel,
        variant=measure.variant,
        shape=" x ".join(map(str, measure.shape)),
        bytes=measure.bytes,
        operations=measure.operations,
        copies=measure.copies,
        seconds=graph_seconds(prepared.calls),
        definition_seconds=eager_seconds(prepared.definition),
        floor_s=floor,
        copy_gb_s=ceilings.copy,
        **provenance(),
    )


def compile_measure(index: int) -> None:
    """Run one op once, which leaves its machine code in Triton's cache."""
    list(all_measures())[index].prepare().calls[0]()
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV of the rows")
    parser.add_argument("--summary", type=Path, default=SUMMARY, help="headline figures")
    parser.add_argument("--docs", type=Path, help="document that holds the table")
    parser.add_argument("--only", nargs="+", help="only ops whose name begins with one of these")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile first (default: 12)")
    parser.add_argument("--only-report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    failed = False
    if not args.only_report:
        chosen = [
            (index, measure)
            for index, measure in enumerate(all_measures())
            if args.only is None or measure.kernel.startswith(tuple(args.only))
        ]
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for task in [pool.apply_async(compile_measure, (index,)) for index, _ in chosen]:
                task.wait()  # what fails here fails again below, with its reason
        bring_clocks_up()
        ceilings = measure_ceilings(torch.device("cuda"))
        rows: list[Row] = []
        for _, measure in chosen:
            try:
                row = measure_row(measure, ceilings)
            except Exception as error:  # an op that differs or does not run leaves its reason and stops no other
                failed = True
                print(f"{measure.kernel}; {measure.variant}; {measure.shape}: no number: {error!r}", flush=True)
                continue
            rows.append(row)
            print(f"{row.kernel}; {row.variant}; {row.shape}: {row.seconds * 1e6:.1f} us, {row.share:.2f}", flush=True)
            write_rows(args.results, rows)
            publish(rows, None, args.summary)
    print(publish(read_rows(args.results), args.docs, args.summary))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
