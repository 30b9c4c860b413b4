"""`python -m qrealign.run`: the main job in one command; `python -m qrealign.run doctor`: what this machine can use."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from qrealign.status import exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the main job; return 0, or another exit status after one sentence on standard error."""
    if list(sys.argv[1:] if arguments is None else arguments) == ["doctor"]:
        return exit_status(_print_doctor, interrupted="nothing was changed")
    return exit_status(lambda: _run(arguments), interrupted="the same command continues where it stopped")


def _print_doctor() -> int:
    from qrealign.doctor import report

    print(report())
    return 0


def _run(arguments: Sequence[str] | None) -> int:
    from qrealign.cli import parse_options

    options = parse_options(arguments)
    from qrealign.pipeline.main import run
    from qrealign.report import build_json, terminal_table

    def say(line: str) -> None:
        if not options.quiet:
            print(line, file=sys.stderr, flush=True)

    report = run(options, say)
    if report is not None:
        print(json.dumps(build_json(report)) if options.json else terminal_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
