"""Stage "calibrate": from prompts and models to frozen blocks, handed to the packer one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qrealign.calibrate.blockwise import BlockwiseCalibrator
from qrealign.calibrate.endtoend import EndToEndCalibrator
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.objectives import BehaviourObjective, Objective
from qrealign.calibrate.streams import Inputs, Streams
from qrealign.calibrate.teachers import TeacherCache
from qrealign.data.capture import capture_block_inputs
from qrealign.data.prompts import Label
from qrealign.files import remove
from qrealign.models.device import free_bytes
from qrealign.pipeline.context import RunContext
from qrealign.pipeline.models import add_shells, round_block
from qrealign.pipeline.references import (
    contrastive_objective,
    load_masks,
    load_maxima,
    preference_objective,
)
from qrealign.pipeline.student import Student, edit_factors
from qrealign.pipeline.teaching import teacher_file
from qrealign.probes.probe import SafetyProbe
from qrealign.records import CurvePoint
from qrealign.repair.stored import StoredChange, store_block

STREAMS = "streams.safetensors"
STREAM_SHARE = 0.25  # of the free memory: streams that take more stay on the host
OnBlock = Callable[[int, nn.Module], None]


def run_calibration(context: RunContext, probe: SafetyProbe | None, on_block: OnBlock) -> list[CurvePoint]:
    """Run the method's last learning stage; every block is handed to `on_block` frozen. Returns the loss curve."""
    if context.spec.endtoend is not None:
        return _end_to_end(context, context.spec.endtoend, on_block)
    if context.settings.engine == "blockwise":
        return _blockwise(context, probe, on_block)
    return _round_to_nearest(context, on_block)


def learn_blocks(context: RunContext, probe: SafetyProbe | None) -> None:
    """Run the block-wise engine in front of a polish, and let the polish read the weights with its edits."""
    source, folder = context.repaired, context.workspace.state / "learned"

    def on_trained(index: int, block: nn.Module) -> None:
        store_block(folder, index, edit_factors(block, source.spec.block_name(index)))

    if not context.workspace.done("calibrate"):
        with context.workspace.stage("calibrate", context.meter):
            _blockwise(context, probe, lambda *_: None, on_trained if context.team.leads else None)
        context.team.wait()
        if context.team.leads:
            remove(context.workspace.state / STREAMS)
    context.repaired = source.changed_by(StoredChange(folder, source.num_blocks))


def _round_to_nearest(context: RunContext, on_block: OnBlock) -> list[CurvePoint]:
    source, pool = context.repaired, context.pool
    model = source.skeleton(dtype=pool.dtype)
    add_shells(model, source, context.scheme)
    for index in range(source.num_blocks):
        block = round_block(model, source, index, context.device, pool.dtype)
        on_block(index, block)
        block.to("meta")
    return []


def _blockwise(
    context: RunContext, probe: SafetyProbe | None, on_block: OnBlock, on_trained: OnBlock | None = None
) -> list[CurvePoint]:
    settings, source, pool = context.settings, context.repaired, context.pool
    prompts = context.data.calibration
    rows = [*prompts.malicious, *prompts.harmless()]
    batch = context.calibration_encoder.pad(
        context.calibration_encoder.encode_many([prompt.text for prompt in rows]), side="right"
    )
    pool.release()
    model = source.skeleton(dtype=pool.dtype)
    source.load_outer(model, context.device, pool.dtype)
    hidden, kwargs = capture_block_inputs(
        model, batch.input_ids.to(context.device), batch.attention_mask.to(context.device)
    )
    malicious = torch.tensor([prompt.label == Label.MALICIOUS for prompt in rows])
    inputs = Inputs(mask=batch.attention_mask, last_index=batch.last_index, malicious=malicious, kwargs=kwargs)
    streams = Streams(student=hidden.cpu(), finetuned=hidden.cpu().clone())
    aligned = None
    if settings.uses_aligned and context.aligned is not None:
        aligned_model = context.aligned.skeleton(dtype=pool.dtype)
        context.aligned.load_outer(aligned_model, context.device, pool.dtype)
        aligned_hidden, _ = capture_block_inputs(
            aligned_model, batch.input_ids.to(context.device), batch.attention_mask.to(context.device)
        )
        streams.aligned, aligned = aligned_hidden.cpu(), (context.aligned, aligned_model)
    calibrator = BlockwiseCalibrator(
        source=source,
        model=model,
        scheme=context.scheme,
        settings=settings,
        inputs=inputs,
        streams=streams,
        on_block=on_block,
        on_trained=on_trained,
        state_path=context.workspace.state / STREAMS,
        device=context.device,
        dtype=pool.dtype,
        aligned=aligned,
        probe=probe if settings.uses_probe else None,
        low_memory=streams_on_host(context),
        team=context.team,
    )
    return calibrator.run(progress=context.progress("calibrate"))


def stream_bytes(context: RunContext) -> int:
    """Return the bytes of the block-wise engine's activation streams."""
    settings, width = context.spec.settings, context.finetuned.config.hidden_size
    streams = 3 if settings.uses_aligned else 2
    return streams * settings.samples * settings.sequence_length * width * context.pool.dtype.itemsize


def streams_on_host(context: RunContext) -> bool:
    """Return whether the streams of the block-wise engine stay in host memory: as asked for, or as memory is free."""
    if context.pool.memory != "auto":
        return context.pool.memory in ("low", "streamed")
    return context.device.type == "cuda" and stream_bytes(context) > STREAM_SHARE * free_bytes(context.device)


def _end_to_end(context: RunContext, settings: CalibrationSettings, on_block: OnBlock) -> list[CurvePoint]:
    student = Student(context, settings, maxima=load_maxima(context), masks=load_masks(context))
    calibrator = EndToEndCalibrator(
        student.model,
        student.trainable,
        _objective(context, settings),
        settings,
        state_path=context.workspace.state / "endtoend.safetensors",
        record=student.recordable,
        team=context.team,
    )
    curve = calibrator.run(progress=context.progress("calibrate"))
    student.freeze(on_block)
    return curve


def _objective(context: RunContext, settings: CalibrationSettings) -> Objective:
    """Return the objective with the samples that stage "teach" has left."""
    if settings.objective == "contrastive":
        return contrastive_objective(context, settings)
    if settings.objective == "preference":
        return preference_objective(context, settings)
    cache = TeacherCache.load(teacher_file(context))
    return BehaviourObjective(cache, settings, pad_id=context.encoder.pad_id, device=context.device)
