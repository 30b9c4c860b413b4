"""Runs one case in processes of its own and turns what its workers have left into rows."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration.cases import Case, run_flags
from benchmarks.calibration.ceilings import Ceilings
from benchmarks.calibration.counting import count_work
from benchmarks.calibration.geometries import Geometry
from benchmarks.calibration.rows import TOTAL, Row
from benchmarks.calibration.spans import ORDER
from benchmarks.summary import provenance
from qrealign.errors import QrealignError
from qrealign.files import read_json, remove

GIB, GB = 2**30, 10**9
LOG_LINES = 6  # of a run that failed


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cases of one call share: the model on disk, the prompts, the machine."""

    geometry: Geometry
    model: Path
    adapter: Path
    prompts: Mapping[str, Path]
    work: Path
    device: torch.device
    ceilings: Ceilings
    shorten: int
    tokens: int
    profile: bool = False


class RunFailed(QrealignError):
    """A measured run ended with an error."""


def run_case(bench: Bench, case: Case) -> tuple[list[Row], list[dict[str, Any]]]:
    """Run a case once; return its rows, and the kernels of its steps where they were profiled.

    Raises:
        RunFailed: the run did not end well; its last lines are in the message.
    """
    output, record, log = (bench.work / f"{case.name}{end}" for end in ("", ".json", ".log"))
    for path in (output, *bench.work.glob(f"{case.name}*.json")):
        remove(path)
    flags = run_flags(
        case,
        model=bench.model,
        adapter=bench.adapter,
        prompts=bench.prompts,
        output=output,
        shorten=bench.shorten,
        tokens=bench.tokens,
    )
    command = [*_launcher(case.gpus), "-m", "benchmarks.calibration.worker", str(record)]
    command += [*(["--profile"] if bench.profile else []), "--", *flags, "--device", bench.device.type]
    environment = {**os.environ, **({"QREALIGN_BACKEND": case.backend} if case.backend else {})}
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        status = _wait(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    seconds = time.perf_counter() - start
    remove(output)
    if status:
        tail = " | ".join(log.read_text(encoding="utf-8").splitlines()[-LOG_LINES:])
        raise RunFailed(f"{case.name} ended with exit status {status} after {seconds:.0f} s: {tail}")
    records = [read_json(path) for path in sorted(bench.work.glob(f"{case.name}*.json"))]
    return _rows(bench, case, records, seconds), records[0]["kernels"]


def _launcher(gpus: int) -> list[str]:
    """Return what starts one process, or one a GPU."""
    if gpus == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; when this one is interrupted, end that one first."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def _rows(bench: Bench, case: Case, records: Sequence[Mapping[str, Any]], seconds: float) -> list[Row]:
    """Return a run's rows: its stages in order, then the whole; with several ranks, the slowest and the largest."""
    settings, geometry = case.settings(), bench.geometry
    spans = {
        name: {
            key: max(record["spans"].get(name, {}).get(key, 0) for record in records)
            for key in ("seconds", "peak_device_bytes", "peak_reserved_bytes", "peak_host_bytes")
        }
        for name in ORDER
    }
    pinned = max(record["pinned_host_bytes"] for record in records)
    whole = {key: max(span[key] for span in spans.values()) for key in spans["steps"]}
    # Everything before the worker's clock starts is the interpreter's own start, which belongs to no stage but `other`.
    spans["other"]["seconds"] += max(0.0, seconds - sum(span["seconds"] for span in spans.values()))
    whole["seconds"], whole["peak_host_bytes"] = seconds, whole["peak_host_bytes"] + pinned
    done = records[0]["steps"]
    shortened = done and (bench.shorten > 1 or case.extrapolated)
    full_steps = _full_steps(settings, geometry.layers) if shortened else done
    found = []
    for stage, span in [*spans.items(), (TOTAL, whole)]:
        if not span["seconds"]:
            continue
        factor = full_steps / done if stage == "steps" and shortened else 1.0
        found.append(
            Row(
                geometry=geometry.name,
                layers=geometry.layers,
                full_layers=geometry.full_layers,
                case=case.name,
                gpus=case.gpus,
                shorten=max(1, round(full_steps / done)) if done else 1,
                stage=stage,
                seconds=span["seconds"],
                full_seconds=span["seconds"] * factor,
                gpu_hours=span["seconds"] * case.gpus / 3600 if bench.device.type == "cuda" else 0.0,
                peak_device_gib=span["peak_device_bytes"] / GIB,
                peak_reserved_gib=span["peak_reserved_bytes"] / GIB,
                peak_host_gb=span["peak_host_bytes"] / GB,
                **(_step_figures(bench, case, records) if stage == "steps" else {}),
                **_stamp(bench.device),
            )
        )
    return found


def _step_figures(bench: Bench, case: Case, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the row of the optimizer's steps has beyond seconds and peaks."""
    first = records[0]
    steps, tokens, seconds = first["steps"], first["tokens"], first["spans"]["steps"]["seconds"]
    if not steps:
        return {}
    work = count_work(bench.geometry, case.engine, steps=steps, tokens=tokens, positions=first["positions"])
    each = first["step_seconds"]
    return {
        "steps": steps,
        "step_ms": 1e3 * (statistics.median(each) if len(each) >= steps / 2 else seconds / steps),
        "tokens": tokens,
        "positions": first["positions"],
        "tokens_per_s": tokens / seconds,
        "petaflop": work.flops() / 1e15,
        "terabytes": work.bytes() / 1e12,
        "matmul_share": work.flops() / seconds / case.gpus / (bench.ceilings.bf16 * 1e12),
        "copy_share": work.bytes() / seconds / (bench.ceilings.copy * GB),
        "floor_s": work.seconds_at(bench.ceilings),
    }


def _full_steps(settings: Any, layers: int) -> int:
    """Return how many optimizer steps the whole run takes."""
    from qrealign.calibrate.schedule import block_epochs

    if settings.engine == "endtoend":
        return int(settings.steps)
    epochs = sum(block_epochs(index, layers, settings.epochs) for index in range(layers))
    return round(epochs * settings.samples / settings.batch_size)


def _stamp(device: torch.device) -> dict[str, str]:
    import transformers

    return {**provenance(None if device.type == "cuda" else device.type), "transformers": transformers.__version__}
