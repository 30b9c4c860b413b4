"""Whole calibration runs of a named geometry, measured stage by stage.

python -m benchmarks.calibration --geometry llama-2-7b
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from qrealign.errors import ConfigError, QrealignError

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or another exit status after one sentence on standard error."""
    from benchmarks.calibration.command import run_command

    try:
        return EXIT_FAILED if run_command(arguments) else 0
    except QrealignError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept; --only names what is missing", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run under way ends with it
    sys.exit(main())
