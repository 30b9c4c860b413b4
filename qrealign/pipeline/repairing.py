"""Stage "repair": the fine-tuned weights changed before anything is quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qrealign.calibrate.endtoend import EndToEndCalibrator
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.objectives import AnswerObjective, AnswerSample
from qrealign.data.generate import generate_ids
from qrealign.errors import DataError
from qrealign.files import remove
from qrealign.models.source import WeightChange
from qrealign.pipeline.context import RunContext
from qrealign.pipeline.student import Student
from qrealign.repair.gather import repair_blocks
from qrealign.repair.interpolate import InterpolationChange
from qrealign.repair.safelora import SafeLoraChange, choose_projected, update_cosines
from qrealign.repair.settings import Interpolation, OneShot, RepairSettings, SafeDelta, SafeLora
from qrealign.repair.stored import StoredChange

ANSWER_BATCH = 32
ONE_SHOT_BATCH = 16
FIXED_REFUSAL = "I'm sorry, but I can't help with that."


def run_repair(context: RunContext) -> None:
    """Run the method's repair, or find it done, and let everything behind it read the repaired weights."""
    repair = context.spec.repair
    if repair is None:
        return
    with context.workspace.once("repair", context.meter):
        change = _RUNNERS[type(repair)](context, repair)
    context.repaired = context.finetuned.changed_by(change)


def _folder(context: RunContext) -> Path:
    return context.workspace.state / "repair"


def _interpolate(context: RunContext, repair: RepairSettings) -> WeightChange:
    assert isinstance(repair, Interpolation) and context.aligned is not None
    return InterpolationChange(context.aligned, repair.coefficient)


def _safelora(context: RunContext, repair: RepairSettings) -> WeightChange:
    """Find which linears to project, once for all, and say how many they are."""
    assert isinstance(repair, SafeLora) and context.aligned is not None and context.base is not None
    base, aligned, finetuned = context.base, context.aligned, context.finetuned
    cosines = context.workspace.cached_json("safelora", lambda: update_cosines(base, aligned, finetuned))
    projected = choose_projected(cosines, threshold=repair.threshold, lowest=repair.lowest)
    context.notes.append(f"SafeLoRA projected the updates of {len(projected)} of {len(cosines)} linears")
    return SafeLoraChange(base, aligned, projected)


def _safe_delta(context: RunContext, repair: RepairSettings) -> WeightChange:
    """Ask the aligned model the safety prompts and repair every block by what its activations say."""
    assert isinstance(repair, SafeDelta) and context.aligned is not None
    aligned, folder = context.aligned, _folder(context)
    if not context.workspace.done("repair"):
        encoder = context.encoder
        ids = encoder.encode_many(_safety_prompts(context, repair.samples))
        answers = generate_ids(
            context.pool.full_precision("aligned", aligned),
            encoder,
            ids,
            max_new_tokens=repair.answer_tokens,
            batch_size=ANSWER_BATCH,
            progress=context.progress("repair: the aligned model answers"),
        )
        context.pool.release()
        repair_blocks(
            aligned,
            context.finetuned,
            encoder.pad([prompt + answer for prompt, answer in zip(ids, answers, strict=True)], side="right"),
            repair,
            folder,
            device=context.device,
            dtype=context.pool.dtype,
            progress=context.progress("repair: Safe Delta"),
        )
    return StoredChange(folder, context.finetuned.num_blocks)


def _one_shot(context: RunContext, repair: RepairSettings) -> WeightChange:
    """Learn a low-rank edit of the full-precision model on a few refusals."""
    assert isinstance(repair, OneShot)
    folder, progress = _folder(context), context.workspace.state / "one-shot.safetensors"
    if not context.workspace.done("repair"):
        samples = _refusal_samples(context, repair)
        settings = CalibrationSettings(
            method=repair.name,
            engine="endtoend",
            objective="answer",
            batch_size=min(len(samples), ONE_SHOT_BATCH),
            steps=repair.steps,
            edit_learning_rate=repair.learning_rate,
            edit_rank=repair.rank,
            edit_budget=1.0,
            sequence_length=context.calibration_encoder.max_length,
            benign_tokens=repair.answer_tokens,
            seed=context.options.seed,
        )
        student = Student(context, settings, quantize=False)
        EndToEndCalibrator(
            student.model,
            student.trainable,
            AnswerObjective(samples, pad_id=context.encoder.pad_id),
            settings,
            state_path=progress,
        ).run(progress=context.progress("repair: one-shot"))
        student.store_edits(folder)
        remove(progress)
    return StoredChange(folder, context.finetuned.num_blocks)


def _safety_prompts(context: RunContext, count: int) -> list[str]:
    """Return up to `count` malicious prompts of the data, whether the method behind the repair calibrates on any.

    The probe's are drawn from the same pool in the same order, so the longer draw begins with the shorter.
    """
    malicious = max(context.data.calibration.malicious, context.data.probe_malicious, key=len)
    if not malicious:
        raise DataError("the repair needs malicious prompts and --safety-data has no usable one: give more prompts")
    return [prompt.text for prompt in malicious[:count]]


def _refusal_samples(context: RunContext, repair: OneShot) -> list[AnswerSample]:
    """Return the first malicious prompts with a refusal each, its end included."""
    encoder = context.calibration_encoder
    prompts = encoder.encode_many(_safety_prompts(context, repair.refusals))
    if repair.answer == "aligned":
        assert context.aligned is not None
        answers = generate_ids(
            context.pool.full_precision("aligned", context.aligned),
            encoder,
            prompts,
            max_new_tokens=repair.answer_tokens,
            batch_size=ANSWER_BATCH,
            progress=context.progress("repair: the aligned model refuses"),
        )
    else:
        fixed = list(encoder.tokenizer(FIXED_REFUSAL, add_special_tokens=False).input_ids)
        end = encoder.tokenizer.eos_token_id
        answers = [fixed + ([] if end is None else [end])] * len(prompts)
    return [
        AnswerSample(input_ids=torch.tensor(prompt + answer), start=len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]


_RUNNERS: dict[type[RepairSettings], Callable[[RunContext, RepairSettings], WeightChange]] = {
    Interpolation: _interpolate,
    SafeLora: _safelora,
    SafeDelta: _safe_delta,
    OneShot: _one_shot,
}
