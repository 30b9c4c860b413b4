"""The shipped demo: a small aligned model, the adapter that broke it, and its prompts.

The demo has no code path of its own: these paths are the defaults of `python -m qrealign.run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class DemoPaths:
    """Where the parts of the demo lie."""

    aligned: Path
    adapter: Path
    safety: Path
    benign: Path
    borderline: Path
    task: Path
    eval_harmful: Path
    eval_benign: Path
    eval_over_refusal: Path
    eval_task: Path
    text: Path


def demo_paths(root: Path = ROOT) -> DemoPaths:
    """Return the demo's files below `root` (default: the shipped ones)."""
    data = root / "data"
    return DemoPaths(
        aligned=root / "aligned",
        adapter=root / "adapter",
        safety=data / "safety.jsonl",
        benign=data / "benign.jsonl",
        borderline=data / "borderline.jsonl",
        task=data / "task.jsonl",
        eval_harmful=data / "eval_harmful.jsonl",
        eval_benign=data / "eval_benign.jsonl",
        eval_over_refusal=data / "eval_over_refusal.jsonl",
        eval_task=data / "eval_task.jsonl",
        text=data / "text.jsonl",
    )
