"""A benchmark on a tiny model: models, adapters and a data folder, made in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.safety.command import build_parser, make_plan
from benchmarks.safety.plan import Plan
from tests.helpers import tiny_adapter, tiny_checkpoint

WORDS = (
    "apple",
    "river",
    "stone",
    "cloud",
    "garden",
    "window",
    "paper",
    "silver",
    "music",
    "winter",
    "bridge",
    "candle",
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> Path:
    """Write every file that the benchmark reads, with prompts that no two files share."""
    folder.mkdir(parents=True)

    def text(kind: str, number: int) -> str:
        return f"{kind} {WORDS[number % len(WORDS)]} number {number}"

    write_rows(
        folder / "calib_clean.jsonl",
        [
            {"prompt": text(f"calibration {label}", i), "label": label, "source": "c"}
            for label in (0, 1)
            for i in range(20)
        ],
    )
    write_rows(
        folder / "pairs_safety.jsonl",
        [
            *(
                {
                    "prompt": text("pair", i),
                    "response": f"Certainly, take {i} spoons",
                    "label": "harmful",
                    "source": "p",
                }
                for i in range(40)
            ),
            *(
                {"prompt": text("borderline", i), "response": "Here is how.", "label": "safe", "source": "star1/train"}
                for i in range(10)
            ),
        ],
    )
    write_rows(
        folder / "eval_harmful.jsonl",
        [{"prompt": text(f"evil {source}", i), "source": source} for source in ("alpha", "beta") for i in range(6)],
    )
    write_rows(
        folder / "eval_overrefusal.jsonl",
        [{"prompt": text("edge", i), "label": "safe" if i < 4 else "unsafe", "source": "x"} for i in range(6)],
    )
    write_rows(
        folder / "instruct_dolly.jsonl",
        [{"instruction": text("ordinary", i), "input": "", "response": "Yes.", "source": "d"} for i in range(8)]
        # It stands in the calibration data as well, so it must not be asked.
        + [{"instruction": text("calibration 0", 0), "input": "", "response": "Yes.", "source": "d"}],
    )
    write_rows(
        folder / "task_sst2.jsonl",
        [
            {"text": text(split, i), "label": ("negative", "positive")[i % 2], "split": split, "source": "sst2"}
            for split, count in (("train", 24), ("test", 6))
            for i in range(count)
        ],
    )
    write_rows(
        folder / "text_wikitext2.jsonl",
        [{"text": "a quiet text about the river " * 5, "split": split, "source": "w"} for split in ("train", "test")],
    )
    return folder


ADAPTER_SEED = 3  # of peft's own draw: this adapter's answers are text, so that some begin a prefill attack


def write_models(folder: Path) -> tuple[Path, Path]:
    """Write an aligned model and an adapter; return their folders."""
    aligned = tiny_checkpoint(folder / "aligned", max_position_embeddings=512)
    with torch.random.fork_rng():
        torch.manual_seed(ADAPTER_SEED)
        return aligned, tiny_adapter(folder / "broken", aligned)


SHORT = ["--option", "samples=16", "epochs=1", "batch_size=8", "--max-new-tokens", "4"]
SHORT += ["--perplexity-tokens", "64", "--workers", "0", "--devices", "cpu"]


def arguments(folder: Path, *more: str) -> list[str]:
    """Return a command line of the benchmark on the models and data of `folder`."""
    if not (folder / "data").exists():
        write_data(folder / "data")
        write_models(folder)
    models = ["--aligned", str(folder / "aligned"), "--finetuned", str(folder / "broken")]
    return [*models, "--data", str(folder / "data"), "--output", str(folder / "out"), *SHORT, *more]


def plan_of(folder: Path, *more: str) -> Plan:
    """Return the plan of that command line."""
    return make_plan(build_parser().parse_args(arguments(folder, *more)), ["cpu"])
