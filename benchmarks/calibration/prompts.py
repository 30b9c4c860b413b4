"""Calibration prompts for random weights: random words of the demo's vocabulary, as long as the benchmark wants them.

They mean nothing and harm nobody; malicious and benign prompts take their words from different halves of the list, so
that a probe can tell them apart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from qrealign.demo import demo_paths
from qrealign.files import write_text

COUNTS = {
    "malicious": 240,
    "benign": 240,
    "borderline": 80,
    "task": 40,
    "text": 120,
}  # a run keeps a quarter for evaluation
MIN_LETTERS = 4


def write_prompts(folder: Path, tokens: int, *, seed: int = 0) -> dict[str, Path]:
    """Write one file per kind of prompt and return them by kind; each prompt has at least `tokens` tokens.

    Every word is one token at least, and the encoder cuts what is longer: all prompts get that length, or one less.
    """
    words = _words()
    rng = random.Random(seed)
    half = len(words) // 2
    files = {}
    for kind, count in COUNTS.items():
        pool = words[:half] if kind == "malicious" else words[half:]
        rows = [_row(kind, " ".join(rng.choices(pool, k=tokens)), number) for number in range(count)]
        files[kind] = folder / f"{kind}-{tokens}.jsonl"
        write_text(files[kind], "".join(json.dumps(row) + "\n" for row in rows))
    return files


def _row(kind: str, text: str, number: int) -> dict[str, object]:
    if kind == "text":
        return {"text": text}
    if kind == "task":
        return {"prompt": text, "answer": ("yes", "no")[number % 2]}
    return {"prompt": text, "label": int(kind == "malicious")}


def _words() -> Sequence[str]:
    """Return the whole words of the shipped tokenizer's vocabulary."""
    tokenizer = json.loads((demo_paths().aligned / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = [piece[1:] for piece in tokenizer["model"]["vocab"] if piece.startswith("Ġ")]
    return sorted(
        piece.lower() for piece in pieces if piece.isalpha() and piece.isascii() and len(piece) >= MIN_LETTERS
    )
