"""Every Triton kernel compiles for the GPUs that users have, and fits their shared memory; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_BYTES = 99 * 1024  # what a program may use on compute capability 8.6 and 8.9
CAPABILITIES = (80, 86, 89, 90)
KERNELS = 4


def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    env = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), *map(str, CAPABILITIES)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({(row["kernel"], row["capability"]) for row in rows}) == KERNELS * len(CAPABILITIES)
    assert all(row["shared_bytes"] <= SHARED_BYTES for row in rows), rows
