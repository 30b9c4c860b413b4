"""How a command ends: an exit status, and one sentence where something went wrong. Imports no torch."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

from qrealign.errors import AbsentDeviceError, ConfigError, DataError, ModelError, QrealignError, ResumeError

FAILED, BAD_INPUT, VERDICT_FAILED, INTERRUPTED = 1, 2, 3, 130
_GIVEN = (AbsentDeviceError, ConfigError, DataError, ModelError, ResumeError)  # what the user can give otherwise


def exit_status(run: Callable[[], int], *, interrupted: str) -> int:
    """Run a command that returns its exit status, or whether something failed; return that, or say why it ended.

    What it raises becomes a sentence on standard error and another exit status.

    Args:
        run: the command.
        interrupted: what an interrupted user is told: how to go on.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error does: a name that the terminal cannot show must not cost the results.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        return int(run())
    except QrealignError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, _GIVEN) else FAILED
    except OSError as error:  # a file without permission, a folder where a file should be, a dead disk
        told = f"{error.filename} cannot be used: {error.strerror}" if error.filename else str(error)
        print(f"error: {told}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        from qrealign_kernels import BackendUnavailableError  # not above: it imports torch

        if not isinstance(error, BackendUnavailableError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
