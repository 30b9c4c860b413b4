"""What a run will do and cost, said before any weight is loaded."""

from __future__ import annotations

import time

import torch

from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.schedule import block_epochs
from qrealign.evaluate.perplexity import cut_windows
from qrealign.evaluate.suite import EvaluationSettings
from qrealign.pack.format import quantization_config
from qrealign.pack.runtimes import Runtime, compatible_runtimes
from qrealign.pack.size import estimate_packed_bytes, require_free_disk
from qrealign.pipeline.analysing import exit_cost
from qrealign.pipeline.calibrating import stream_bytes, streams_on_host
from qrealign.pipeline.context import RunContext
from qrealign.pipeline.evaluating import NEW_TOKENS, PERPLEXITY_TOKENS, model_names
from qrealign.pipeline.student import KEPT_SHARE
from qrealign.pipeline.teaching import cache_bytes, teacher_batch
from qrealign.repair.settings import OneShot, SafeDelta

GIB = 2**30
PROMPT_TOKENS = 48  # typical length of a prompt with its template
# Shares of the measured matrix-product rate that a whole model reaches: training steps, and answering with a cache.
TRAINING_SHARE, ANSWERING_SHARE = 0.35, 0.15
FILE_RATE = 2e9  # bytes a second through the files of models, in memory or on a fast disk
BUS_RATE = 20e9  # bytes a second from pinned host memory to a GPU
KEPT_VALUES = 20  # numbers that a block's backward pass keeps for each token and hidden channel, roughly
LOGIT_COPIES = 7
RANGE = (0.5, 2.0)  # an estimate is given as a range around the count


def preflight(context: RunContext) -> list[str]:
    """Return the lines that describe the run.

    Raises:
        QrealignError: the disk is too small, or the evaluation's texts are.
    """
    _check_texts(context)
    source, packed = context.finetuned, estimate_packed_bytes(context.finetuned, context.scheme)
    state = state_bytes(context)
    free = require_free_disk(context.workspace.directory, packed + state)
    seconds = estimate_seconds(context)
    low, high = (seconds * factor for factor in RANGE)
    template = "chat template" if context.encoder.has_template else "no chat template (plain form)"
    counts = context.data.counts()
    lines = [
        f"model       {source.name}: {source.spec.model_type}, {source.num_blocks} blocks, "
        f"{source.total_bytes / GIB:.2f} GiB, {template}",
        f"method      {context.spec.name} ({context.spec.describe()}), scheme {context.scheme.name}, "
        f"on {context.device}",
        "prompts     " + ", ".join(f"{count} {name}" for name, count in counts.items() if count),
        "overlap     evaluation prompts are disjoint from calibration and probe prompts (checked)",
    ]
    lines += [f"runtime     {runtime_line(runtime)}" for runtime in _runtimes(context)]
    lines += [
        f"disk        {packed / GIB:.2f} GiB for the checkpoint, {state / GIB:.2f} GiB for resuming, "
        f"{free / GIB:.0f} GiB free",
        memory_line(context),
        *_analysis_line(context),
        f"time        about {duration(low)} to {duration(high)} (counted work at this machine's measured rate)",
    ]
    return lines + [f"note        {note}" for note in context.notes]


def _check_texts(context: RunContext) -> None:
    """Refuse texts too short for a perplexity before the work, not behind it."""
    size = context.options.eval
    if size != "none":
        tokenizer, texts = context.encoder.tokenizer, context.data.evaluation.texts
        window = EvaluationSettings.perplexity_window
        cut_windows(tokenizer, texts, max_tokens=PERPLEXITY_TOKENS[size], window=window)


def _analysis_line(context: RunContext) -> list[str]:
    """Return what the early answers of the analysis are, nothing without an evaluation."""
    if context.options.eval == "none":
        return []
    exits, asked, tokens = exit_cost(context)
    return [
        f"analysis    early answers of each model from {len(exits)} of {context.finetuned.num_blocks} blocks: "
        f"{asked} prompts, {tokens} tokens"
    ]


def runtime_line(runtime: Runtime) -> str:
    """Return one runtime's answer as a line."""
    answer = f"{runtime.kernel}; {runtime.gpus}" if runtime.accepted else f"refused: {runtime.why}"
    return f"{runtime.name}: {answer}"


def _runtimes(context: RunContext) -> list[Runtime]:
    config = {
        **context.finetuned.config.to_dict(),
        "quantization_config": quantization_config(context.scheme, ["lm_head"]),
    }
    return compatible_runtimes(config, context.finetuned.linear_shapes())


def state_bytes(context: RunContext) -> int:
    """Return about how many bytes the files for resuming take, those of the repair included."""
    spec, hidden = context.spec, context.finetuned.config.hidden_size
    shapes = context.finetuned.linear_shapes().values()
    weights, borders = sum(rows * columns for rows, columns in shapes), sum(rows + columns for rows, columns in shapes)
    total = weights * context.finetuned.storage_dtype.itemsize if isinstance(spec.repair, SafeDelta) else 0
    total += 4 * borders * spec.repair.rank if isinstance(spec.repair, OneShot) else 0
    if spec.settings.engine == "blockwise":
        total += stream_bytes(context)
        total += 4 * borders * spec.settings.edit_rank if spec.polish is not None else 0
    if spec.endtoend is not None:
        teachers = 2 if spec.endtoend.uses_base else 1
        total += teachers * spec.endtoend.samples * 2 * PROMPT_TOKENS * hidden * 4
        total += 3 * 4 * borders * spec.endtoend.edit_rank if spec.endtoend.edit_learning_rate else 0
        total += weights if spec.endtoend.critical_share < 1 else 0
    return total


def memory_line(context: RunContext) -> str:
    """Return how the weights are held, what of the device that takes, and what a step moves to it."""
    pool, source = context.pool, context.finetuned
    line = f"memory      about {memory_bytes(context) / GIB:.1f} GiB on {context.device}"
    if context.spec.endtoend is None:
        kept = context.spec.settings.engine == "blockwise" and streams_on_host(context)
        return f"{line}, activation streams in host memory" if kept else line
    chosen = " (chosen from what is free)" if pool.memory == "auto" else ""
    line += f", weights {pool.mode(source)}{chosen}"
    moved = moved_bytes(context)
    return line if not moved else f"{line}: {moved / GIB:.1f} GiB come from the host in each step"


def moved_bytes(context: RunContext) -> int:
    """Return the bytes of weights that a step of the end-to-end engine brings to the device: forward and backward."""
    pool, source = context.pool, context.finetuned
    if context.spec.endtoend is None or context.device.type != "cuda" or pool.fits(source):
        return 0
    return 2 * max(0, pool.resident_bytes(source) - pool.weight_bytes(source))


def memory_bytes(context: RunContext) -> int:
    """Return about how much device memory the run takes: weights, what a backward pass keeps, outputs of a batch."""
    source, settings = context.finetuned, context.spec.endtoend or context.spec.settings
    if context.device.type == "cuda" and settings.engine == "endtoend":
        return _endtoend_bytes(context, settings)
    if context.device.type == "cuda" and settings.engine == "blockwise":
        return _blockwise_bytes(context, settings)
    resident, block = (
        context.pool.resident_bytes(source),
        context.pool.resident_bytes(source) // max(1, source.num_blocks),
    )
    tokens = settings.batch_size * min(settings.sequence_length, 2 * PROMPT_TOKENS)
    width = source.config.hidden_size + (
        getattr(source.config, "intermediate_size", 0) or 4 * source.config.hidden_size
    )
    activations = (
        tokens * width * 16 * context.pool.dtype.itemsize * (source.num_blocks if settings.engine == "endtoend" else 1)
    )
    held = resident if settings.engine == "endtoend" else 0
    grids = 6 * 4 * sum(rows * columns for rows, columns in source.linear_shapes().values())
    return held + block + activations + (grids if settings.engine == "endtoend" else grids // max(1, source.num_blocks))


def _endtoend_bytes(context: RunContext, settings: CalibrationSettings) -> int:
    """Return about what the end-to-end engine takes on a GPU, in its steps or while its teachers answer."""
    source, pool = context.finetuned, context.pool
    tokens = settings.batch_size * (settings.sequence_length + max(settings.benign_tokens, settings.refusal_tokens))
    activations = tokens * source.config.hidden_size * pool.dtype.itemsize * (source.num_blocks + KEPT_VALUES)
    if pool.fits(source):
        graph = tokens * source.config.hidden_size * KEPT_VALUES * pool.dtype.itemsize * source.num_blocks
        activations = max(activations, int(min(graph, KEPT_SHARE * pool.resident_bytes(source))))
    # Logits of the student and its teacher, with their logarithms and gradients, in float32.
    outputs = LOGIT_COPIES * 4 * tokens // 2 * source.config.vocab_size
    borders = sum(rows + columns for rows, columns in source.linear_shapes().values())
    edits = 4 * 4 * borders * settings.edit_rank if settings.edit_learning_rate else 0  # values, gradients, two moments
    answering = min(settings.samples, teacher_batch(context, settings)) * cache_bytes(context, settings)
    return pool.weight_bytes(source) + max(activations + outputs + edits, answering)


def _blockwise_bytes(context: RunContext, settings: CalibrationSettings) -> int:
    """Return about what the block-wise engine takes on a GPU: a block as loaded, rounded, and in float32 to be folded,
    the activations of a batch, and the streams where they are kept there.
    """
    source, itemsize = context.finetuned, context.pool.dtype.itemsize
    weights = sum(rows * columns for rows, columns in source.linear_shapes().values()) // max(1, source.num_blocks)
    wide = getattr(source.config, "intermediate_size", 0) or 4 * source.config.hidden_size
    tokens = settings.batch_size * min(settings.sequence_length, 2 * PROMPT_TOKENS)
    activations = tokens * (source.config.hidden_size + wide) * KEPT_VALUES * itemsize
    streams = 0 if streams_on_host(context) else stream_bytes(context)
    return weights * (2 * itemsize + 4) + activations + streams


def estimate_seconds(context: RunContext) -> float:
    """Return the run's seconds from its floating-point operations, at the device's rate in a short matrix product.

    The models' files take their time, and weights that come from the host in each step may take longer than its
    operations.
    """
    moving = moved_bytes(context) * (0 if context.spec.endtoend is None else context.spec.endtoend.steps) / BUS_RATE
    rate = measured_flops(context.device, context.pool.dtype)
    weights = sum(rows * columns for rows, columns in context.finetuned.linear_shapes().values())
    training, answering = training_tokens(context), answering_tokens(context)
    optimisation = max(moving, 6 * weights * training / (rate * TRAINING_SHARE))
    teachers = 1 + (context.aligned is not None)
    files = (teachers + 1) * context.finetuned.total_bytes / FILE_RATE  # read, and in the end written and read back
    return files + optimisation + 2 * weights * answering / (rate * ANSWERING_SHARE)


def training_tokens(context: RunContext) -> float:
    """Return how many tokens pass forward and backward through the whole model."""
    spec, settings, blocks = context.spec, context.settings, context.finetuned.num_blocks
    total = 0.0
    if isinstance(spec.repair, OneShot):
        total += spec.repair.steps * spec.repair.refusals * (PROMPT_TOKENS + spec.repair.answer_tokens)
    if spec.endtoend is not None:
        sequences = 2 if spec.endtoend.objective == "preference" else 1
        prompts = spec.endtoend.steps * spec.endtoend.batch_size * sequences
        total += prompts * (PROMPT_TOKENS + spec.endtoend.benign_tokens)
    if settings.engine != "blockwise":
        return total
    epochs = sum(block_epochs(index, blocks, settings.epochs) for index in range(blocks)) / blocks
    return total + epochs * settings.samples * min(settings.sequence_length, 2 * PROMPT_TOKENS)


def answering_tokens(context: RunContext) -> float:
    """Return how many tokens pass forward: teachers, probe, evaluation and analysis."""
    options, data = context.options, context.data
    teaching = context.spec.data_settings.samples * 2 * PROMPT_TOKENS
    teaching *= 2 if isinstance(context.spec.repair, SafeDelta) else 1
    probing = (len(data.probe_malicious) + len(data.probe_benign)) * PROMPT_TOKENS if context.aligned else 0
    if options.eval == "none":
        return teaching + probing
    evaluation = data.evaluation
    prompts = len(evaluation.harmful) + len(evaluation.benign) + len(evaluation.over_refusal)
    tokens = (
        prompts * (PROMPT_TOKENS + (options.max_new_tokens or NEW_TOKENS[options.eval]))
        + len(evaluation.task) * PROMPT_TOKENS
    )
    exits, asked, answered = exit_cost(context)
    depth = sum(block + 1 for block in exits) / max(1, context.finetuned.num_blocks)  # in whole models
    early = depth * asked * (PROMPT_TOKENS + answered)
    return teaching + probing + len(model_names(context)) * (tokens + early + PERPLEXITY_TOKENS[options.eval])


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Return the operations per second of a matrix product on the device; larger ones, and warm, on a GPU."""
    size = 4 * size if device.type == "cuda" else size
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    float((a @ b)[0, 0])
    repeats, start = 8, time.perf_counter()
    for _ in range(repeats):
        result = a @ b
    float(result[0, 0])  # waits for the device
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def duration(seconds: float) -> str:
    """Return a rough duration in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
