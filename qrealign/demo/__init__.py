"""The shipped demo: a small aligned model, the adapter that broke it, and its prompts.

The demo has no code path of its own: these paths and settings are the defaults of `python -m qrealign.run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent
# What `realign` has otherwise is for models and prompts of ordinary size. This model's answers are a dozen tokens long
# and its borderline prompts a hundred: late refusals begin earlier and are fewer, every borderline prompt is seen and
# counts for more, and so does text; its task needs no prompts besides.
DEMO_SETTINGS = (
    "batch_size=12",
    "batch_malicious_share=0.5",
    "benign_weight=3.5",
    "recovery_share=0.1",
    "recovery_least=1",
    "recovery_tokens=6",
    "task_share=0.12",
    "borderline_share=0.4",
    "borderline_weight=0.14",
    "text_share=0.3",
)


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
