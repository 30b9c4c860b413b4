"""The command line of the benchmark: writes the model, measures case by case, and keeps every figure at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.calibration.cases import CASES, DEFAULT, SAMPLES, Case, find_cases
from benchmarks.calibration.ceilings import Ceilings, measure_ceilings
from benchmarks.calibration.geometries import GEOMETRIES, find_geometry
from benchmarks.calibration.goals import headline_figures, record_figures
from benchmarks.calibration.prompts import write_prompts
from benchmarks.calibration.rows import Row, merge_rows, read_rows, write_rows
from benchmarks.calibration.runner import Bench, RunFailed, check_kernels, run_case
from benchmarks.calibration.tables import (
    estimate_table,
    goal_table,
    kernel_tables,
    provenance_lines,
    stage_table,
    step_table,
)
from benchmarks.calibration.weights import write_adapter, write_model
from benchmarks.docs import put_table, split_document
from benchmarks.summary import SUMMARY, provenance
from qrealign.errors import ConfigError
from qrealign.files import read_json, write_json
from qrealign.pipeline.models import choose_device

RESULTS = SUMMARY.parent
DOCS = RESULTS.parents[1] / "docs" / "calibration.md"
TABLE, RATES, KERNELS = "calibration.csv", "calibration_rates.json", "calibration_kernels.json"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.calibration`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration",
        description="Measure whole calibration runs of a named geometry, stage by stage.",
        epilog="Rows are kept as soon as they are measured; several calls add up. See benchmarks/README.md.",
    )
    parser.add_argument("--geometry", default="llama-2-7b", metavar="NAME", help=f"one of {', '.join(GEOMETRIES)}")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer blocks than the model has")
    parser.add_argument(
        "--only", nargs="+", default=list(DEFAULT), metavar="CASE", help=f"cases to run, of: {', '.join(CASES)}"
    )
    parser.add_argument("--shorten", type=int, default=1, metavar="N", help="take N times fewer steps (default: 1)")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"calibration prompts (default: {SAMPLES})"
    )
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="of a prompt (default: 128)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (default), cpu or cuda")
    parser.add_argument("--no-tests", action="store_true", help="do not run the kernels' tests on the GPU first")
    parser.add_argument(
        "--profile", action="store_true", help="list the kernels of the steps; the seconds are not kept"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("out/calibration"), metavar="DIR", help="gets weights and runs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="gets tables and summary")
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="FILE",
        help="document to render (default: docs/calibration.md, with --results none)",
    )
    parser.add_argument("--merge", nargs="+", type=Path, default=[], metavar="DIR", help="other calls' --results first")
    parser.add_argument("--only-report", action="store_true", help="run nothing: summary and document of what is there")
    return parser


def run_command(arguments: Sequence[str] | None = None) -> bool:
    """Run what the command line says; return whether a case has failed.

    Raises:
        QrealignError: one sentence that the user can act on.
    """
    args = build_parser().parse_args(arguments)
    if args.shorten < 1:
        raise ConfigError(f"--shorten must be 1 or more, not {args.shorten}")
    cases = find_cases(args.only)
    docs = args.docs or (DOCS if args.results == RESULTS else None)
    if docs is not None:
        split_document(docs, "goals")  # a document without a place for the tables is said at once
    for folder in args.merge:
        _merge(folder, args.results)
    failed = False
    if not args.only_report:
        bench = _prepare(args)
        for case in cases:
            failed |= not _measure(bench, case, args.results)
    report(args.results, docs)
    return failed


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def _prepare(args: argparse.Namespace) -> Bench:
    """Write the model unless it is there, and measure what the machine can do."""
    geometry, device = find_geometry(args.geometry, args.layers), choose_device(args.device)
    if device.type == "cuda" and not args.no_tests:
        check_kernels()
    say(f"writing random weights of {geometry.folder} into {args.work}, unless they are there")
    model, adapter = write_model(args.work, geometry, device), write_adapter(args.work, geometry)
    ceilings = measure_ceilings(device)
    say(f"rates: {', '.join(f'{name} {value:.4g}' for name, value in asdict(ceilings).items())}")
    stamp = provenance(None if device.type == "cuda" else device.type)
    rates = {**_json(args.results / RATES), stamp["device"]: {**asdict(ceilings), **stamp}}
    write_json(args.results / RATES, rates)
    return Bench(
        geometry=geometry,
        model=model,
        adapter=adapter,
        prompts=write_prompts(args.work / "prompts", args.tokens),
        work=args.work,
        device=device,
        ceilings=ceilings,
        shorten=args.shorten,
        samples=args.samples,
        tokens=args.tokens,
        profile=args.profile,
    )


def _measure(bench: Bench, case: Case, results: Path) -> bool:
    """Run one case and keep its rows, or its kernels where it is profiled; return whether it ended well."""
    say(f"{case.name}: {case.title}")
    try:
        rows, kernels = run_case(bench, case)
    except RunFailed as error:
        say(f"error: {error}")
        return False
    for row in rows:
        say(f"  {row.stage:8} {row.seconds:8.2f} s  {row.peak_device_gib:6.2f} GiB  {row.peak_host_gb:6.2f} GB")
    if bench.profile:
        write_json(results / KERNELS, {**_json(results / KERNELS), case.name: kernels})
    else:
        write_rows(results / TABLE, merge_rows(read_rows(results / TABLE), rows))
    return True


def report(results: Path, docs: Path | None) -> None:
    """Write the summary's figures and the document's tables from the rows that are there."""
    rows, kernels = read_rows(results / TABLE), _json(results / KERNELS)
    ceilings = {
        device: Ceilings(**{field.name: found[field.name] for field in fields(Ceilings)})
        for device, found in _json(results / RATES).items()
    }
    figures = headline_figures(rows, ceilings)
    record_figures(figures, results / SUMMARY.name)
    if docs is None:
        return
    put_table(docs, "goals", goal_table(figures) + (f"\n{provenance_lines(rows)}\n" if rows else ""))
    for name, table in (
        ("stages", stage_table(rows)),
        ("steps", step_table(rows)),
        ("estimate", estimate_table(rows, ceilings)),
        ("kernels", kernel_tables(kernels)),
    ):
        put_table(docs, name, table)


def _merge(source: Path, results: Path) -> None:
    """Take over the rows, rates and kernels of another results folder; its runs win.

    Raises:
        ConfigError: the folder has no rows.
    """
    rows: list[Row] = read_rows(source / TABLE)
    if not rows:
        raise ConfigError(f"--merge {source}: there is no {TABLE} in it")
    write_rows(results / TABLE, merge_rows(read_rows(results / TABLE), rows))
    for name in (RATES, KERNELS):
        if found := _json(source / name):
            write_json(results / name, {**_json(results / name), **found})


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}
