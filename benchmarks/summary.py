"""`benchmarks/results/summary.json`: the headline figures, each with where and when it was measured.

`record` is what a benchmark calls. `python -m benchmarks.summary FILE ...` takes over the figures that benchmarks wrote
on another machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qrealign.files import write_json
from qrealign_kernels import triton_common

SUMMARY = Path(__file__).parent / "results" / "summary.json"


def commit() -> str:
    """Return the commit measured: QREALIGN_COMMIT where a copy without history is run, else git's."""
    if given := os.environ.get("QREALIGN_COMMIT"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def provenance(device: str | None = None) -> dict[str, str]:
    """Return what stands beside every figure; `device` is what computed it, None the first GPU or else the CPU."""
    if device is None:
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton_common.version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def record(
    section: str,
    values: Mapping[str, float],
    *,
    device: str | None = None,
    stamp: Mapping[str, str] | None = None,
    path: Path = SUMMARY,
) -> None:
    """Set figures of a section ("calibration", "serving"), keeping all others.

    Args:
        section: first key.
        values: name -> value.
        device: see `provenance`.
        stamp: where and when the values were measured, as `provenance` gave it then; None for here and now.
        path: the summary to write; it is made where it is missing.
    """
    found = _read(path)
    stamp = dict(stamp or provenance(device))
    found.setdefault(section, {}).update({name: {"value": value, **stamp} for name, value in values.items()})
    _write(path, found)


def merge(paths: list[Path], into: Path = SUMMARY) -> None:
    """Take over every figure of other summaries; later files win."""
    found = _read(into)
    for path in paths:
        for section, values in _read(path).items():
            found.setdefault(section, {}).update(values)
    _write(into, found)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, found: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {section: dict(sorted(values.items())) for section, values in sorted(found.items())})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.summary", description="Merge summaries into this tree's."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merge(parser.parse_args().files)
