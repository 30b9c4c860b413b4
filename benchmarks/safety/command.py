"""The command line of the benchmark: flags into a plan, the run, and what is written at its end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.safety.aggregate import comparisons_of, load_results, rows_of
from benchmarks.safety.plan import OURS, SCHEMES, SEEDS, FineTuned, Limits, Plan, read_options, split_method
from benchmarks.safety.plots import draw_plots
from benchmarks.safety.runner import forget, run_plan
from benchmarks.safety.tables import check_docs, markdown, record_headline, render_docs, write_csv, write_summary
from benchmarks.safety.variants import RECORD, parse_variant
from benchmarks.summary import SUMMARY, commit
from qrealign.cli import METHODS  # every method that qrealign.run offers
from qrealign.errors import ConfigError, QrealignError
from qrealign.files import read_json, write_text
from qrealign.models.source import open_model
from qrealign.pipeline.models import choose_device
from qrealign.pipeline.options import RunOptions, merge_options, used_options

SMALL_MODEL_BYTES = 2**30  # workers share a GPU, and split a processor, below this
OFFERED = (*METHODS, f"{OURS}:schedule=long")
WORKERS_PER_GPU = 8  # a small model leaves most of a GPU idle


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.safety`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.safety",
        description="Measure every method, scheme and seed on fine-tuned variants of one aligned model.",
        epilog="A run that was killed goes on with the same command. See benchmarks/README.md.",
    )
    models = parser.add_argument_group("models")
    models.add_argument("--aligned", required=True, metavar="MODEL", help="the aligned model: folder or Hub id")
    models.add_argument("--base", metavar="MODEL", help="the pre-trained model, which some methods need")
    models.add_argument(
        "--finetuned", nargs="+", default=[], metavar="[NAME=]DIR", help="LoRA adapters over the aligned model"
    )
    models.add_argument("--task", default="sst2", help="task of the --finetuned adapters (default: sst2)")
    models.add_argument(
        "--variants", nargs="+", default=[], metavar="NAME", help="attacks to train where missing, e.g. sst2-p05"
    )
    cells = parser.add_argument_group("cells")
    cells.add_argument(
        "--methods",
        nargs="+",
        default=list(OFFERED),
        metavar="NAME[:OPTION=VALUE,...]",
        help=f"default: {' '.join(OFFERED)}; with options it is a row of its own",
    )
    cells.add_argument(
        "--schemes", nargs="+", default=list(SCHEMES), metavar="NAME", help=f"default: {' '.join(SCHEMES)}"
    )
    cells.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N", help="default: 0 1 2")
    cells.add_argument(
        "--option",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="option of qrealign.run for every cell that has a use for it, for trials",
    )
    asked = parser.add_argument_group("evaluation")
    asked.add_argument("--per-source", type=int, metavar="N", help="most harmful prompts of a source (default: all)")
    asked.add_argument("--limit", type=int, metavar="N", help="about N prompts of each kind, for trials (default: all)")
    asked.add_argument("--benign", type=int, default=Limits.benign, metavar="N", help="ordinary prompts (default: 500)")
    asked.add_argument(
        "--prefill",
        choices=("own", "pairs", "none"),
        default="own",
        help="answers begin as the fine-tuned model's own, or as kept-back harmful pairs (default: own)",
    )
    asked.add_argument(
        "--prefill-limit", type=int, default=Limits.prefill_limit, metavar="N", help="prefill attacks (500)"
    )
    asked.add_argument("--prefill-tokens", type=int, default=Limits.prefill_tokens, metavar="N", help="given away (5)")
    asked.add_argument(
        "--max-new-tokens", type=int, default=Limits.max_new_tokens, metavar="N", help="of an answer (32)"
    )
    asked.add_argument(
        "--perplexity-tokens", type=int, default=Limits.perplexity_tokens, metavar="N", help="of running text (65536)"
    )
    running = parser.add_argument_group("running")
    running.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder of the data files")
    running.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets results, tables and plots")
    running.add_argument("--devices", nargs="+", metavar="NAME", help="cpu, or cuda:0 cuda:1 ... (default: every GPU)")
    running.add_argument("--workers", type=int, metavar="N", help="processes in all; 0 works in this one")
    running.add_argument("--batch-size", type=int, default=256, metavar="N", help="prompts answered at once (256)")
    running.add_argument("--keep-models", action="store_true", help="keep each cell's packed model")
    running.add_argument("--again", nargs="+", default=[], metavar="METHOD", help="forget these methods' results first")
    running.add_argument("--only-report", action="store_true", help="run nothing: tables and plots of what is there")
    running.add_argument("--docs", type=Path, metavar="FILE", help="put the tables between this document's markers")
    running.add_argument("--results", type=Path, metavar="DIR", help="keep table and headline figures there as well")
    return parser


def run_command(arguments: Sequence[str] | None = None) -> bool:
    """Run what the command line says and write the tables; return whether anything has failed.

    Raises:
        QrealignError: one sentence that the user can act on.
    """
    args = build_parser().parse_args(arguments)
    devices = choose_devices(args.devices)
    plan = make_plan(args, devices)
    if args.docs is not None:
        check_docs(args.docs)
    if args.again:
        say(f"forgot {forget(plan, args.again)} results")
    failed: list[str] = []
    if not args.only_report:
        size = check_models(plan)
        workers = choose_workers(args.workers, devices, size)
        threads = max(1, _cores() // max(1, workers))
        where = " ".join(devices)
        say(f"{len(plan.measurements())} measurements, {workers or 1} workers of {threads} threads on {where}")
        spread_out = [devices[index % len(devices)] for index in range(workers)]
        failed = run_plan(plan, spread_out, threads=threads, say=say)
    report(plan, args.docs, args.results)
    return bool(failed)


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def make_plan(args: argparse.Namespace, devices: Sequence[str]) -> Plan:
    """Return the plan that the flags describe.

    Raises:
        ConfigError: a flag is wrong.
    """
    limits = Limits(
        per_source=args.per_source,
        limit=args.limit,
        benign=args.benign,
        prefill_limit=args.prefill_limit,
        max_new_tokens=args.max_new_tokens,
        prefill_tokens=args.prefill_tokens,
        perplexity_tokens=args.perplexity_tokens,
    )
    overrides = read_options(args.option)
    _check_options(args.methods, overrides)
    return Plan(
        aligned=args.aligned,
        base=args.base,
        variants=(*_given(args.finetuned, args.task), *_made(args.variants, args.output)),
        data=args.data,
        output=args.output,
        methods=tuple(args.methods),
        schemes=tuple(scheme.lower() for scheme in args.schemes),
        seeds=tuple(dict.fromkeys(args.seeds)),
        overrides=overrides,
        limits=limits,
        prefill=args.prefill,
        batch_size=args.batch_size,
        keep_models=args.keep_models,
        device=devices[0].partition(":")[0],
        commit=commit(),
    )


def _given(adapters: Sequence[str], task: str) -> list[FineTuned]:
    """Return the adapters named by the user; one made by `variants` knows its task itself."""
    found = []
    for text in adapters:
        name, equals, path = text.rpartition("=")
        folder = Path(path)
        record = folder / RECORD
        known = read_json(record)["identity"]["variant"]["task"] if record.is_file() else task
        found.append(FineTuned(name=name if equals else folder.resolve().name, adapter=folder, task=known))
    return found


def _made(names: Sequence[str], output: Path) -> list[FineTuned]:
    folder = output / "variants"
    variants = [parse_variant(name) for name in names]
    return [FineTuned(name=v.name, adapter=folder / v.name, task=v.task, made_here=True) for v in variants]


def _check_options(methods: Sequence[str], overrides: dict[str, Any]) -> None:
    """Refuse at once what would make every cell of a method fail.

    Raises:
        ConfigError: a method or an option does not exist, or an option has an impossible value.
    """
    known = {field.name for field in fields(RunOptions)}
    for text in methods:
        method, options = split_method(text)
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}: use {', '.join(METHODS)}")
        if unknown := sorted({*overrides, *options} - known):
            raise ConfigError(f"{unknown[0]!r} is no option of qrealign.run: options are its flags with _ for -")
        # Whether a base model is there is not asked: without one the methods that need it fail, and no other.
        values = used_options({"method": method, "base": "any", **overrides, **options})
        merge_options(None, {**values, **options})


def choose_devices(names: Sequence[str] | None) -> list[str]:
    """Return the devices to use: those named, else every GPU, else the processor.

    Raises:
        QrealignError: a device is absent, or GPUs and the processor are mixed.
    """
    found = list(names or [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"])
    kinds = {choose_device(name).type for name in found}
    if len(kinds) > 1:
        raise ConfigError("--devices must be either GPUs or cpu: figures of the two would not be comparable")
    return found


def choose_workers(wanted: int | None, devices: Sequence[str], model_bytes: int) -> int:
    """Return how many processes run: those asked for, or as many as a small model lets share the machine."""
    if wanted is not None:
        if wanted < 0:
            raise ConfigError(f"--workers must be 0 or more, not {wanted}")
        return wanted
    if model_bytes >= SMALL_MODEL_BYTES:
        return len(devices)
    halves = max(1, _cores() // 2)
    return halves if devices[0] == "cpu" else max(len(devices), min(WORKERS_PER_GPU * len(devices), halves))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_models(plan: Plan) -> int:
    """Open every model that is there, so that a wrong path is said at once; return the aligned model's bytes.

    Raises:
        QrealignError: one cannot be used.
    """
    size = open_model(plan.aligned).total_bytes
    if plan.base is not None:
        open_model(plan.base)
    for variant in plan.variants:
        if not variant.made_here:
            open_model(plan.aligned, adapter=str(variant.adapter))
    return size


def report(plan: Plan, docs: Path | None, kept: Path | None) -> None:
    """Write table.csv, table.md, summary.json and plots, the document where one is named, and what is to be kept."""
    results, failures = load_results(plan)
    rows = rows_of(results)
    comparisons = comparisons_of(rows)
    text = markdown(rows, comparisons, failures, results)
    write_csv(plan.output / "table.csv", results)
    write_text(plan.output / "table.md", text)
    write_summary(plan.output / "summary.json", plan, rows, comparisons, failures, results)
    if docs is not None:
        render_docs(docs, text)
    if kept is not None:
        write_csv(kept / "safety.csv", results)
        record_headline(kept / SUMMARY.name, rows, results)
    try:
        draw_plots(plan.output / "plots", rows)
    except QrealignError as error:
        say(f"no plots: {error}")
    missing = f"; {len(failures)} measurements are missing, see its end" if failures else ""
    say(f"{len(results)} results in {plan.output / 'table.md'}{missing}")
