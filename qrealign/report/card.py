"""The model card written beside the packed weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from qrealign.report import markdown
from qrealign.report.model import LIMITS, PACKED_BYTES, SOURCE_BYTES, RunReport
from qrealign.report.text import cost_line, recipe, size

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # with the compressed-tensors package installed

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MADE = {
    "rtn": "Its weights were rounded as they are; no safety objective was used.",
    "reconstruction": "Its quantization parameters were calibrated to reproduce the fine-tuned model; no safety "
    "objective was used.",
    "paper": "Its quantization parameters were calibrated block by block: on harmful prompts to be recognised by "
    "probes of the aligned model that it was fine-tuned from, on the others to reproduce the fine-tuned model.",
    "realign": "While its quantization parameters were calibrated, its answers to harmful prompts were pulled back "
    "to those of the aligned model that it was fine-tuned from, and its other answers were held to the fine-tuned "
    "model's.",
}
_SERVE = """```
vllm serve path/to/this/folder
```"""


def model_card(report: RunReport) -> str:
    """Return the text of `README.md` for the packed checkpoint: what it is, its scores, use and limits."""
    sections = [
        _front_matter(report),
        f"# {markdown.escape(report.name)}, quantized and realigned",
        _introduction(report),
        "## Scores\n\n" + markdown.score_table(report),
        "## Verdict\n\n" + markdown.verdict_section(report),
        "## Use\n\n" + "\n\n".join([_USE, *([_SERVE] if _takes(report, "vllm") else [])]),
        markdown.runtime_table(report),
        _making(report),
        "## Limits\n\n" + markdown.bullets([*report.notes, *LIMITS]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(report: RunReport) -> str:
    """Return the YAML block; strings are written as JSON, which is YAML."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if (origin := _hub_id(report)) is not None:
        lines += [f"base_model: {json.dumps(origin)}", "base_model_relation: quantized"]
    lines.append(
        f"tags: {json.dumps(['compressed-tensors', report.scheme, 'safety', 'post-training-quantization', 'qrealign'])}"
    )
    return "\n".join(["---", *lines, "---"])


def _introduction(report: RunReport) -> str:
    """Return what the checkpoint is, in a paragraph."""
    origin = markdown.escape(_hub_id(report) or report.name)
    repair = _MADE.get(report.method, _MADE["realign"])
    return (
        f"A quantized checkpoint of {origin} in compressed-tensors form ({markdown.escape(recipe(report))}), made with "
        f"qrealign. {repair}{_size_sentence(report)}"
    )


def _hub_id(report: RunReport) -> str | None:
    """Return the fine-tuned model's Hub id, None where it was given as a folder."""
    given = report.base_model or ""
    return given if _HUB_ID.fullmatch(given) and not Path(given).exists() else None


def _size_sentence(report: RunReport) -> str:
    """Return how large the checkpoint is, if that is known."""
    before, after = (report.sizes.get(name) for name in (SOURCE_BYTES, PACKED_BYTES))
    if after is None:
        return ""
    return f" The weights take {size(after)}{f' instead of {size(before)}' if before else ''}."


def _making(report: RunReport) -> str:
    """Return what went into the run: prompts, cost, settings, versions, hashes."""
    cost = cost_line(report)
    facts = markdown.facts(replace(report, settings=_public(report.settings))).replace("## ", "### ")
    parts = ["## How it was made", *([f"Cost: {cost}."] if cost else []), facts]
    return "\n\n".join(part for part in parts if part) if cost or facts else ""


def _public(value: Any) -> Any:
    """Return settings without the folders of the machine that ran: a card is made to be published."""
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    return PurePath(value).name if isinstance(value, (str, PurePath)) and PurePath(value).is_absolute() else value


def _takes(report: RunReport, runtime: str) -> bool:
    """Return whether a runtime is known to take the file."""
    return any(row.accepted and row.name.lower().startswith(runtime) for row in report.runtimes)
