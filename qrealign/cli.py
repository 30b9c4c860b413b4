"""The command line: flags into `RunOptions`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qrealign.calibrate.methods import EDITS, ENGINES, SCHEDULES
from qrealign.pipeline.methods import METHODS
from qrealign.pipeline.options import EVALUATION_SIZES, RunOptions, merge_options
from qrealign.repair.settings import REPAIRS
from qrealign.status import BAD_INPUT, FAILED, INTERRUPTED

_EPILOG = f"""\
Without --model the shipped demo is realigned into out/demo. Models are folders or Hub ids; data are files (.json,
.jsonl, .csv, .txt, also .gz) or Hub ids, with an optional filter: file.jsonl.gz?source=advbench,xstest. Data options
take several values. What is not given is taken from the prompts shipped with the project.

`python -m qrealign.run doctor` prints versions, devices and kernels: which are usable here, and why others are not.

exit status: 0 done, whatever the verdict, {BAD_INPUT} bad input, {FAILED} the run failed, {INTERRUPTED} interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m qrealign.run`. Flags left out are absent, so a configuration file fills them."""
    parser = argparse.ArgumentParser(
        prog="python -m qrealign.run",
        description="Quantize a fine-tuned model and repair its safety in the same step.",
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_models(parser.add_argument_group("models"))
    _add_method(parser.add_argument_group("method"))
    _add_data(parser.add_argument_group("calibration data"))
    _add_evaluation(parser.add_argument_group("evaluation"))
    _add_running(parser.add_argument_group("running"))
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="MODEL", help="the fine-tuned model, or the model that --adapter belongs to")
    group.add_argument("--adapter", metavar="DIR", help="LoRA adapter merged into --model while it streams")
    group.add_argument(
        "--aligned", metavar="MODEL", help="the aligned model before fine-tuning: the teacher of refusal"
    )
    group.add_argument(
        "--base", metavar="MODEL", help="the pre-trained model: aaq and safelora need it, the report shows it"
    )
    group.add_argument("--output", metavar="DIR", help="folder for model/, report.* and what a resumed run needs")
    group.add_argument(
        "--system", metavar="TEXT", help="system text put into every prompt (default: the template's own)"
    )


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scheme",
        metavar="NAME",
        help="w8a8 (default), w8a16, w4a16, w4a8, w4a4; 4-bit ones take _g32/_g64, _channel, _asym",
    )
    group.add_argument("--method", choices=METHODS, metavar="NAME", help=f"{', '.join(METHODS)} (default: realign)")
    group.add_argument(
        "--engine", choices=ENGINES, metavar="NAME", help="endtoend or blockwise (least memory); default: the method's"
    )
    group.add_argument(
        "--edit",
        choices=EDITS,
        metavar="NAME",
        help="lowrank, bias (where linears have one), or none for clipping only; default: the method's",
    )
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        metavar="NAME",
        help="parity, the method's own steps (default); fast, block-wise: a sixteenth of the paper's steps with larger "
        "batches, and an end where a block no longer improves; long, realign: ten times the prompts, 13 times the work",
    )
    group.add_argument(
        "--repair", choices=list(REPAIRS), metavar="NAME", help="repair before the quantization: " + ", ".join(REPAIRS)
    )
    group.add_argument(
        "--interpolation",
        type=float,
        metavar="C",
        help="share of fine-tuning that interpolate keeps (default: 0.25)",
    )
    group.add_argument(
        "--polish", type=int, metavar="STEPS", help="end-to-end steps behind plain rounding or the block-wise engine"
    )
    group.add_argument(
        "--setting",
        nargs="+",
        metavar="FIELD=VALUE",
        help="any other setting of the method, of repair.FIELD or of polish.FIELD (docs/methods.md)",
    )
    group.add_argument("--edit-rank", type=int, metavar="N", help="rank of the low-rank edit")
    group.add_argument("--samples", type=int, metavar="N", help="calibration prompts, malicious and benign together")
    group.add_argument("--malicious-share", type=float, metavar="X", help="share of malicious prompts among them")
    group.add_argument("--sequence-length", type=int, metavar="N", help="most tokens of a calibration prompt")
    group.add_argument("--batch-size", type=int, metavar="N", help="prompts in an optimizer step")
    group.add_argument(
        "--epochs",
        type=float,
        metavar="X",
        help="passes over the calibration prompts (block-wise: the base of the schedule)",
    )
    group.add_argument("--steps", type=int, metavar="N", help="optimizer steps of the end-to-end engine")
    group.add_argument("--seed", type=int, metavar="N", help="seed of sampling and initial values (default: 0)")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--safety-data", nargs="+", metavar="DATA", help="malicious prompts (rows labelled benign are left out)"
    )
    group.add_argument("--benign-data", nargs="+", metavar="DATA", help="ordinary prompts")
    group.add_argument(
        "--borderline-data",
        nargs="+",
        metavar="DATA",
        help="harmless prompts that sound harmful: they keep over-refusal down",
    )
    group.add_argument(
        "--task-data",
        nargs="+",
        metavar="DATA",
        help="prompts of the fine-tuning task; their labels serve the evaluation; where task_labels says so, training",
    )
    group.add_argument(
        "--text-data", nargs="+", metavar="DATA", help="running text on which the model shall stay as it is"
    )
    group.add_argument("--probe", metavar="FILE", help="reuse fitted probes instead of fitting new ones")


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--eval", choices=EVALUATION_SIZES, metavar="SIZE", help="none, quick (default) or full")
    group.add_argument(
        "--eval-harmful", nargs="+", metavar="DATA", help="harmful prompts, disjoint from the calibration data"
    )
    group.add_argument("--eval-over-refusal", nargs="+", metavar="DATA", help="harmless prompts that sound harmful")
    group.add_argument("--eval-benign", nargs="+", metavar="DATA", help="ordinary prompts")
    group.add_argument(
        "--eval-task",
        nargs="+",
        metavar="DATA",
        help="task prompts with answers (default: the test rows of --task-data)",
    )
    group.add_argument("--eval-text", nargs="+", metavar="DATA", help="running text for perplexity")
    group.add_argument(
        "--compare-with",
        nargs="+",
        metavar="DIR",
        help="other runs' --output folders, same model and evaluation prompts: the report compares the methods",
    )
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="tokens of an answer (default: 32 quick, 256 full)"
    )
    group.add_argument("--eval-batch-size", type=int, metavar="N", help="prompts answered at once (default: 64)")


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument(
        "--memory",
        choices=("auto", "resident", "low", "streamed"),
        metavar="NAME",
        help="where weights are: resident on the device, low (up to 8 GiB of their blocks there, the others come from "
        "the host), streamed (all of them come); auto (default) keeps what fits. The block-wise engine holds one "
        "block, and with low or streamed its activations on the host",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue a run; without it one is continued where found, and started otherwise",
    )
    group.add_argument("--fresh", action="store_true", help="discard what an earlier run left in --output")
    group.add_argument(
        "--dry-run", action="store_true", help="preflight only: checks and estimates, no weights are loaded"
    )
    group.add_argument(
        "--config", metavar="FILE", help="JSON file of options (flag names with _ for -); flags win over it"
    )
    group.add_argument("--json", action="store_true", help="print report.json on standard output instead of the table")
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")


def parse_options(arguments: Sequence[str] | None = None) -> RunOptions:
    """Return the options of a command line.

    Raises:
        ConfigError: an option or the configuration file is wrong.
    """
    flags = vars(build_parser().parse_args(arguments))
    return merge_options(flags.pop("config", None), flags)
