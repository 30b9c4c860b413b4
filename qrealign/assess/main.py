"""`python -m qrealign.evaluate` from its flags to its exit status."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qrealign.assess.command import parse_options
from qrealign.errors import ConfigError, JudgeError
from qrealign.files import write_json, write_text
from qrealign.status import VERDICT_FAILED, exit_status

if TYPE_CHECKING:
    import torch

    from qrealign.assess.contestants import Contestant
    from qrealign.assess.options import AssessOptions
    from qrealign.assess.results import Assessment, Harness
    from qrealign.evaluate.plan import EvaluationData, EvaluationSettings
    from qrealign.evaluate.suite import Measured
    from qrealign.judges.interface import Judge
    from qrealign.pipeline.models import ModelPool

Say = Callable[[str], None]
_SHOWN_SETTINGS = ("max_new_tokens", "prefill_tokens", "perplexity_tokens", "temperature", "seeds", "batch_size")


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; return 0 where the verdict passed, or another exit status (see `command.py`)."""
    return exit_status(
        lambda: _run(arguments), interrupted="with --output, the same command continues where it stopped"
    )


def _run(arguments: Sequence[str] | None) -> int:
    options = parse_options(arguments)

    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr, flush=True)

    found = assess(options, say)
    from qrealign.assess.results import junit_xml, scores_json, terminal_text

    if options.junit is not None:
        write_text(Path(options.junit), junit_xml(found))
    if options.json:
        say(terminal_text(found))
    print(json.dumps(scores_json(found)) if options.json else terminal_text(found))
    return VERDICT_FAILED if found.verdict.passed is False else 0


def assess(options: AssessOptions, say: Say) -> Assessment:
    """Ask every model everything, judge the answers, and write the results to `--output`.

    Raises:
        QrealignError: one sentence that the user can act on.
    """
    from qrealign.assess.contestants import open_contestants
    from qrealign.assess.gate import absolute_verdict, relative_verdict
    from qrealign.assess.results import Assessment, Column, assessment_json, detectable_note, markdown
    from qrealign.assess.suites import read_data
    from qrealign.evaluate.compare import compare_scores
    from qrealign.evaluate.harness import check_harness
    from qrealign.evaluate.suite import EvaluationSettings, score_model
    from qrealign.pipeline.models import ModelPool, choose_device

    start = time.perf_counter()
    _check_place(options.output, "--output", "folder")
    _check_place(options.junit, "--junit", "file")
    if options.lm_eval:
        check_harness()
    pool = ModelPool(choose_device(options.device))
    contestants = open_contestants(options)
    data, notes = read_data(options)
    judges = open_judges(options)  # their weights are read when they judge, after the models have left the memory
    settings = EvaluationSettings(
        max_new_tokens=options.max_new_tokens,
        prefill_tokens=options.prefill_tokens,
        perplexity_tokens=options.perplexity_tokens,
        batch_size=options.batch_size,
        temperature=options.sampling_temperature,
        seeds=options.seeds,
        progress=not options.quiet,
    )
    measured = [_measure(one, pool, data, settings, options, say) for one in contestants]
    columns = [
        Column(title=one.title, given=one.given, scores=score_model(data, found, judges), harness=harness)
        for one, (found, harness) in zip(contestants, measured, strict=True)
    ]
    model, other = columns[0], columns[1] if len(columns) > 1 else None
    detectable = [note for note in (detectable_note(model.scores),) if note and other is None]
    notes += [f"{judge.name}: {judge.note}" for judge in judges if judge.note]
    found = Assessment(
        model=model,
        other=other,
        verdict=absolute_verdict(model.scores, options)
        if other is None
        else relative_verdict(model.scores, other.scores, other.title, options),
        comparison={} if other is None else compare_scores(model.scores, other.scores),
        settings={name: value for name, value in asdict(settings).items() if name in _SHOWN_SETTINGS},
        versions=_versions(pool.device),
        notes=list(dict.fromkeys([*notes, *detectable, *(note for one in contestants for note in one.encoder.notes)])),
        wall_seconds=time.perf_counter() - start,
    )
    if options.output is not None:
        write_json(Path(options.output) / "evaluation.json", assessment_json(found))
        write_text(Path(options.output) / "evaluation.md", markdown(found))
    return found


def open_judges(options: AssessOptions) -> list[Judge]:
    """Open the further judges; the refusal rule always judges, so naming it adds nothing.

    Raises:
        ConfigError: a judge is unknown or damaged, or two have the same name.
        ModelError: a model judge cannot be used; subclasses say why.
        AbsentDeviceError: the device is absent.
    """
    from qrealign.judges.interface import RefusalRule

    judges: list[Judge] = []
    for spec in options.judge:
        if spec == RefusalRule.name:
            continue
        from qrealign.judges.resolve import open_judge

        try:
            judge = open_judge(spec, device=options.device, batch_size=options.batch_size, progress=not options.quiet)
        except JudgeError as error:
            raise ConfigError(f"--judge {spec}: {error}") from error
        judges.append(judge)
    names = [judge.name for judge in judges]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--judge names {', '.join(sorted(twice))} twice: each judge may be named once")
    return judges


def _measure(
    contestant: Contestant,
    pool: ModelPool,
    data: EvaluationData,
    settings: EvaluationSettings,
    options: AssessOptions,
    say: Say,
) -> tuple[Measured, Harness]:
    """Load one model, ask it, and let go of it. What an earlier run with this `--output` asked is not asked again."""
    from qrealign.evaluate.book import AnswerBook
    from qrealign.evaluate.harness import run_harness
    from qrealign.evaluate.suite import measure_model

    path = None if options.output is None else Path(options.output) / "answers" / f"{contestant.key}.json"
    book = AnswerBook(path, contestant.identity(pool))
    if book.note:
        say(book.note)
    model = contestant.load(pool)
    measured = measure_model(model, contestant.encoder, data, settings, name=contestant.title, book=book)
    if book.reused:
        say(f"{contestant.title}: {book.reused} answers were taken from {path}")
    harness: Harness = {}
    if options.lm_eval:
        tokenizer = contestant.encoder.tokenizer
        harness = run_harness(model, tokenizer, options.lm_eval, batch_size=options.batch_size, limit=options.limit)
    del model
    pool.release()
    return measured, harness


def _check_place(given: str | None, flag: str, kind: Literal["file", "folder"]) -> None:
    """Refuse a place for results where nothing can be written, before any work is done."""
    if given is None:
        return
    path = Path(given).absolute()
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long, a folder that is closed
        raise ConfigError(f"{flag} {given} cannot be used ({error.strerror}): name another {kind}") from error
    if there and path.is_dir() != (kind == "folder"):
        raise ConfigError(f"{flag} {given} is a {'folder' if path.is_dir() else 'file'}: name a {kind}")
    holder = next(parent for parent in (path, *path.parents) if parent.exists())
    if (holder != path and not holder.is_dir()) or not os.access(holder, os.W_OK):
        raise ConfigError(f"{flag} {given} cannot be written to: name another {kind}")


def _versions(device: torch.device) -> dict[str, Any]:
    import torch
    import transformers

    import qrealign

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {"qrealign": qrealign.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "device": name}
