"""The options of a run: one frozen record, filled from defaults, then a configuration file, then flags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from qrealign.calibrate.methods import RANGES, CalibrationSettings
from qrealign.config import parse_scheme
from qrealign.demo import DEMO_SETTINGS
from qrealign.errors import ConfigError
from qrealign.models.device import MEMORY_MODES, MemoryMode
from qrealign.pipeline.methods import MethodSpec, method_spec
from qrealign.ranges import COUNT, SHARE

EvaluationSize = Literal["none", "quick", "full"]
EVALUATION_SIZES = ("none", "quick", "full")
DEMO_OUTPUT = "out/demo"
_PLACES = ("model", "adapter", "aligned", "base", "output", "probe")
# What each of these flags belongs to, and whether a method has it: elsewhere the flag would change nothing.
_BELONGS: dict[str, tuple[str, Callable[[MethodSpec], bool]]] = {
    "steps": ("the end-to-end engine", lambda spec: spec.settings.engine == "endtoend"),
    "epochs": ("a quantization that learns", lambda spec: spec.settings.engine != "none"),
    "batch_size": ("a quantization or a polish that learns", lambda spec: spec.data_settings.engine != "none"),
    "edit_rank": ("the low-rank edit", lambda spec: "lowrank" in (spec.settings.edit, spec.data_settings.edit)),
}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the user asked for. Data options hold file paths or Hub ids, each with an optional `?field=value` filter.

    None means "the method's own value" for the calibration options and "the prompts shipped with the project" for data.
    """

    model: str | None = None
    adapter: str | None = None
    aligned: str | None = None
    base: str | None = None
    scheme: str = "w8a8"
    method: str = "realign"
    engine: str | None = None
    edit: str | None = None
    schedule: str | None = None
    repair: str | None = None
    interpolation: float | None = None
    polish: int | None = None
    setting: tuple[str, ...] = ()
    output: str | None = None
    fresh: bool = False
    resume: bool = False
    device: str = "auto"
    memory: MemoryMode = "auto"
    batch_size: int | None = None
    samples: int | None = None
    sequence_length: int | None = None
    malicious_share: float | None = None
    epochs: float | None = None
    steps: int | None = None
    edit_rank: int | None = None
    seed: int = 0
    system: str | None = None
    probe: str | None = None
    safety_data: tuple[str, ...] = ()
    benign_data: tuple[str, ...] = ()
    borderline_data: tuple[str, ...] = ()
    task_data: tuple[str, ...] = ()
    text_data: tuple[str, ...] = ()
    eval: EvaluationSize = "quick"
    eval_harmful: tuple[str, ...] = ()
    eval_over_refusal: tuple[str, ...] = ()
    eval_benign: tuple[str, ...] = ()
    eval_task: tuple[str, ...] = ()
    eval_text: tuple[str, ...] = ()
    compare_with: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    eval_batch_size: int = 64
    json: bool = False
    quiet: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in _PLACES:
            if getattr(self, name) == "":
                raise ConfigError(f"--{name} is empty: name a place, or leave it out")
        if self.model is None and (self.aligned or self.adapter):
            raise ConfigError(
                "--aligned and --adapter need --model: name the fine-tuned model, "
                "or the model that the adapter belongs to"
            )
        if self.model is not None and self.output is None:
            raise ConfigError("--output is missing: name the folder that will hold the packed model and the report")
        if self.fresh and self.resume:
            raise ConfigError("--fresh and --resume exclude each other: choose one")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("--steps and --epochs both say how long to learn: choose one")
        if self.eval not in EVALUATION_SIZES:
            raise ConfigError(f"--eval must be one of {', '.join(EVALUATION_SIZES)}, not {self.eval!r}")
        if self.memory not in MEMORY_MODES:
            raise ConfigError(f"--memory must be one of {', '.join(MEMORY_MODES)}, not {self.memory!r}")
        if self.compare_with and self.eval == "none":
            raise ConfigError("--compare-with needs scores to compare: leave out --eval none")
        _check_ranges(self)
        parse_scheme(self.scheme)
        spec = self.spec()
        _check_use(self, spec)
        missing = spec.missing(
            aligned=self.is_demo or self.aligned is not None,
            base=self.base is not None,
            probe=self.probe is not None,
        )
        if missing is not None:
            raise ConfigError(missing)

    @property
    def is_demo(self) -> bool:
        """Whether the shipped demo model is used, because no model was named."""
        return self.model is None

    @property
    def directory(self) -> Path:
        """Folder of everything that the run writes."""
        return Path(DEMO_OUTPUT if self.output is None else self.output)

    def spec(self) -> MethodSpec:
        """Return the method's stages with this run's overrides."""
        scheme = parse_scheme(self.scheme)
        spec = method_spec(
            self.method,
            repair=self.repair,
            polish=self.polish,
            engine=self.engine,
            edit=self.edit,
            schedule=self.schedule,
            interpolation=self.interpolation,
            setting=(*DEMO_SETTINGS, *self.setting) if self.is_demo and self.method == "realign" else self.setting,
            weight_bits=scheme.weights.num_bits,
            activation_bits=None if scheme.activations is None else scheme.activations.num_bits,
            samples=self.samples,
            malicious_share=self.malicious_share,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            steps=self.steps,
            edit_rank=self.edit_rank,
            epochs=self.epochs,
            seed=self.seed,
        )
        settings = spec.settings
        if self.epochs is not None and settings.engine == "endtoend":
            steps = max(1, round(self.epochs * settings.samples / settings.batch_size))
            spec = replace(spec, settings=replace(settings, steps=steps, passes=0.0))
        return spec

    def calibration(self) -> CalibrationSettings:
        """Return the settings of the quantizing stage with this run's overrides."""
        return self.spec().settings


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _check_ranges(options: RunOptions) -> None:
    """Refuse numbers that make no sense, naming the flag; a calibration setting's flag has its range."""
    counts = dict.fromkeys(("polish", "max_new_tokens", "eval_batch_size"), COUNT)
    for name, allowed in {**RANGES, **counts, "interpolation": SHARE}.items():
        value = getattr(options, name, None)
        if value is not None and value not in allowed:
            raise ConfigError(f"{_flag(name)} must be {allowed}, not {value}")


def _check_use(options: RunOptions, spec: MethodSpec) -> None:
    """Refuse flags that would change nothing."""
    for name, (owner, has_use) in _BELONGS.items():
        if getattr(options, name) is not None and not has_use(spec):
            raise ConfigError(
                f"{_flag(name)} belongs to {owner}, which {options.method!r} does not use here: leave it out"
            )


def used_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without the flags that their method has no use for: what many methods get alike."""
    spec = merge_options(None, {name: value for name, value in values.items() if name not in _BELONGS}).spec()
    return {name: value for name, value in values.items() if name not in _BELONGS or _BELONGS[name][1](spec)}


def merge_options(config_file: str | None, flags: Mapping[str, Any]) -> RunOptions:
    """Return the options of a JSON file overridden by the flags that were given.

    Raises:
        ConfigError: the file cannot be read, or has a key that is no option, or a value of the wrong type.
    """
    values = {**_read_config(config_file), **flags}
    unknown = sorted(set(values) - {field.name for field in fields(RunOptions)})
    if unknown:
        raise ConfigError(f"{config_file} has no such option: {', '.join(unknown)}; options are the flags with _ for -")
    hints = get_type_hints(RunOptions)
    for name, value in values.items():
        if get_origin(hints[name]) is tuple:
            values[name] = (
                (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else value
            )
        if not _fits(values[name], hints[name]):
            raise ConfigError(
                f"{config_file or 'the command line'} has a value of the wrong type: {name} cannot be {value!r}"
            )
    return RunOptions(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value from JSON or a flag has the type of an option."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    allowed = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, allowed) or (isinstance(value, int) and float in allowed)


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"the configuration file {path} must hold one JSON object")
    return value


def resolved(options: RunOptions) -> dict[str, Any]:
    """Return the options and the calibration settings that they lead to, for the report."""
    spec = options.spec()
    stages = {name: stage for name, stage in spec.identity().items() if name != "settings" and stage is not None}
    return {"options": asdict(options), "calibration": asdict(spec.settings), **stages}
