"""Every command ends in an exit status and, where something went wrong, one sentence."""

from __future__ import annotations

import io
import sys

import pytest

from qrealign.errors import (
    AbsentDeviceError,
    CalibrationDivergedError,
    CheckpointFormatError,
    DataError,
    DeviceError,
    ResumeError,
    SchemeError,
)
from qrealign.status import BAD_INPUT, FAILED, INTERRUPTED, exit_status
from qrealign_kernels import BackendUnavailableError


def ending(error: BaseException) -> int:
    def run() -> int:
        raise error

    return exit_status(run, interrupted="go on")


@pytest.mark.parametrize("result", [0, 3, True])
def test_a_command_that_ends_by_itself_says_how(result: int) -> None:
    status = exit_status(lambda: result, interrupted="")
    assert status == result and type(status) is int


def test_what_standard_output_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    assert exit_status(lambda: print("caf\u00e9") or 0, interrupted="") == 0
    assert raw.getvalue() == b"caf\\xe9\n"


@pytest.mark.parametrize("kind", [SchemeError, DataError, CheckpointFormatError, AbsentDeviceError, ResumeError])
def test_what_the_user_gave_is_told_apart(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(kind("wrong: give another")) == BAD_INPUT
    assert capsys.readouterr().err == "error: wrong: give another\n"


@pytest.mark.parametrize("kind", [DeviceError, CalibrationDivergedError])
def test_from_what_failed_on_the_way(kind: type[Exception]) -> None:
    assert ending(kind("lost")) == FAILED


def test_a_file_that_cannot_be_used_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(PermissionError(13, "Permission denied", "a/config.json")) == FAILED
    assert capsys.readouterr().err == "error: a/config.json cannot be used: Permission denied\n"
    assert ending(OSError("no connection")) == FAILED
    assert capsys.readouterr().err == "error: no connection\n"


def test_interrupts_say_how_to_go_on_and_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(KeyboardInterrupt()) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted: go on\n"
    for bug in (ZeroDivisionError, RuntimeError):
        with pytest.raises(bug):
            ending(bug())


def test_a_backend_that_cannot_be_used_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(BackendUnavailableError("backend 'triton' is not usable")) == BAD_INPUT
    assert capsys.readouterr().err == "error: backend 'triton' is not usable\n"
