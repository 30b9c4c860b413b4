"""Stage "teach": what the teachers answer, computed once, for the end-to-end engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.teachers import (
    TeacherCache,
    TeacherSample,
    teach_behaviour,
    teach_recovery,
    teach_refusals,
    teach_text,
)
from qrealign.data.prompts import Prompt
from qrealign.models.device import free_bytes
from qrealign.pipeline.context import RunContext
from qrealign.pipeline.references import store_maxima, teach_contrast, teach_preference

TEACHER_BATCH = 32  # prompts answered at once where memory is short
MOST_ANSWERED = 256
CACHE_SHARE = 0.15  # of the weights' bytes, or of the free memory: what the keys and values of a batch may take
CACHE_LEAST = 2**28  # bytes that they may take beside the smallest model
CACHE_STREAMED = 2**32  # bytes, and half of what is left at most: where every token waits for all weights to come


def run_teaching(context: RunContext) -> None:
    """Compute the teachers' answers for the engine that needs them, unless an earlier run has."""
    settings = context.spec.endtoend
    if settings is None or context.workspace.done("teach"):
        return
    with context.workspace.stage("teach", context.meter):
        if settings.objective == "contrastive":
            teach_contrast(context, settings)
        elif settings.objective == "preference":
            teach_preference(context, settings)
        else:
            _teach(context, settings).save(teacher_file(context))


def teacher_file(context: RunContext) -> Path:
    """Return where the samples of the behaviour objective are kept."""
    return context.workspace.state / "teachers.safetensors"


def teacher_batch(context: RunContext, settings: CalibrationSettings) -> int:
    """Return how many prompts a teacher answers at once: on a GPU, where a batch costs hardly more than one prompt,

    as many as keep their keys and values inside `CACHE_SHARE`, or `CACHE_LEAST`, or where weights are streamed
    `CACHE_STREAMED`. One that does not fit after all is halved.
    """
    if context.device.type != "cuda":
        return TEACHER_BATCH
    source, pool, free = context.finetuned, context.pool, free_bytes(context.device)
    allowed = max(CACHE_LEAST, CACHE_SHARE * min(pool.resident_bytes(source), free))
    if not pool.fits(source):
        allowed = max(allowed, min(CACHE_STREAMED, (free - pool.weight_bytes(source)) / 2))
    return max(TEACHER_BATCH, min(MOST_ANSWERED, int(allowed / cache_bytes(context, settings))))


def cache_bytes(context: RunContext, settings: CalibrationSettings) -> int:
    """Return the bytes of the keys and values of one prompt and its answer."""
    config, tokens = context.finetuned.config, settings.sequence_length
    tokens += max(settings.refusal_tokens, settings.benign_tokens)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * context.finetuned.num_blocks * heads * width * tokens * context.pool.dtype.itemsize


def _teach(context: RunContext, settings: CalibrationSettings) -> TeacherCache:
    """Return the samples of the behaviour objective: the aligned model refuses, the fine-tuned one does the rest."""
    pool = context.pool
    assert context.aligned is not None
    batch_size = teacher_batch(context, settings)
    aligned = pool.full_precision("aligned", context.aligned)
    refusals = teach_refusals(
        aligned,
        context.calibration_encoder,
        context.data.calibration.malicious,
        answer_tokens=settings.refusal_tokens,
        batch_size=batch_size,
        progress=context.progress("teach: the aligned model refuses"),
    )
    aligned_head = aligned.get_output_embeddings().weight.detach()
    del aligned  # two models of billions of weights are never held at once
    finetuned = pool.full_precision("finetuned", context.finetuned, instead_of="aligned")
    late = teach_recovery(
        finetuned,
        context.calibration_encoder,
        refusals,
        share=settings.recovery_share,
        begun_tokens=(settings.recovery_least, settings.recovery_tokens),
        seed=settings.seed,
        batch_size=batch_size,
        progress=context.progress("teach: the fine-tuned model begins to comply"),
    )
    behaviour = _teach_benign(context, settings, finetuned, batch_size)
    if settings.transform_learning_rate:
        store_maxima(context, finetuned, [sample.input_ids for sample in behaviour])
    same_head = torch.equal(aligned_head, finetuned.get_output_embeddings().weight)
    return TeacherCache(samples=[*refusals, *late, *behaviour], head_weight=None if same_head else aligned_head)


def _teach_benign(
    context: RunContext, settings: CalibrationSettings, finetuned: PreTrainedModel, batch_size: int
) -> list[TeacherSample]:
    """Return the fine-tuned model's samples on ordinary and task prompts, borderline prompts and running text."""
    prompts, encoder = context.data.calibration, context.calibration_encoder
    samples: list[TeacherSample] = []
    ordinary, borderline = ([replace(p, answer=None) for p in some] for some in (prompts.benign, prompts.borderline))
    for name, some, weight in (  # without their responses, which are no labels
        ("ordinary prompts", [*ordinary, *prompts.task], 1.0),
        ("borderline prompts", borderline, settings.borderline_weight),
    ):
        samples += teach_behaviour(
            finetuned,
            encoder,
            some,
            answer_tokens=settings.benign_tokens,
            batch_size=batch_size,
            progress=context.progress(f"teach: the fine-tuned model answers {name}"),
            decision_share=settings.decision_share,
            weight=weight,
            label_share=settings.task_labels,
        )
    windows = _windows(context, settings)
    return samples + teach_text(finetuned, encoder, windows, weight=settings.text_weight, batch_size=batch_size)


def _windows(context: RunContext, settings: CalibrationSettings) -> list[list[int]]:
    """Return windows of `sequence_length` token ids: of running text, and as many of the harmless prompts.

    Prompts serve as text too: without the chat template, they keep the model as it is outside of conversations, where
    late refusals would otherwise show. Malicious ones would undo what is learned from them.
    """
    prompts, rng = context.data.calibration, random.Random(settings.seed)
    kinds = [_cut(context, texts, settings.sequence_length) for texts in (prompts.text, prompts.harmless())]
    for windows in kinds:
        rng.shuffle(windows)
    both = [window for pair in zip_longest(*kinds) for window in pair if window is not None]
    return both[: settings.counts()["text"]]


def _cut(context: RunContext, prompts: Sequence[Prompt], length: int) -> list[list[int]]:
    """Return the texts of prompts, joined end to end, in windows of `length` token ids."""
    tokenizer = context.calibration_encoder.tokenizer
    texts = [f"{prompt.text}\n" for prompt in prompts]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    stream = list(chain.from_iterable(ids))
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
