"""The methods by name, as stages: repair the weights, quantize them under an objective, polish what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from qrealign.calibrate.methods import METHODS as QUANTIZERS
from qrealign.calibrate.methods import CalibrationSettings, method_settings
from qrealign.errors import ConfigError
from qrealign.repair.settings import REPAIRS, Interpolation, RepairSettings

METHODS = (*QUANTIZERS, *REPAIRS)
NAMES = ("method", "engine", "malicious_target", "objective")  # they choose a row of a table and are no numbers
SettingsT = TypeVar("SettingsT", CalibrationSettings, RepairSettings)


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method: an optional repair, the quantization that follows, and an optional end-to-end polish behind it.

    `repair` changes the fine-tuned weights before anything is rounded. `settings` quantize. `polish`, where given,
    starts from the weights that `settings` has learned, before their rounding, and rounds last.
    """

    name: str
    repair: RepairSettings | None
    settings: CalibrationSettings
    polish: CalibrationSettings | None

    @property
    def data_settings(self) -> CalibrationSettings:
        """The settings that decide how many prompts of each kind are drawn: those of the last learning stage."""
        return self.polish or self.settings

    @property
    def endtoend(self) -> CalibrationSettings | None:
        """The settings of the stage that learns through the whole model, of which there is one at most."""
        if self.polish is not None:
            return self.polish
        return self.settings if self.settings.engine == "endtoend" else None

    @property
    def learns_whole(self) -> bool:
        """Whether the fine-tuned model as it is goes into the end-to-end engine."""
        return self.repair is None and self.polish is None and self.settings.engine == "endtoend"

    @property
    def rounds_only(self) -> bool:
        """Whether the result is the fine-tuned model rounded to nearest, and nothing else."""
        return self.repair is None and self.polish is None and self.settings.engine == "none"

    @property
    def learns_behind_blocks(self) -> bool:
        """Whether the block-wise engine's result is polished, so that its own rounding is not the last one."""
        return self.polish is not None and self.settings.engine == "blockwise"

    def with_samples(self, samples: int) -> MethodSpec:
        """Return the method with the number of prompts that the data has."""
        polish = None if self.polish is None else self.polish.fitted(samples)
        return replace(self, settings=self.settings.fitted(samples), polish=polish)

    def identity(self) -> dict[str, Any]:
        """Return everything that decides what the method computes."""
        repair = None if self.repair is None else {"name": self.repair.name, **asdict(self.repair)}
        polish = None if self.polish is None else asdict(self.polish)
        return {"repair": repair, "settings": asdict(self.settings), "polish": polish}

    def describe(self) -> str:
        """Return the stages in one line."""
        settings = self.settings
        stages = [] if self.repair is None else [f"repair {self.repair.name}"]
        stages.append(
            "round to nearest" if settings.engine == "none" else f"{settings.method}, engine {settings.engine}"
        )
        if self.polish is not None:
            stages.append(f"polish of {self.polish.steps} steps")
        return " -> ".join(stages)

    def missing(self, *, aligned: bool, base: bool, probe: bool) -> str | None:
        """Return one sentence on the first model that the method needs and does not have, or None."""
        wants_aligned = "name it with --aligned (the chat model before fine-tuning)"
        if self.repair is not None:
            if self.repair.uses_aligned and not aligned:
                return f"repair {self.repair.name!r} starts from the aligned model: {wants_aligned}"
            if self.repair.needs_base and not base:
                return (
                    f"repair {self.repair.name!r} compares the aligned model with the base model: name it with --base "
                    "(the pre-trained model that the aligned one was made from)"
                )
        for settings in filter(None, (self.settings, self.polish)):
            if settings.uses_base and not base:
                return (
                    f"method {self.name!r} is pushed away from the base model: name it with --base (the pre-trained "
                    "model that the aligned one was made from)"
                )
            if not aligned and (settings.uses_aligned or (settings.uses_probe and not probe)):
                return f"method {self.name!r} learns from the aligned model: {wants_aligned}"
        return None


def method_spec(
    method: str,
    *,
    repair: str | None = None,
    polish: int | None = None,
    engine: str | None = None,
    edit: str | None = None,
    interpolation: float | None = None,
    setting: Sequence[str] = (),
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    schedule: str | None = None,
    **overrides: Any,
) -> MethodSpec:
    """Return the stages of `method`.

    Args:
        method: a quantizing method, or a repair, which is then rounded to nearest.
        repair: repair in front of a quantizing method.
        polish: steps of an end-to-end polish at the end.
        engine, edit: variant of the quantizing method.
        interpolation: coefficient of the repair `interpolate`.
        weight_bits, activation_bits: bits that they are rounded to, None where they are not; some methods have settings
            of their own for four.
        schedule: how many steps calibration makes, of what size.
        setting: `field=value`, `repair.field=value` or `polish.field=value`, applied last.
        overrides: fields of the calibration settings; None leaves the method's own value.

    Raises:
        ConfigError: a name is unknown, or the stages do not fit together.
    """
    repair, quantizer = _stage_names(method, repair)
    if interpolation is not None and repair != Interpolation.name:
        raise ConfigError(
            f"--interpolation belongs to the repair {Interpolation.name!r}: add --repair {Interpolation.name}"
        )
    parts: dict[str, dict[str, str]] = {"": {}, "repair": {}, "polish": {}}
    for item in setting:
        part, name, value = _split_setting(item)
        parts[part][name] = value
    settings = method_settings(
        quantizer,
        engine=engine,
        edit=edit,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        schedule=schedule,
        **overrides,
    )
    settings = _with_text(settings, parts[""], "")
    repair_settings = None if repair is None else REPAIRS[repair]()
    if isinstance(repair_settings, Interpolation) and interpolation is not None:
        repair_settings = replace(repair_settings, coefficient=interpolation)
    for part, chosen in (("repair", repair_settings), ("polish", polish)):
        if parts[part] and chosen is None:
            raise ConfigError(
                f"--setting {part}.{next(iter(parts[part]))} needs --{part}: this method has no such stage"
            )
    if repair_settings is not None:
        repair_settings = _with_text(repair_settings, parts["repair"], "repair.")
    return MethodSpec(
        name=method,
        repair=repair_settings,
        settings=settings,
        polish=None if polish is None else _polish(settings, polish, parts["polish"], overrides),
    )


def _stage_names(method: str, repair: str | None) -> tuple[str | None, str]:
    """Return the repair, if there is one, and the quantizing method that a method's name stands for."""
    if method in REPAIRS:
        if repair not in (None, method):
            raise ConfigError(
                f"--method {method} is a repair followed by plain rounding, so --repair {repair} is one too many: name "
                "the quantizing method with --method"
            )
        repair, quantizer = method, "rtn"
    elif method in QUANTIZERS:
        quantizer = method
    else:
        raise ConfigError(f"unknown method {method!r}: use {', '.join(METHODS)}")
    if repair is not None and repair not in REPAIRS:
        raise ConfigError(f"unknown repair {repair!r}: use {', '.join(REPAIRS)}")
    return repair, quantizer


def _polish(
    settings: CalibrationSettings, steps: int, given: Mapping[str, str], overrides: Mapping[str, Any]
) -> CalibrationSettings:
    """Return the settings of the polish: `realign` end-to-end, for some steps, behind weights that are not yet rounded.

    Clipping and channel scales live in the grid, which the polish makes anew, so it follows edits and repairs only.
    """
    if settings.engine == "endtoend":
        raise ConfigError("--polish follows plain rounding or the block-wise engine: this method is end-to-end already")
    if settings.clip_learning_rate or settings.transform_learning_rate:
        raise ConfigError(
            f"--polish starts from weights before rounding, and method {settings.method!r} learns its grid instead: "
            "use --method realign --engine blockwise, or a repair"
        )
    common = {name: value for name, value in overrides.items() if name not in ("steps", "epochs")}
    return _with_text(method_settings("realign", engine="endtoend", steps=steps, **common), given, "polish.")


def _split_setting(item: str) -> tuple[str, str, str]:
    """Return stage, field and value of `stage.field=value`; the stage is "" for the quantization."""
    key, equals, value = item.partition("=")
    part, _, name = key.strip().rpartition(".")
    if not equals or part not in ("", "repair", "polish"):
        raise ConfigError(
            f"--setting {item!r} is not of the form field=value, repair.field=value or polish.field=value"
        )
    return part, name, value.strip()


def _with_text(settings: SettingsT, given: Mapping[str, str], prefix: str) -> SettingsT:
    """Return settings with fields read from text, each as the type that it has."""
    known = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in NAMES}
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in known:
            raise ConfigError(f"--setting {prefix}{name} is unknown: use one of {', '.join(known)}")
        try:
            values[name] = type(known[name])(text)
        except ValueError:
            raise ConfigError(
                f"--setting {prefix}{name} cannot be {text!r}: give a value like {known[name]!r}"
            ) from None
    try:
        return replace(settings, **values)
    except ConfigError as error:  # it begins with the field's name
        raise ConfigError(f"--setting {prefix}{error}") from None
