"""The whole table from one command: every method, scheme and seed on every fine-tuned variant, then CSV and plots.

python -m benchmarks.safety --aligned DIR --base DIR --data DIR --output OUT --finetuned ADAPTER --variants sst2-p05
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or another exit status after one sentence on standard error."""
    from benchmarks.safety.command import run_command  # imports torch, which a worker's start does not need here
    from qrealign.status import exit_status

    return exit_status(lambda: run_command(arguments), interrupted="the same command goes on with what is missing")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that workers end with it
    sys.exit(main())
