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
from benchmarks.calibration.spans import ORDER, REST
from benchmarks.summary import provenance
from qrealign.calibrate.schedule import block_epochs
from qrealign.errors import QrealignError
from qrealign.files import read_json, remove

Record = Mapping[str, Any]  # what a worker has written

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
    samples: int
    tokens: int
    profile: bool = False


class RunFailed(QrealignError):
    """A measured run ended with an error."""


def run_case(bench: Bench, case: Case) -> tuple[list[Row], list[dict[str, Any]]]:
    """Run a case once; return its rows, and the kernels of its steps where they were profiled.

    Raises:
        RunFailed: the run did not end well; its last lines are in the message.
    """
    folder = bench.work / "runs" / case.name
    remove(folder)
    folder.mkdir(parents=True)
    output, log = folder / "output", folder / "log.txt"
    flags = run_flags(
        case,
        model=bench.model,
        adapter=bench.adapter,
        prompts=bench.prompts,
        output=output,
        shorten=bench.shorten,
        samples=bench.samples,
        tokens=bench.tokens,
    )
    command = [*_launcher(case.gpus), "-m", "benchmarks.calibration.worker", str(folder / "record.json")]
    command += [*(["--profile"] if bench.profile else []), *(["--eager"] if case.extrapolated else [])]
    command += ["--timed"] if case.timed else []
    command += ["--", *flags, "--device", bench.device.type]
    environment = {**os.environ, **({"QREALIGN_BACKEND": case.backend} if case.backend else {})}
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        status = _wait(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    seconds = time.perf_counter() - start
    remove(output)
    if status:
        tail = _tail(log.read_text(encoding="utf-8"))
        raise RunFailed(f"{case.name} ended with exit status {status} after {seconds:.0f} s: {tail}")
    records = [read_json(path) for path in sorted(folder.glob("record*.json"))]
    return _rows(bench, case, records, seconds), records[0]["kernels"]


def check_kernels() -> None:
    """Run the kernels' tests on this GPU: a time says nothing of a result that is wrong.

    Raises:
        RunFailed: one has failed; the last line says how many.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "tests/kernels"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"the kernels' tests fail on this GPU, so nothing is measured: {_tail(done.stdout)}")


def _tail(text: str) -> str:
    """Return the last lines of a log in one."""
    return " | ".join(text.splitlines()[-LOG_LINES:])


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


def _rows(bench: Bench, case: Case, records: Sequence[Record], seconds: float) -> list[Row]:
    """Return a run's rows: its stages in order, then the whole; of several ranks, the slowest and the largest."""
    geometry, steps = bench.geometry, _step_figures(bench, case, records)
    spans = {
        name: {
            key: max(record["spans"].get(name, {}).get(key, 0) for record in records)
            for key in ("seconds", "peak_device_bytes", "peak_reserved_bytes", "peak_host_bytes")
        }
        for name in ORDER
    }
    whole = {key: max(span[key] for span in spans.values()) for key in spans[REST]} | {"seconds": seconds}
    # What lies before the worker's clock is the interpreter's own start.
    spans[REST]["seconds"] += max(0.0, seconds - sum(span["seconds"] for span in spans.values()))
    shared = {
        "geometry": geometry.name,
        "layers": geometry.layers,
        "full_layers": geometry.full_layers,
        "case": case.name,
        "gpus": case.gpus,
        "shorten": max(1, round(full_steps(case, geometry, bench.samples) / steps["steps"]))
        if _is_short(bench, case)
        else 1,
        **_stamp(bench.device),
    }
    found = []
    for stage, span in [*spans.items(), (TOTAL, whole)]:
        figures: dict[str, Any] = {
            "stage": stage,
            "seconds": span["seconds"],
            "full_seconds": span["seconds"],
            "gpu_hours": span["seconds"] * case.gpus / 3600 if bench.device.type == "cuda" else 0.0,
            "peak_device_gib": span["peak_device_bytes"] / GIB,
            "peak_reserved_gib": span["peak_reserved_bytes"] / GIB,
            "peak_host_gb": span["peak_host_bytes"] / GB,
        }
        if span["seconds"]:
            found.append(Row(**{**shared, **figures, **(steps if stage == "steps" else {})}))
    return found


def _is_short(bench: Bench, case: Case) -> bool:
    """Return whether a run takes fewer steps than the whole one."""
    return bench.shorten > 1 or case.extrapolated


def full_steps(case: Case, geometry: Geometry, samples: int) -> int:
    """Return how many optimizer steps the whole run of a case takes."""
    settings = case.settings(samples)
    if case.engine == "endtoend":
        return settings.steps
    epochs = sum(block_epochs(index, geometry.layers, settings.epochs) for index in range(geometry.layers))
    return round(epochs * settings.samples / settings.batch_size)


def counted_up(seconds: float, steps: int, whole: int, *, once: float, step: float | None = None) -> float:
    """Return what `whole` steps take where `steps` took `seconds`.

    Args:
        once: of the seconds, those that do not grow with the steps.
        step: seconds of one step where each was timed; None shares the rest out evenly.
    """
    return seconds + (whole - steps) * ((seconds - once) / steps if step is None else step)


def _step_figures(bench: Bench, case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """Return what the row of the optimizer's steps has beyond peaks; the whole run's seconds where it was shortened."""
    first, ceilings = records[0], bench.ceilings
    steps, tokens, positions = (first[name] for name in ("steps", "tokens", "positions"))
    seconds = max(record["spans"]["steps"]["seconds"] for record in records)
    work = count_work(bench.geometry, case.engine, steps=steps, tokens=tokens, positions=positions)
    # Where every step was waited for, the median leaves out the first ones, which warm up.
    timed = statistics.median(first["step_seconds"]) if first["step_seconds"] else None
    step, full = timed or seconds / steps, seconds
    if _is_short(bench, case):
        once = max(record["recording_seconds"] for record in records)
        full = counted_up(seconds, steps, full_steps(case, bench.geometry, bench.samples), once=once, step=timed)
    return {
        "full_seconds": full,
        "steps": steps,
        "step_ms": 1e3 * step,
        "tokens": tokens,
        "positions": positions,
        "tokens_per_s": tokens / steps / step,
        "petaflop": work.flops() / 1e15,
        "terabytes": work.bytes() / 1e12,
        "matmul_share": work.flops() / steps / step / case.gpus / (ceilings.bf16 * 1e12),
        "copy_share": work.bytes() / steps / step / (ceilings.copy * GB),
        "floor_s": work.seconds_at(ceilings) / case.gpus,
    }


def _stamp(device: torch.device) -> dict[str, str]:
    import transformers

    return {**provenance(None if device.type == "cuda" else device.type), "transformers": transformers.__version__}
