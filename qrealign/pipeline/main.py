"""The main job from first check to report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import nn

import qrealign
from qrealign.calibrate.distributed import Team, joined_team
from qrealign.errors import CheckpointFormatError, ResumeError
from qrealign.files import read_json, remove, sha256_of_text, write_json
from qrealign.pack.verify import verify_checkpoint
from qrealign.pack.writer import CheckpointWriter
from qrealign.pipeline.analysing import run_analysis
from qrealign.pipeline.calibrating import learn_blocks, run_calibration
from qrealign.pipeline.comparing import compare, read_compared
from qrealign.pipeline.context import RunContext, build_context
from qrealign.pipeline.evaluating import run_evaluation
from qrealign.pipeline.options import RunOptions
from qrealign.pipeline.preflight import preflight
from qrealign.pipeline.probing import run_probe_stage
from qrealign.pipeline.repairing import run_repair
from qrealign.pipeline.reporting import analysis_from_json, analysis_to_json, build_report, write_everything
from qrealign.pipeline.teaching import run_teaching
from qrealign.probes.probe import SafetyProbe
from qrealign.records import BlockRecord, CurvePoint, ModelScores
from qrealign.report.model import ComparedRun, Projection, RunReport


def run(options: RunOptions, say: Callable[[str], None]) -> RunReport | None:
    """Realign, pack, evaluate and report; None after a dry run.

    Raises:
        QrealignError: one sentence that the user can act on.
    """
    with joined_team() as team:
        return _run(options, say, team)


def _run(options: RunOptions, say: Callable[[str], None], team: Team) -> RunReport | None:
    """Do the job of one process: the first one of a team does everything, the others share the calibration."""
    torch.manual_seed(options.seed)
    context = build_context(options, say, team)
    for line in preflight(context):
        context.say(line)
    others = read_compared(context)
    if options.dry_run:
        context.workspace.check(context.identity(), fresh=options.fresh, must_exist=options.resume)
        return None
    if not team.leads:
        _follow(context)
        return None
    if context.workspace.open(context.identity(), fresh=options.fresh, must_exist=options.resume):
        say(f"continuing the run in {context.workspace.directory}")
    probe = run_probe_stage(context)
    run_repair(context)
    run_teaching(context)
    team.wait()
    calibrate(context, probe)
    pack(context)
    report = prove(context, probe, others)
    write_everything(context, report)
    say(f"packed model: {context.workspace.model}   report: {context.workspace.directory / 'report.html'}")
    return report


def _follow(context: RunContext) -> None:
    """Wait for the stages that the first process does alone, read what they left, and share its calibration."""
    if context.spec.learns_whole and context.pool.fits(context.finetuned):
        context.pool.full_precision("finetuned", context.finetuned)  # the student to be, while the teachers answer
    context.team.wait()
    probe = run_probe_stage(context)
    run_repair(context)
    if context.spec.learns_behind_blocks:
        learn_blocks(context, probe)
    learns = context.spec.endtoend is not None or context.settings.engine == "blockwise"
    if learns and not context.workspace.done(_last_stage(context)):
        run_calibration(context, probe, lambda *_: None)


def _last_stage(context: RunContext) -> str:
    """Return the stage that ends with every block written."""
    return "calibrate" if context.spec.polish is None else "polish"


def _writer(context: RunContext) -> CheckpointWriter:
    identity = sha256_of_text(repr(sorted(context.identity().items())))
    return CheckpointWriter(context.repaired, context.scheme, context.workspace.model, identity=identity)


def calibrate(context: RunContext, probe: SafetyProbe | None) -> None:
    """Stages "calibrate" and "polish": learn, freeze, and write every block; each is read back, compared code by code.

    The block-wise engine in front of a polish writes no codes: its edits are handed on before they are rounded.
    """
    workspace, last = context.workspace, _last_stage(context)
    if context.spec.learns_behind_blocks:
        learn_blocks(context, probe)
    if workspace.done(last):
        return
    writer = _writer(context)
    seconds: dict[int, float] = {}
    before = time.perf_counter()

    def on_block(index: int, block: nn.Module) -> None:
        nonlocal before
        writer.add_block(index, block)
        seconds[index], before = time.perf_counter() - before, time.perf_counter()

    with workspace.stage(last, context.meter):
        curve = run_calibration(context, probe, on_block)
        # Inside: a stage marked done is not run again, so nothing of it may be missing.
        record = {"curve": [asdict(point) for point in curve], "seconds": seconds}
        write_json(workspace.state / "calibration.json", record)
    context.pool.release()


def pack(context: RunContext) -> None:
    """Stage "pack": complete the checkpoint, put it in place and verify it."""
    workspace = context.workspace
    if workspace.done("pack"):
        if not workspace.model.exists():
            raise ResumeError(f"{workspace.model} is gone although this run had packed it: run again with --fresh")
        return
    with workspace.stage("pack", context.meter):
        writer = _writer(context)
        writer.add_outer(context.repaired.outer_state())
        writer.finish({"version": qrealign.__version__, "method": context.spec.name, "model": context.finetuned.name})
        verification = verify_checkpoint(workspace.model, context.finetuned)
        if not verification.passed:
            raise CheckpointFormatError(
                f"{workspace.model} does not hold what was written: {'; '.join(verification.problems)}"
            )
    for name in ("streams.safetensors", "endtoend.safetensors", "maxima.safetensors", "masks.safetensors"):
        remove(workspace.state / name)


def prove(context: RunContext, probe: SafetyProbe | None, others: list[ComparedRun]) -> RunReport:
    """Stages "evaluate" and "analyse", and the report made from them; `others` are the runs to compare with."""
    workspace = context.workspace
    scores: dict[str, ModelScores] = {}
    blocks: list[BlockRecord] = []
    projections: list[Projection] = []
    if context.options.eval != "none":
        with workspace.once("evaluate", context.meter):
            scores = run_evaluation(context)
        with workspace.once("analyse", context.meter):
            analysis = workspace.cached_json("analysis", lambda: analysis_to_json(*run_analysis(context, probe)))
        blocks, projections = analysis_from_json(analysis)
    calibration = read_json(workspace.state / "calibration.json")
    for block in blocks:
        block.seconds = calibration["seconds"].get(str(block.index), 0.0)
    curves = [CurvePoint(**point) for point in calibration["curve"]]
    compared = compare(others, scores["realigned"]) if others else []
    return build_report(context, scores, blocks, projections, curves, compared)
