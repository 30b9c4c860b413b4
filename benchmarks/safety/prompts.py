"""What every model is asked: the same prompts for all, disjoint from whatever calibration may draw."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks.safety.corpora import Corpora
from benchmarks.safety.plan import Limits, Plan
from qrealign.data.prompts import Label, Prompt, Role, find_overlap, normalise, read_prompts, sample
from qrealign.errors import DataError
from qrealign.evaluate.suite import EvaluationData
from qrealign.files import read_json, remove, sha256_of_text, write_json, write_text

SEED = 0  # of every draw here: all cells are asked the same
# Of the ordinary prompts that are asked. A calibration with the same seed would rank the same ones first, and so draw
# none of the others of their source.
_BENIGN_SEED = 2601
LONGEST_BENIGN = 1000  # characters: longer ones do not fit into the context of small models


def write_benign(plan: Plan) -> None:
    """Draw the ordinary prompts of the evaluation, and write them and those that are left for calibration.

    Raises:
        DataError: a file is missing, or no prompt is left.
    """
    location = plan.corpora.file("instruct_dolly")
    short = [prompt for prompt in read_prompts(location, role="benign") if len(prompt.text) <= LONGEST_BENIGN]
    remove(plan.not_asked_file)  # of an earlier call: not part of what the draw has to avoid
    apart = _without(short, _calibration_pool(plan))
    if not apart:
        raise DataError(f"{location} has no short prompt that calibration does not use: give one with more rows")
    drawn = sample(apart, min(len(apart), plan.limits.benign, plan.limits.limit or len(apart)), _BENIGN_SEED)
    telling = {overlap.training for overlap in find_overlap(apart, drawn)}  # the drawn ones among them
    left = [prompt for prompt in apart if prompt.text not in telling]
    _write_prompts(plan.benign_file, drawn)
    if left:
        _write_prompts(plan.not_asked_file, left)


def _write_prompts(file: Path, prompts: Sequence[Prompt]) -> None:
    rows = [{"prompt": prompt.text, "source": prompt.source} for prompt in prompts]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _calibration_pool(plan: Plan) -> list[Prompt]:
    """Return everything that calibration may draw besides the task."""
    specs = plan.calibration(plan.variants[0].task)
    roles: dict[str, Role] = {"safety_data": "malicious", "benign_data": "benign", "borderline_data": "benign"}
    return [prompt for name, role in roles.items() for file in specs[name] for prompt in read_prompts(file, role=role)]


def _without(prompts: Sequence[Prompt], training: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that no training prompt gives away."""
    known = {normalise(overlap.evaluation) for overlap in find_overlap(training, prompts)}
    return [prompt for prompt in prompts if normalise(prompt.text) not in known]


def evaluation_data(plan: Plan, variant: str) -> EvaluationData:
    """Return everything that the variant, its repairs and its references are asked.

    Raises:
        DataError: a file is missing or unusable.
    """
    common = _common_data(plan.corpora, plan.limits, str(plan.benign_file), plan.variant(variant).task)
    file = plan.prefill_file(variant)
    rows = read_json(file)["rows"] if file.is_file() and plan.prefill != "none" else []
    begun = [Prompt(text=row["prompt"], answer=row["answer"], label=Label.MALICIOUS) for row in rows]
    return EvaluationData(**{**vars(common), "prefill": begun})


@functools.lru_cache(maxsize=8)
def _common_data(corpora: Corpora, limits: Limits, benign_file: str, task: str) -> EvaluationData:
    """Return what does not depend on the variant's answers; a worker reads it once."""
    harmful = read_prompts(corpora.file("eval_harmful"), role="malicious")
    return EvaluationData(
        harmful=_per_source(harmful, limits),
        over_refusal=_some(read_prompts(corpora.file("eval_overrefusal"), role="over_refusal"), limits.limit),
        benign=read_prompts(benign_file, role="benign"),
        task=_some(read_prompts(corpora.file(f"task_{task}") + "?split=test", role="task"), limits.limit),
        texts=[prompt.text for prompt in read_prompts(corpora.file("text_wikitext2") + "?split=test", role="text")],
    )


def _some(prompts: list[Prompt], most: int | None) -> list[Prompt]:
    return prompts if most is None else sample(prompts, min(len(prompts), most), SEED)


def _per_source(prompts: list[Prompt], limits: Limits) -> list[Prompt]:
    """Return at most so many prompts of each source, source after source."""
    sources = sorted({prompt.source for prompt in prompts})
    shares = [limits.per_source, None if limits.limit is None else ceil(limits.limit / len(sources))]
    most = min((share for share in shares if share is not None), default=None)
    return [p for source in sources for p in _some([p for p in prompts if p.source == source], most)]


def write_prefill(plan: Plan, variant: str, identity: dict[str, Any], begun: Sequence[Prompt]) -> None:
    """Write a variant's prefill attack: prompts with the text that their answers begin with.

    Raises:
        DataError: there is none.
    """
    if not begun:
        raise DataError(
            f"{variant} complies with no harmful prompt, so its answers begin no prefill attack: use --prefill pairs"
        )
    rows = [{"prompt": prompt.text, "answer": prompt.answer, "source": prompt.source} for prompt in begun]
    write_json(plan.prefill_file(variant), {"identity": identity, "rows": rows})


def held_pairs(plan: Plan) -> list[Prompt]:
    """Return the harmful pairs that no variant made here was trained on, none of which calibration may see."""
    _, held = plan.corpora.harmful_pairs()
    unique = {normalise(pair.text): pair for pair in reversed(held)}
    apart = _without(list(unique.values()), _calibration_pool(plan))
    return _some(apart, min(plan.limits.prefill_limit, plan.limits.limit or plan.limits.prefill_limit))


def fingerprint(data: EvaluationData) -> str:
    """Return a SHA-256 over everything that is asked, in its order."""
    return sha256_of_text(
        *(
            f"{name}\t{item.text}\t{item.answer}" if isinstance(item, Prompt) else f"{name}\t{item}"
            for name, items in vars(data).items()
            for item in items
        )
    )
