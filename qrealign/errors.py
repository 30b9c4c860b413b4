"""Errors a user can act on: each message is one sentence saying what, where and what to do."""

from __future__ import annotations


class QrealignError(Exception):
    """Base of every error that `run` prints as one sentence before it exits non-zero."""


class ConfigError(QrealignError):
    """A flag, a configuration file or a combination of them is wrong."""


class SchemeError(ConfigError):
    """A quantization scheme is unknown, inconsistent or impossible for this model."""


class DataError(QrealignError):
    """A prompt, label or text file cannot be used."""


class ModelError(QrealignError):
    """A model folder, adapter or tokenizer cannot be used."""


class UnsupportedArchitectureError(ModelError):
    """The model has no discoverable list of decoder blocks."""


class CheckpointFormatError(ModelError):
    """A weight file is missing, truncated, corrupted or in a format that is refused."""


class JudgeError(QrealignError):
    """A judge cannot be opened, cannot be reached or gives no verdict."""


class ResumeError(QrealignError):
    """The output folder holds a run that cannot be continued with this model, data or configuration."""


class DeviceError(QrealignError):
    """The device asked for is absent, or its memory is too small even for the smallest batch."""


class AbsentDeviceError(DeviceError):
    """The device asked for is unknown, unsupported or not in this machine."""


class CalibrationDivergedError(QrealignError):
    """Calibration left the finite numbers twice after restoring the last good state."""
