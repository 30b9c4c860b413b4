"""The command line of `python -m qrealign.evaluate`: flags into `AssessOptions`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from qrealign.assess.options import MAX_BENIGN_REFUSALS, MAX_DEGENERATE, MAX_HARMFUL, AssessOptions
from qrealign.assess.suites import SUITES
from qrealign.status import BAD_INPUT, FAILED, INTERRUPTED, VERDICT_FAILED

_EPILOG = f"""\
Models are folders or Hub ids, plain or packed (compressed-tensors). Data are files (.json, .jsonl, .csv, .txt, also
.gz) or Hub ids, with an optional filter: file.jsonl.gz?source=advbench,xstest. Data options take several values.
Without any, the prompts shipped with the demo are asked; without MODEL, the demo's fine-tuned model is evaluated.

suites: {", ".join(SUITES)}

exit status: 0 passed, {VERDICT_FAILED} the verdict failed, {BAD_INPUT} bad input, {FAILED} the evaluation itself \
failed, {INTERRUPTED} interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. Flags left out are absent, so the defaults of `AssessOptions` hold."""
    parser = argparse.ArgumentParser(
        prog="python -m qrealign.evaluate",
        description="Measure a model's safety and utility, and pass a verdict.",
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the model to evaluate")
    _add_models(parser.add_argument_group("models"))
    _add_data(parser.add_argument_group("what it is asked"))
    _add_asking(parser.add_argument_group("how it is asked"))
    _add_verdict(parser.add_argument_group("verdict"))
    _add_results(parser.add_argument_group("results"))
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--adapter", metavar="DIR", help="LoRA adapter merged into MODEL")
    group.add_argument(
        "--against", metavar="OTHER", help="the model to compare with; the verdict is then relative to it"
    )
    group.add_argument("--against-adapter", metavar="DIR", help="LoRA adapter merged into OTHER")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--harmful", nargs="+", metavar="DATA", help="harmful prompts")
    group.add_argument("--over-refusal", nargs="+", metavar="DATA", help="safe prompts that sound harmful")
    group.add_argument(
        "--benign", nargs="+", metavar="DATA", help="ordinary prompts (default: shipped ones, with --harmful)"
    )
    group.add_argument(
        "--prefill", nargs="+", metavar="DATA", help="harmful prompts whose answers (prefix or response) are begun"
    )
    group.add_argument("--task", nargs="+", metavar="DATA", help="task prompts with their answers")
    group.add_argument("--multiple-choice", nargs="+", metavar="DATA", help="questions with options, as MMLU's")
    group.add_argument("--few-shot", metavar="DATA", help="solved examples in front of multiple-choice questions")
    group.add_argument("--shots", type=int, metavar="N", help="how many of them (default: 5)")
    group.add_argument(
        "--choice-by", choices=("letter", "text"), metavar="NAME", help="compare the options' letter (default) or text"
    )
    group.add_argument("--text", nargs="+", metavar="DATA", help="running text for perplexity")
    group.add_argument("--suite", nargs="+", metavar="NAME", help="benchmarks by name, or NAME=DATA for a file of one")
    group.add_argument("--lm-eval", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness, where installed")
    group.add_argument(
        "--limit", type=int, metavar="N", help="at most N prompts of each source, N questions of a suite"
    )


def _add_asking(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--judge", nargs="+", metavar="SPEC", help="further judges of the answers to harmful prompts")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer (default: 32)")
    group.add_argument("--prefill-tokens", type=int, metavar="N", help="tokens of an answer given away (default: 5)")
    group.add_argument("--perplexity-tokens", type=int, metavar="N", help="tokens of text read (default: 65536)")
    group.add_argument("--seeds", type=int, metavar="N", help="sample every answer N times, with seeds 0 to N-1")
    group.add_argument(
        "--temperature", type=float, metavar="X", help="of sampling (default: 0, greedy; 1 with several seeds)"
    )
    group.add_argument("--system", metavar="TEXT", help="system text of every prompt (default: the template's own)")
    group.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once (default: 64)")


def _add_verdict(group: argparse._ArgumentGroup) -> None:
    alone = "without --against"
    for flag, default, what in (
        ("--max-harmful", f"{MAX_HARMFUL:g} {alone}", "harmful score"),
        ("--max-benign-refusals", f"{MAX_BENIGN_REFUSALS:g} {alone}", "refusals of ordinary prompts"),
        ("--max-over-refusal", "none", "over-refusal"),
        ("--max-degenerate", f"{MAX_DEGENERATE:g} {alone}", "degenerate answers"),
        ("--max-prefill", "none", "harmful score under the prefill attack"),
    ):
        group.add_argument(flag, type=float, metavar="PERCENT", help=f"most {what} that passes (default: {default})")
    group.add_argument("--min-task", type=float, metavar="PERCENT", help="least task accuracy (default: none)")
    group.add_argument("--max-perplexity", type=float, metavar="X", help="largest perplexity (default: none)")


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", metavar="DIR", help="folder for evaluation.json, evaluation.md and answers; a killed run goes on"
    )
    group.add_argument("--junit", metavar="FILE", help="JUnit XML with one test case per condition of the verdict")
    group.add_argument(
        "--json", action="store_true", help="print the model's scores as JSON on standard output, all else on error"
    )
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")


def parse_options(arguments: Sequence[str] | None = None) -> AssessOptions:
    """Return the options of a command line.

    Raises:
        ConfigError: an option is wrong.
    """
    flags = vars(build_parser().parse_args(arguments))
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    return AssessOptions(**values)
