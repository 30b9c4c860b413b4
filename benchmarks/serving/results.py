"""The rows of a load test as CSV, and the table of them in the documentation."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.docs import markdown_table, put_table
from benchmarks.serving.client import fetch_json
from benchmarks.serving.load import Level
from benchmarks.serving.storm import Storm
from qrealign.files import write_text

RESULTS = Path(__file__).parents[1] / "results"
DOCUMENT = Path(__file__).parents[2] / "docs" / "serve.md"
ROWS, TABLE = "serving.csv", "serving"
_KEY = ("label", "scheme", "device", "streams", "prompt_tokens", "tokens")
_MIB = 2**20


async def row_of(url: str, label: str | None, level: Level, stamp: dict[str, str]) -> dict[str, str]:
    """Return a row: the level, the model it was measured with, and where and when by `summary.provenance`."""
    model = (await fetch_json(url, "/v1/models"))["data"][0]
    values: dict[str, Any] = {"label": label or model["id"], "scheme": model["scheme"], **asdict(level), **stamp}
    return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows that are kept in a folder."""
    path = folder / ROWS
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.is_file() else []


def store(folder: Path, row: dict[str, str]) -> None:
    """Keep a row in place of the one of the same settings."""
    rows = [one for one in read_rows(folder) if any(one[name] != row[name] for name in _KEY)]
    rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda one: (one["label"], one["scheme"], one["device"], int(one["streams"]))))
    write_text(folder / ROWS, text.getvalue())


def publish(rows: list[dict[str, str]], docs: Path | None) -> str:
    """Return the table of the rows; write it into a document where one is named."""
    header = (
        "model",
        "device",
        "tokens",
        "streams",
        "tokens/s",
        "first token, ms: p50",
        "p95",
        "p99",
        "next token, ms: p50",
        "p95",
        "p99",
        "commit",
    )
    numbers = (
        "tokens_per_s",
        "first_p50_ms",
        "first_p95_ms",
        "first_p99_ms",
        "token_p50_ms",
        "token_p95_ms",
        "token_p99_ms",
    )
    lines = [
        (
            f"{row['label']}, {row['scheme']}",
            row["device"],
            f"{row['prompt_tokens']} + {row['tokens']}",
            row["streams"],
            *(_short(row[name]) for name in numbers),
            row["commit"],
        )
        for row in rows
    ]
    table = markdown_table(header, lines, "lll" + "r" * 8 + "l")
    if rows:
        versions = sorted({f"torch {row['torch']}, {row['date']}" for row in rows})
        table += f"\nTokens: of a prompt and of its answer. Measured with {'; '.join(versions)}.\n"
    if docs is not None:
        put_table(docs, TABLE, table)
    return table


def describe_storm(storm: Storm) -> str:
    """Return what a storm came to, in a sentence."""
    statuses = ", ".join(f"{count} x {status or 'left'}" for status, count in storm.statuses.items())
    resident = ", ".join(f"{size / _MIB:.0f}" for size in storm.resident)
    return (
        f"storm: {statuses}; resident MiB after each round: {resident}; {storm.running} running and {storm.waiting} "
        f"waiting at the end; {'still answers' if storm.answers else 'answers no more'}"
    )


def _short(number: str) -> str:
    value = float(number)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
