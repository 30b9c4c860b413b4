"""One run of `python -m qrealign.run` in a process of its own, with its stages measured.

python -m benchmarks.calibration.worker RECORD.json [--profile] [--eager] [--timed] -- FLAGS OF qrealign.run
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration.spans import Spans, find_function, instrument, observe
from qrealign.files import write_json

PROFILED_KERNELS = 25


@dataclass
class Steps:
    """What the optimizer has done: when each step ended (host clock), and how much it was trained on.

    `tokens` are real ones, without padding; `positions` are those at which the output head was read. `recording` are
    the seconds in which steps were recorded, which more steps do not add to.
    """

    ends: list[float] = field(default_factory=list)
    count: int = 0
    tokens: int = 0
    positions: int = 0
    recording: float = 0.0

    def add_endtoend(self, calibrator: Any, *_: Any) -> None:
        """Count a finished end-to-end calibration: the real tokens of every sample drawn."""
        samples = [calibrator.objective.samples[index] for batch in calibrator.schedule for index in batch]
        self.count += len(calibrator.schedule)
        self.tokens += sum(len(sample.input_ids) for sample in samples)
        self.positions += sum(len(sample.positions) for sample in samples)

    def add_block(self, calibrator: Any, *_: Any) -> None:
        """Count a finished block: the steps that it took, which the end of its curve tells, and their real tokens."""
        steps, mask = calibrator.curve[-1].step + 1, calibrator.inputs.mask
        self.count += steps
        self.tokens += round(steps * calibrator.settings.batch_size * float(mask.sum()) / len(mask))

    def add_step(self, *_: Any) -> None:
        """Note the end of a step, once the device has reached it."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def time_recordings(self) -> None:
        """Have every recording of a step timed, for the rest of the process."""
        owner, name, function = find_function("qrealign.calibrate.graphs:Recorded.record")

        def wrapper(recorded: Any) -> None:
            start = time.perf_counter()
            function(recorded)
            self.recording += time.perf_counter() - start

        setattr(owner, name, wrapper)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, measure and write the record; return the run's exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration.worker")
    parser.add_argument("record", type=Path)
    parser.add_argument("--profile", action="store_true", help="list the kernels of the optimizer's steps")
    parser.add_argument("--eager", action="store_true", help="no recorded steps")
    parser.add_argument("--timed", action="store_true", help="every step is waited for and timed")
    parser.add_argument("flags", nargs="+", help="behind --: the flags of qrealign.run")
    args = parser.parse_args(arguments)
    from qrealign.run import main as run

    spans, steps, kernels = Spans(), Steps(), list[dict[str, Any]]()
    if args.profile:
        _profile_steps(kernels)
    observe("qrealign.calibrate.endtoend:EndToEndCalibrator.run", steps.add_endtoend)
    observe("qrealign.calibrate.blockwise:BlockwiseCalibrator._train", steps.add_block)
    if args.eager:
        _call_instead_of_recording()
    if args.timed:
        observe("qrealign.calibrate.parameters:Trainable.step", steps.add_step)
    steps.time_recordings()
    instrument(spans)
    with spans.watching():
        status = run(args.flags)
    rank = os.environ.get("RANK")
    record = args.record if rank is None else args.record.with_suffix(f".{rank}.json")
    write_json(
        record,
        {
            "status": status,
            "spans": {name: asdict(span) for name, span in spans.found.items()},
            "steps": steps.count,
            "tokens": steps.tokens,
            "positions": steps.positions,
            "recording_seconds": steps.recording,
            "step_seconds": [round(b - a, 6) for a, b in zip(steps.ends, steps.ends[1:], strict=False)],
            "kernels": kernels,
        },
    )
    return status


def _call_instead_of_recording() -> None:
    """Have every step's operations started one by one, as plain PyTorch does."""
    from qrealign.calibrate.graphs import Recorded

    Recorded.record = lambda self: None  # type: ignore[method-assign]


def _profile_steps(kernels: list[dict[str, Any]]) -> None:
    """Have the steps of either engine profiled, and `kernels` filled with the longest ones."""
    from benchmarks.calibration import spans as tools

    for target in tools.TARGETS:
        if target.span == "steps":
            owner, name, function = tools.find_function(target.place)

            def wrapper(*args: Any, _function: Any = function, **kwargs: Any) -> Any:
                with _profiled(kernels):
                    return _function(*args, **kwargs)

            setattr(owner, name, wrapper)


@contextmanager
def _profiled(kernels: list[dict[str, Any]]) -> Iterator[None]:
    activity = torch.profiler.ProfilerActivity
    chosen = activity.CUDA if torch.cuda.is_available() else activity.CPU
    with torch.profiler.profile(activities=[chosen]) as profile:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    rows = [
        {
            "name": event.key,
            "calls": event.count,
            "seconds": (event.self_device_time_total or event.self_cpu_time_total) / 1e6,
        }
        for event in profile.key_averages()
    ]
    kernels[:] = sorted(rows, key=lambda row: -row["seconds"])[:PROFILED_KERNELS]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a run that is stopped leaves what it measured
    sys.exit(main())
