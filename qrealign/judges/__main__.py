"""`python -m qrealign.judges DATA`: how far judges agree with people's labels."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain

from qrealign.errors import ConfigError
from qrealign.judges.agreement import Agreement, Alarms, measure_alarms, measure_judge
from qrealign.judges.interface import RefusalRule
from qrealign.judges.labelled import LabelledAnswer, leave_out, read_answers, read_labelled
from qrealign.judges.resolve import open_judge
from qrealign.records import Score
from qrealign.status import exit_status

_EPILOG = """\
A judge is refusal-rule, the URL of an OpenAI-compatible endpoint with its model (http://host:8000/v1#name), a folder
written by python -m qrealign.judges.train, or a model by Hub id or folder (docs/judges.md). Brackets are 95 % Wilson
intervals; that of F1 is the Jaccard index's, carried over.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the agreement of each judge; return 0, or another exit status after one sentence on standard error."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _run(options), interrupted="nothing is kept")


def _run(options: argparse.Namespace) -> int:
    rows = _read_rows(options)
    alarms = [measure_alarms(spec, read_answers(spec)[: options.limit]) for spec in options.ordinary]
    results, notes = _measure(options, rows)
    if options.json:
        value = {
            "agreement": [asdict(result) for result in results],
            "ordinary": [asdict(alarm) for alarm in alarms],
            "notes": notes,
        }
        print(json.dumps(value))
    else:
        print("\n".join([*_agreement_lines(results), *_alarm_lines(alarms), *_note_lines(notes)]))
    return 0


def _read_rows(options: argparse.Namespace) -> list[LabelledAnswer]:
    """Return the labelled answers to measure on.

    Raises:
        ConfigError: nothing is named, or nothing is left.
        DataError: a file cannot be read.
    """
    if not options.data and not options.ordinary:
        raise ConfigError("name data to measure on: labelled answers, or --ordinary answers")
    for flag, value in (("--limit", options.limit), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}")
    rows = leave_out(chain.from_iterable(map(read_labelled, options.data)), options.leave_out)
    if options.data and not rows:
        raise ConfigError("--leave-out leaves no labelled answer")
    return rows[: options.limit]


def _measure(options: argparse.Namespace, rows: Sequence[LabelledAnswer]) -> tuple[list[Agreement], dict[str, str]]:
    """Return what every judge scores on `rows`, and what is known of each judge's error."""
    results: list[Agreement] = []
    notes: dict[str, str] = {}
    if not rows:
        return results, notes
    for spec in options.judge or [RefusalRule.name]:
        judge = open_judge(spec, device=options.device, batch_size=options.batch_size, progress=not options.json)
        results += measure_judge(judge, rows)
        notes[judge.name] = judge.note
    return results, notes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qrealign.judges",
        description="Measure judges against people's labels of answers (harmful, safe, refusal).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data", nargs="*", metavar="DATA", help="files or Hub ids of rows with prompt, response, label and source"
    )
    parser.add_argument("--judge", action="append", metavar="SPEC", help="may be repeated (default: refusal-rule)")
    parser.add_argument(
        "--leave-out", action="append", default=[], metavar="SOURCE:LABEL", help="rows not to count; may be repeated"
    )
    parser.add_argument(
        "--ordinary",
        action="append",
        default=[],
        metavar="DATA",
        help="ordinary answers, on which the refusal rule and the degeneracy gate should be silent; may be repeated",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows of each only")
    parser.add_argument("--device", default="auto", metavar="NAME", help="of model judges: auto (default), cpu, cuda")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="answers a model judge reads at once")
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of tables")
    return parser


def _agreement_lines(results: Sequence[Agreement]) -> list[str]:
    lines = []
    for judge, question in dict.fromkeys((result.judge, result.question) for result in results):
        lines += [f"{judge}: is the answer {'a refusal' if question == 'refusal' else 'harmful'}?"]
        lines += [f"  {'source':20}{'n':>7}  {'agreement':>19}{'precision':>19}{'recall':>19}{'F1':>19}"]
        lines += [
            f"  {result.source[:20]:20}{result.n:>7}  "
            + "".join(f"{_cell(score):>19}" for score in (result.agreement, result.precision, result.recall, result.f1))
            for result in results
            if (result.judge, result.question) == (judge, question)
        ]
        lines += [""]
    return lines


def _alarm_lines(alarms: Sequence[Alarms]) -> list[str]:
    return [
        f"{alarm.source}: of {alarm.broken.n} answers {_counted(alarm.broken)} are called broken and "
        f"{_counted(alarm.refusal)} a refusal"
        for alarm in alarms
    ]


def _note_lines(notes: dict[str, str]) -> list[str]:
    return [f"{judge}: {note}" for judge, note in notes.items() if note]


def _cell(score: Score | None) -> str:
    return "-" if score is None else f"{score.value:.1f} ({score.low:.1f}-{score.high:.1f})"


def _counted(score: Score) -> str:
    return f"{round(score.value * score.n / 100)} ({score.value:.2f} %, {score.low:.2f}-{score.high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
