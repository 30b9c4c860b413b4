"""One job, done in a worker: train an adapter, begin prefill answers, measure a model, or repair and measure one."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.safety.plan import Job, Plan, split_method
from benchmarks.safety.prompts import evaluation_data, fingerprint, held_pairs, write_prefill
from benchmarks.safety.variants import parse_variant, train_variant
from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import generate_answers
from qrealign.data.prompts import sample
from qrealign.errors import QrealignError, ResumeError
from qrealign.evaluate.serialise import to_json
from qrealign.evaluate.suite import EvaluationSettings, evaluate_model, judge
from qrealign.files import read_json, remove, sha256_of_text, write_json
from qrealign.models.source import ModelSource, open_model
from qrealign.pack.source import open_packed
from qrealign.pipeline.context import PROMPT_TOKENS
from qrealign.pipeline.main import run
from qrealign.pipeline.models import ModelPool, choose_device
from qrealign.pipeline.options import RunOptions, merge_options, resolved, used_options
from qrealign.pipeline.reporting import versions
from qrealign.records import StageRecord
from qrealign.resources import ResourceMeter

FORMAT = 1  # of a result; raised where what a result means changes


def perform(plan: Plan, job: Job, device: str) -> None:
    """Do one job and write what it gives.

    Raises:
        QrealignError: it cannot be done; the other jobs can.
    """
    on = choose_device(device)
    if job.kind == "train":
        variant = plan.variant(job.variant)
        train_variant(parse_variant(variant.name), plan.aligned, plan.corpora, variant.adapter.parent, on)
    elif job.kind == "prefill":
        begin_answers(plan, job, on)
    elif job.kind == "reference":
        measure_reference(plan, job, on)
    else:
        measure_cell(plan, job, on)


def finished(plan: Plan, job: Job) -> bool:
    """Return whether the job's result is there, made with the same models, prompts and settings."""
    if job.kind == "train":
        return False  # training looks for itself whether its adapter is there, and whether it is the one meant
    file = plan.prefill_file(job.variant) if job.kind == "prefill" else plan.result_file(job)
    if not file.is_file():
        return False
    try:
        found = read_json(file)
        return isinstance(found, dict) and "error" not in found and found.get("identity") == identity(plan, job)
    except (QrealignError, ValueError):  # whatever is wrong, the worker says it
        return False


def identity(plan: Plan, job: Job) -> dict[str, Any]:
    """Return everything that decides the job's result, as JSON values, but for the code itself.

    Raises:
        QrealignError: a model or a data file cannot be used, or the method does not exist.
    """
    variant, limits = plan.variant(job.variant), plan.limits
    if job.kind == "prefill":
        return {
            "kind": plan.prefill,
            "device": plan.device,
            "model": _model_hash(plan.aligned, str(variant.adapter)),
            "limits": asdict(limits),
            "data": _data_hashes(plan, job),
        }
    tokens = {name: getattr(limits, name) for name in ("max_new_tokens", "prefill_tokens", "perplexity_tokens")}
    found: dict[str, Any] = {
        "format": FORMAT,
        "asked": fingerprint(evaluation_data(plan, job.variant)),
        "tokens": tokens,
        "device": plan.device,
        "model": _model_hash(*_paths(plan, job)),
    }
    if job.kind == "cell":
        others = [plan.aligned, *([plan.base] if plan.base else [])]
        settings = {name: value for name, value in resolved(cell_options(plan, job)).items() if name != "options"}
        found |= {
            "scheme": job.scheme,
            "settings": settings,
            "overrides": plan.overrides,
            "others": [_model_hash(other, None) for other in others],
            "data": _data_hashes(plan, job),
        }
    return _as_json(found)


def _data_hashes(plan: Plan, job: Job) -> dict[str, str]:
    """Return a SHA-256 of each data file that a job may read besides the prompts that it asks."""
    specs = plan.calibration(plan.variant(job.variant).task, long=True)
    return {
        name: sha256_of_text(*(_file_hash(file.partition("?")[0]) for file in files)) for name, files in specs.items()
    }


@functools.lru_cache(maxsize=128)
def _model_hash(path: str, adapter: str | None) -> str:
    return open_model(path, adapter=adapter).fingerprint()


@functools.lru_cache(maxsize=128)
def _file_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _as_json(value: Any) -> Any:
    """Return `value` as it comes back from a JSON file: tuples become lists."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def cell_options(plan: Plan, job: Job, device: str = "auto") -> RunOptions:
    """Return the pipeline's options for a cell.

    Raises:
        ConfigError: the method is unknown or needs a model that was not given, or an override is no option.
    """
    variant = plan.variant(job.variant)
    method, options = split_method(job.method)
    values = used_options(
        {
            "model": plan.aligned,
            "adapter": str(variant.adapter),
            "aligned": plan.aligned,
            **({"base": plan.base} if plan.base else {}),
            "method": method,
            "scheme": job.scheme,
            "seed": job.seed,
            "output": str(plan.run_directory(job)),
            "device": device,
            "eval": "none",
            "quiet": True,
            **plan.calibration(variant.task, long=options.get("schedule") == "long"),
            **plan.overrides,
            **options,
        }
    )
    return merge_options(None, {**values, **options})


def begin_answers(plan: Plan, job: Job, device: torch.device) -> None:
    """Write the variant's prefill attack: the kept-back pairs, or the harmful prompts that it complies with itself."""
    found = identity(plan, job)
    if plan.prefill == "pairs":
        write_prefill(plan, job.variant, found, held_pairs(plan))
        return
    source = _source(plan, job)
    encoder, limits = _encoder(source, plan), plan.limits
    prompts = evaluation_data(plan, job.variant).harmful
    pool = ModelPool(device)
    answers = generate_answers(
        pool.full_precision(job.name, source),
        encoder,
        [prompt.text for prompt in prompts],
        max_new_tokens=limits.max_new_tokens,
        batch_size=plan.batch_size,
    )
    pool.release()
    complied = [(p, answer) for p, answer in zip(prompts, answers, strict=True) if judge(p, answer).word == "answered"]
    begun = [replace(p, answer=_beginning(encoder, answer, limits.prefill_tokens)) for p, answer in complied]
    most = min(len(begun), limits.prefill_limit, limits.limit or limits.prefill_limit)
    write_prefill(plan, job.variant, found, sample(begun, most, seed=0))


def _beginning(encoder: ChatEncoder, answer: str, tokens: int) -> str:
    return encoder.decode(encoder.answer_ids(answer, tokens))


def measure_reference(plan: Plan, job: Job, device: torch.device) -> None:
    """Measure a model as it is: base, aligned or fine-tuned."""
    source, pool, meter = _source(plan, job), ModelPool(device), ResourceMeter(device.type)
    with meter.stage("evaluate"):
        scores = _evaluate(plan, job, pool.full_precision(job.name, source), source)
    pool.release()
    _write_result(plan, job, device, scores, meter.stages, {})


def measure_cell(plan: Plan, job: Job, device: torch.device) -> None:
    """Run the project's pipeline and measure the packed model, which is then removed unless it is to be kept."""
    options = cell_options(plan, job, str(device))
    report = _run_pipeline(options)
    pool, meter, folder = ModelPool(device), ResourceMeter(device.type), options.directory / "model"
    with meter.stage("evaluate"):
        packed = open_packed(str(folder))  # as a user would: the folder alone
        scores = _evaluate(plan, job, pool.packed(job.name, packed), packed)
    pool.release()
    details = {"settings": report.settings, "sizes": report.sizes, "prompts": report.data, "notes": report.notes}
    _write_result(plan, job, device, scores, [*report.stages, *meter.stages], details)
    if not plan.keep_models:
        remove(options.directory)


def _run_pipeline(options: RunOptions) -> Any:
    """Return the pipeline's report; a run left there with other settings is started over."""
    try:
        return run(options, lambda line: None)
    except ResumeError:
        return run(replace(options, fresh=True), lambda line: None)


def _source(plan: Plan, job: Job) -> ModelSource:
    path, adapter = _paths(plan, job)
    return open_model(path, adapter=adapter)


def _paths(plan: Plan, job: Job) -> tuple[str, str | None]:
    """Return the model, and its adapter, that a reference measures or that everything else starts from."""
    if job.kind == "reference" and job.method != "finetuned":
        return str(plan.base) if job.method == "base" else plan.aligned, None
    return plan.aligned, str(plan.variant(job.variant).adapter)


def _encoder(source: ModelSource, plan: Plan) -> ChatEncoder:
    """Return the encoder of a model, whose prompts leave room for the answer."""
    positions = getattr(source.config, "max_position_embeddings", None) or PROMPT_TOKENS
    room = min(PROMPT_TOKENS, positions - plan.limits.max_new_tokens)
    return ChatEncoder(source.tokenizer(), max_length=room)


def _evaluate(plan: Plan, job: Job, model: PreTrainedModel, source: ModelSource) -> dict[str, Any]:
    """Return a model's scores, as JSON values."""
    limits = plan.limits
    settings = EvaluationSettings(
        max_new_tokens=limits.max_new_tokens,
        prefill_tokens=limits.prefill_tokens,
        perplexity_tokens=limits.perplexity_tokens,
        batch_size=plan.batch_size,
        progress=False,
    )
    return to_json(evaluate_model(model, _encoder(source, plan), evaluation_data(plan, job.variant), settings))


def _write_result(
    plan: Plan,
    job: Job,
    device: torch.device,
    scores: dict[str, Any],
    stages: list[StageRecord],
    details: dict[str, Any],
) -> None:
    result = {
        "job": asdict(job),
        "identity": identity(plan, job),
        "scores": scores,
        "cost": [asdict(stage) for stage in stages],
        **details,
        "versions": versions(device),
        "commit": plan.commit,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(plan.result_file(job), result)
