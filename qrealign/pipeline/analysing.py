"""Stage "analyse": what the models' blocks tell apart, and from which block on a model refuses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qrealign.data.prompts import Prompt
from qrealign.pipeline.context import RunContext
from qrealign.pipeline.evaluating import TITLES, load, model_names
from qrealign.pipeline.probing import state_batch
from qrealign.probes.exits import choose_exits, semantic_separability
from qrealign.probes.probe import SafetyProbe
from qrealign.probes.separability import distance_ratios, fisher_ratios, probe_rates, projection_2d
from qrealign.probes.states import collect_last_states
from qrealign.records import BlockRecord
from qrealign.report.model import Projection

logger = logging.getLogger(__name__)

ANALYSED_PROMPTS = {"quick": 50, "full": 100}  # of each class
EXIT_PROMPTS = {"quick": 12, "full": 100}  # of each class, for early answers
EXIT_BLOCKS = {"quick": 6, "full": 12}  # at most; each costs a model's answers to all of these prompts
EXIT_TOKENS = 32  # a refusal opens the answer, but in half as many tokens a repetition is not seen as one
PROJECTED_BLOCKS = 3
ExitTable = dict[str, dict[str, float]]  # block's index as text -> fields of `ExitRates`


def run_analysis(context: RunContext, probe: SafetyProbe | None) -> tuple[list[BlockRecord], list[Projection]]:
    """Return, per block, separability and distances to the teachers on evaluation prompts; and pictures of a few.

    Early answers, the slow part, are kept per model: those on disk are not asked again.
    """
    evaluation = context.data.evaluation
    most = ANALYSED_PROMPTS[context.options.eval]
    malicious, benign = (_spread(prompts, most) for prompts in (evaluation.harmful, evaluation.benign))
    if len(malicious) < 2 or len(benign) < 2:
        return [], []
    labels = torch.tensor([1] * len(malicious) + [0] * len(benign))
    prompts = [*malicious, *benign]
    states: dict[str, Tensor] = {}
    exits: dict[str, ExitTable] = {}
    for name in model_names(context):
        if name == "realigned" and context.spec.rounds_only:
            states[name], exits[name] = states["quantized"], exits["quantized"]
            continue
        model = load(context, name)
        states[name] = collect_last_states(
            model,
            context.encoder,
            prompts,
            context.finetuned.spec,
            batch_size=state_batch(context, model, context.encoder, prompts),
            progress=context.progress(f"analyse: {TITLES[name]}"),
        )
        exits[name] = context.workspace.cached_json(f"exits-{name}", partial(_early_answers, context, name, model))
    return _block_records(states, exits, labels, probe), _projections(states, labels, probe)


def exit_cost(context: RunContext) -> tuple[list[int], int, int]:
    """Return what early answers ask of each model: the blocks to stop at, how many prompts, and tokens of an answer."""
    options, evaluation = context.options, context.data.evaluation
    most = EXIT_PROMPTS[options.eval]
    count = min(most, len(evaluation.harmful)) + min(most, len(evaluation.benign))
    blocks = choose_exits(context.finetuned.num_blocks, EXIT_BLOCKS[options.eval])
    return blocks, count, min(EXIT_TOKENS, options.max_new_tokens or EXIT_TOKENS)


def _early_answers(context: RunContext, name: str, model: PreTrainedModel) -> ExitTable:
    """Return what a model's answers are when it stops at a block, by the block's index as text (a key of JSON)."""
    evaluation, most = context.data.evaluation, EXIT_PROMPTS[context.options.eval]
    exits, _, tokens = exit_cost(context)
    try:
        rates = semantic_separability(
            model,
            context.encoder,
            _spread(evaluation.harmful, most),
            _spread(evaluation.benign, most),
            context.finetuned.spec,
            exits=exits,
            max_new_tokens=tokens,
            batch_size=context.options.eval_batch_size,
            progress=context.progress(f"analyse: {TITLES[name]} answers"),
        )
    except IndexError:
        # A model that is no row of the table may count its blocks instead of walking through them.
        if context.finetuned.spec.known:
            raise
        logger.warning("this architecture cannot stop at an early block: its early answers are left out")
        return {}
    return {str(block): asdict(rate) for block, rate in rates.items()}


def _spread(prompts: Sequence[Prompt], most: int) -> list[str]:
    """Return at most `most` prompts, evenly taken: prompts stand in order of their source."""
    count = min(len(prompts), most)
    return [prompts[place * len(prompts) // count].text for place in range(count)]


def _block_records(
    states: dict[str, Tensor], exits: dict[str, ExitTable], labels: Tensor, probe: SafetyProbe | None
) -> list[BlockRecord]:
    distance = {name: distance_ratios(value, labels) for name, value in states.items()}
    fisher = {name: fisher_ratios(value, labels) for name, value in states.items()}
    recall = (
        {name: [rate.recall for rate in probe_rates(probe, value, labels)] for name, value in states.items()}
        if probe
        else {}
    )
    records = []
    for index in range(len(states["finetuned"])):
        accuracy = probe.fits[index].accuracy if probe is not None and probe.fits else None
        records.append(
            BlockRecord(
                index=index,
                probe_accuracy=accuracy,
                fisher_ratio={name: values[index] for name, values in fisher.items()},
                distance_ratio={name: values[index] for name, values in distance.items()},
                probe_recall={name: values[index] for name, values in recall.items()},
                semantic_separability={name: table[str(index)] for name, table in exits.items() if str(index) in table},
                loss=_distances(states, labels, index),
            )
        )
    return records


def _distances(states: dict[str, Tensor], labels: Tensor, index: int) -> dict[str, float]:
    """Return how far the realigned model is from its teachers at one block: squared, relative to the teacher's norm."""
    realigned, malicious = states["realigned"][index], labels == 1
    distances = {"benign_to_finetuned": _relative(realigned[~malicious], states["finetuned"][index][~malicious])}
    if "aligned" in states:
        distances["malicious_to_aligned"] = _relative(realigned[malicious], states["aligned"][index][malicious])
        distances["malicious_to_aligned_before"] = _relative(
            states["quantized"][index][malicious], states["aligned"][index][malicious]
        )
    return distances


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).square().sum() / reference.square().sum().clamp(min=1e-12))


def _projections(states: dict[str, Tensor], labels: Tensor, probe: SafetyProbe | None) -> list[Projection]:
    """Return pictures of an early, a middle and the last block, the same plane for every model."""
    reference = states.get("aligned", states["finetuned"])
    count = len(reference)
    chosen = sorted({round(count * share) - 1 for share in (1 / PROJECTED_BLOCKS, 2 / PROJECTED_BLOCKS, 1)} - {-1})
    projections = []
    for block in chosen:
        plane = projection_2d(reference[block], labels, probe, block)
        points = {
            name: [
                (round(float(x), 4), round(float(y), 4), int(label))
                for (x, y), label in zip(plane(value[block]), labels, strict=True)
            ]
            for name, value in states.items()
        }
        projections.append(Projection(block=block, points=points))
    return projections
