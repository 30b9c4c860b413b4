"""Importing is quick and quiet: no heavy package, no device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("transformers", "datasets", "sklearn", "matplotlib", "peft", "accelerate", "compressed_tensors")


@pytest.mark.parametrize("statement", ["import qrealign, qrealign.config, qrealign.arch", "import qrealign_kernels"])
def test_import_is_lean(statement: str) -> None:
    code = f"""
import sys
{statement}
heavy = [name for name in {HEAVY!r} if name in sys.modules]
torch = sys.modules.get("torch")
print(heavy, torch is not None and torch.cuda.is_initialized())
"""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] False"
