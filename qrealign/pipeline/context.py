"""What every stage of a run shares: options, opened models, prompts, folder, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import qrealign
from qrealign.calibrate.distributed import ALONE, Team, local_device
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.config import QuantScheme, parse_scheme
from qrealign.data.encode import ChatEncoder
from qrealign.data.readers import split_spec
from qrealign.demo import demo_paths
from qrealign.errors import ConfigError
from qrealign.files import sha256_of_text
from qrealign.models.source import ModelSource, check_same_shape, open_model
from qrealign.pipeline.methods import MethodSpec
from qrealign.pipeline.models import ModelPool, choose_device
from qrealign.pipeline.options import RunOptions
from qrealign.pipeline.prepare import PreparedData, prepare_data
from qrealign.pipeline.workspace import Workspace
from qrealign.probes.probe import SafetyProbe
from qrealign.resources import ResourceMeter
from qrealign_kernels.backend import backend_for

PROMPT_TOKENS = 1024  # most tokens of a prompt outside calibration


@dataclass(kw_only=True)
class RunContext:
    """A run that has passed its checks. `say` prints a line for the user; `progress` labels a bar, None when quiet.

    `repaired` is what is quantized: the fine-tuned model until the method's repair has run. `team` are the processes
    that share the calibration; those that do not lead it say nothing and write nothing.
    """

    options: RunOptions
    spec: MethodSpec
    scheme: QuantScheme
    finetuned: ModelSource
    repaired: ModelSource
    aligned: ModelSource | None
    base: ModelSource | None
    encoder: ChatEncoder
    calibration_encoder: ChatEncoder
    data: PreparedData
    workspace: Workspace
    device: torch.device
    pool: ModelPool
    meter: ResourceMeter
    say: Callable[[str], None]
    team: Team = ALONE
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> CalibrationSettings:
        """The settings of the quantizing stage."""
        return self.spec.settings

    def progress(self, label: str) -> str | None:
        return None if self.options.quiet else label

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the run's results: what a resumed run must share with the interrupted one."""
        evaluation = {name: getattr(self.options, name) for name in ("eval", "max_new_tokens")}
        return {
            "version": qrealign.__version__,
            "scheme": self.scheme.name,
            "device": self.device.type,
            **self.spec.identity(),
            "evaluation": evaluation,
            "model": self.finetuned.fingerprint(),
            "aligned": self.aligned.fingerprint() if self.aligned else None,
            "base": self.base.fingerprint() if self.base else None,
            "data": self.data.fingerprint(),
            "tokenizer": self.encoder.fingerprint(),
            "probe": probe_fingerprint(self.options.probe) if self.options.probe else None,
        }


def probe_fingerprint(path: str) -> str:
    """Return a SHA-256 over the tensors of a probe file.

    Raises:
        ModelError: there is no such file.
        CheckpointFormatError: it is no probe.
    """
    probe = SafetyProbe.load(path)
    return sha256_of_text(*(str(tensor.tolist()) for tensor in (probe.weight, probe.bias)))


def build_context(options: RunOptions, say: Callable[[str], None], team: Team = ALONE) -> RunContext:
    """Open the models and read the prompts of a run; every check that needs no weights happens here.

    Raises:
        QrealignError: anything the run could not survive.
    """
    device = local_device(choose_device(options.device))
    backend_for(torch.empty(0, device=device))  # one asked for that cannot run is told now, not behind the teachers
    if not team.leads:
        options, say = replace(options, quiet=True), _say_nothing
    spec = options.spec()
    _check_team(spec, team)
    finetuned, aligned, base = _open_models(options)
    _check_biases(spec, finetuned)
    widths = {shape[1] for shape in finetuned.linear_shapes().values()}
    wanted = parse_scheme(options.scheme)
    scheme = wanted.fit_to(widths)
    tokenizer = finetuned.tokenizer()
    data = prepare_data(options, spec.data_settings)
    spec = spec.with_samples(data.samples)
    encoder = ChatEncoder(tokenizer, max_length=PROMPT_TOKENS, system=options.system)
    calibration_tokens = spec.data_settings.sequence_length
    context = RunContext(
        options=options,
        spec=spec,
        scheme=scheme,
        finetuned=finetuned,
        repaired=finetuned,
        aligned=aligned,
        base=base,
        encoder=encoder,
        calibration_encoder=ChatEncoder(tokenizer, max_length=calibration_tokens, system=options.system),
        data=data,
        workspace=Workspace(options.directory, writes=team.leads, inputs=_inputs(options)),
        device=device,
        pool=ModelPool(device, options.memory),
        meter=ResourceMeter(device.type, gpus=team.size),
        say=say,
        team=team,
        notes=list(data.notes),
    )
    if scheme != wanted:
        groups = f"groups of {scheme.weights.group_size}" if scheme.weights.group_size else "whole rows"
        context.notes.append(
            f"{wanted.name}: not every layer's width is a multiple of {wanted.weights.group_size}, "
            f"so weights share scales over {groups}"
        )
    if not finetuned.spec.known:
        context.notes.append(
            f"model type {finetuned.spec.model_type!r} is not in the architecture table: "
            "no channel scales are learned for it"
        )
    return context


def _inputs(options: RunOptions) -> list[Path]:
    """Return where every model, probe and data file is that the user named; a Hub id is a path to nothing."""
    models = (options.model, options.adapter, options.aligned, options.base, options.probe)
    data = (value for name, value in vars(options).items() if name.endswith("_data") or name.startswith("eval_"))
    specs = (spec for value in data if isinstance(value, tuple) for spec in value)
    return [Path(path) for path in (*models, *(split_spec(spec)[0] for spec in specs)) if path is not None]


def _say_nothing(line: str) -> None:
    """Stand in for `say` where another process speaks."""


def _check_team(spec: MethodSpec, team: Team) -> None:
    """Refuse more processes than a batch has samples: some would have nothing to do."""
    for settings in (spec.settings, spec.polish):
        if settings is not None and settings.engine != "none" and settings.batch_size < team.size:
            raise ConfigError(
                f"{team.size} processes cannot share a batch of {settings.batch_size}: use fewer, --batch-size "
                f"{team.size} or more, or --schedule fast where the method is block-wise"
            )


def _check_biases(spec: MethodSpec, model: ModelSource) -> None:
    """Refuse to train biases of a model whose linears have none: its checkpoint has no place for them."""
    wanted = any(settings.bias_learning_rate for settings in (spec.settings, spec.polish) if settings is not None)
    if wanted and not any(f"{linear}.bias" in model.shapes for linear in model.linear_shapes()):
        raise ConfigError(
            f"--edit bias: the linears of model type {model.config.model_type!r} have no biases, so the packed model "
            "has no place for what would be learned: use --edit lowrank"
        )


def _open_models(options: RunOptions) -> tuple[ModelSource, ModelSource | None, ModelSource | None]:
    """Open the fine-tuned, the aligned and the base model; the demo's where none is named."""
    if options.is_demo:
        demo = demo_paths()
        finetuned = open_model(str(demo.aligned), adapter=str(demo.adapter))
        aligned: ModelSource | None = open_model(str(demo.aligned))
    else:
        finetuned = open_model(str(options.model), adapter=options.adapter)
        aligned = open_model(options.aligned) if options.aligned else None
    base = open_model(options.base) if options.base else None
    for other in (aligned, base):
        if other is not None:
            check_same_shape(finetuned, other)
    return finetuned, aligned, base
