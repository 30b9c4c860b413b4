"""Whole calibration runs of a named geometry, measured stage by stage.

python -m benchmarks.calibration --geometry llama-2-7b
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from qrealign.status import exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or another exit status after one sentence on standard error."""
    from benchmarks.calibration.command import run_command

    return exit_status(
        lambda: run_command(arguments), interrupted="what was measured is kept; --only names what is missing"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run under way ends with it
    sys.exit(main())
