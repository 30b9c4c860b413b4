"""How a benchmark's command ends: a status, and one sentence where something went wrong. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable

from qrealign.errors import ConfigError, QrealignError

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


def exit_status(run: Callable[[], object], *, interrupted: str) -> int:
    """Run a command that returns whether something failed; return its exit status, errors told on standard error.

    `interrupted` is what an interrupted user is told: how to go on.
    """
    try:
        return EXIT_FAILED if run() else 0
    except QrealignError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
