"""Stage "evaluate": the scores of every model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from qrealign.evaluate.serialise import from_json, to_json
from qrealign.evaluate.suite import EvaluationSettings, evaluate_model
from qrealign.pack.source import open_packed
from qrealign.pipeline.context import RunContext
from qrealign.records import ModelScores

NEW_TOKENS = {"quick": 32, "full": 256}
PERPLEXITY_TOKENS = {"quick": 4096, "full": 65536}
TITLES = {
    "aligned": "aligned",
    "finetuned": "fine-tuned",
    "base": "base",
    "quantized": "plain PTQ",
    "realigned": "realigned",
}


def model_names(context: RunContext) -> list[str]:
    """Return the names of the models that this run evaluates, in table order."""
    optional = [name for name, source in (("base", context.base), ("aligned", context.aligned)) if source is not None]
    return [*optional, "finetuned", "quantized", "realigned"]


def load(context: RunContext, name: str) -> PreTrainedModel:
    """Return one of the run's models by name."""
    if name == "quantized":
        return context.pool.plain_quantized(name, context.finetuned, context.scheme)
    if name == "realigned":
        return context.pool.packed(name, open_packed(str(context.workspace.model)))
    source = {"aligned": context.aligned, "finetuned": context.finetuned, "base": context.base}[name]
    assert source is not None
    return context.pool.full_precision(name, source)


def run_evaluation(context: RunContext) -> dict[str, ModelScores]:
    """Return the scores of every model; a model whose scores are on disk is not asked again."""
    options = context.options
    settings = EvaluationSettings(
        max_new_tokens=options.max_new_tokens or NEW_TOKENS[options.eval],
        batch_size=options.eval_batch_size,
        perplexity_tokens=PERPLEXITY_TOKENS[options.eval],
        progress=not options.quiet,
    )
    scores: dict[str, ModelScores] = {}
    for name in model_names(context):
        if name == "realigned" and context.spec.rounds_only:
            scores[name] = scores["quantized"]
            continue

        def measure(name: str = name) -> dict[str, Any]:
            model = load(context, name)
            return to_json(evaluate_model(model, context.encoder, context.data.evaluation, settings, name=TITLES[name]))

        scores[name] = from_json(context.workspace.cached_json(f"evaluation-{name}", measure))
    return scores
