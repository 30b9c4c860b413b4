"""`python -m benchmarks.decode.quality FOLDER --text FILE`: what a packed model loses when it takes less memory.

Perplexity of running text, every token of which reads the ones in front of it from the cache, in the model's dtype and
as int8 codes, and with the head in int8 too. A row replaces the one of the same model, and the table of the
documentation is written anew.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decode.results import DOCUMENT, RESULTS
from benchmarks.docs import markdown_table, put_table
from benchmarks.summary import provenance
from qrealign.data.encode import ChatEncoder
from qrealign.data.prompts import read_prompts
from qrealign.deploy.cache import static_cache
from qrealign.deploy.load import deploy_model
from qrealign.evaluate.perplexity import measure_perplexity
from qrealign.files import write_text
from qrealign.models.device import choose_device, compute_dtype
from qrealign.pack.source import open_packed
from qrealign.status import exit_status

ROWS, TABLE = "decode-quality.csv", "quality"
_VARIANTS = {"plain": (None, None), "int8 cache": (8, None), "int8 cache and head": (8, 8)}  # bits of cache and head


class CachedModel(nn.Module):
    """A model that reads every sequence through a static cache of its own, and whose logits are those of all tokens.

    Args:
        model: a causal language model.
        cache_bits: as of `static_cache`.
    """

    def __init__(self, model: Any, cache_bits: int | None) -> None:
        super().__init__()
        self.model, self.config, self._bits = model, model.config, cache_bits

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        cache = static_cache(self.config, input_ids.shape[1], self._bits)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return SimpleNamespace(logits=output.logits)


def measure(folder: str, text: str, device: torch.device, max_tokens: int) -> dict[str, str]:
    """Return the perplexity of a packed model under each variant, by its name."""
    found = {}
    texts = [prompt.text for prompt in read_prompts(text, role="text")]
    for name, (cache_bits, head_bits) in _VARIANTS.items():
        source = open_packed(folder)
        model = deploy_model(source, device, compute_dtype(device), head_bits=head_bits)
        encoder = ChatEncoder(source.tokenizer(), max_length=source.config.max_position_embeddings)
        value = measure_perplexity(
            CachedModel(model, cache_bits), encoder, texts, max_tokens=max_tokens, window=encoder.max_length
        )
        found[name] = f"{value:.4f}"
        print(f"{name}: {value:.4f}", flush=True)
    return found


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows that are kept in a folder."""
    path = folder / ROWS
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.is_file() else []


def store(folder: Path, row: dict[str, str]) -> None:
    """Keep a row in place of the one of the same model and device."""
    rows = [one for one in read_rows(folder) if any(one[name] != row[name] for name in ("model", "device"))] + [row]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda one: (one["model"], one["device"])))
    write_text(folder / ROWS, text.getvalue())


def publish(rows: list[dict[str, str]], document: Path | None) -> str:
    """Return the table: perplexity, and how much more it is than with 16 bits; write it into a document."""
    lines = []
    for row in rows:
        plain = float(row["plain"])
        others = [
            f"{float(row[name]):.3f} ({100 * (float(row[name]) / plain - 1):+.2f} %)" for name in list(_VARIANTS)[1:]
        ]
        lines.append([row["model"], row["tokens"], f"{plain:.3f}", *others, row["device"], row["commit"]])
    header = ["model", "tokens", "cache and head as they are", *list(_VARIANTS)[1:], "device", "commit"]
    text = markdown_table(header, lines, "lrrrrll")
    if document is not None:
        put_table(document, TABLE, text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Measure and publish; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", help="a packed checkpoint with its tokenizer")
    parser.add_argument("--text", metavar="FILE", help="running text: a file, or a Hub id")
    parser.add_argument("--label", metavar="NAME", help="name of the row (default: the folder's)")
    parser.add_argument("--tokens", type=int, default=20_000, metavar="N", help="read at most (default: 20000)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the rows are kept")
    parser.add_argument("--docs", type=Path, metavar="FILE", help=f"also write the table of {DOCUMENT.name} there")
    options = parser.parse_args(arguments)
    if (options.folder is None) != (options.text is None):
        parser.error("give a folder and --text FILE, or neither for the table of what is there")
    return exit_status(lambda: _run(options), interrupted="rows of models that were measured before are kept")


def _run(options: argparse.Namespace) -> int:
    if options.folder is not None:
        device, stamp = choose_device(options.device), provenance()
        label = options.label or Path(options.folder).name
        found = measure(options.folder, options.text, device, options.tokens)
        store(options.results, {"model": label, "tokens": str(options.tokens), **found, **stamp})
    print(publish(read_rows(options.results), options.docs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
