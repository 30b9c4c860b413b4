"""What calibration may change in a block: classes of parameters, each a small plug-in that attaches itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qrealign.arch import BlockSpec
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.quant.clipping import LearnableWeightClipping
from qrealign.quant.edits import LowRankEdit, project_edits
from qrealign.quant.fake_quant import FakeQuantLinear, fake_quant_linears
from qrealign.quant.transform import EquivalentTransform


@dataclass(kw_only=True)
class BlockContext:
    """A block whose linears have been swapped, and what its parameters are built from.

    `activation_amax` holds the largest magnitude of each input channel per linear, `[K]`; only transforms need it.
    `masks` holds which entries of a linear an edit may change, `[N, K]` bool; all of them where there is none.
    """

    block: nn.Module
    index: int
    spec: BlockSpec
    settings: CalibrationSettings
    activation_amax: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, FakeQuantLinear]:
        return fake_quant_linears(self.block)


@dataclass(kw_only=True)
class Attached:
    """One class of parameters on one block: the tensors to train, what they are derived from and held to.

    `edits` are brought back inside their budgets after every step.
    """

    parameters: dict[str, nn.Parameter]
    learning_rate: float
    before_forward: Callable[[], None] | None = None
    edits: tuple[LowRankEdit, ...] = ()
    transform: EquivalentTransform | None = None


def attach_clipping(context: BlockContext) -> Attached:
    """Give every linear its two clipping logits per group."""
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in context.layers.items():
        layer.clipping = LearnableWeightClipping(
            (layer.out_features, layer.in_features),
            layer.scheme.weights,
            start=context.settings.clip_start,
            device=layer.weight.device,
        )
        parameters |= {f"{name}.clipping.{key}": value for key, value in layer.clipping.named_parameters()}
    return Attached(parameters=parameters, learning_rate=context.settings.clip_learning_rate)


def attach_edit(context: BlockContext) -> Attached:
    """Give every linear a low-rank edit, and keep each inside its budget after every step."""
    generator = torch.Generator().manual_seed((context.settings.seed << 16) + context.index)
    for name, layer in context.layers.items():
        layer.edit = LowRankEdit(
            layer.weight,
            rank=context.settings.edit_rank,
            budget=context.settings.edit_budget,
            generator=generator,
            mask=context.masks.get(name),
        )
    edits = {name: layer.edit for name, layer in context.layers.items() if layer.edit is not None}
    parameters = {f"{name}.edit.{key}": value for name, edit in edits.items() for key, value in edit.named_parameters()}
    return Attached(
        parameters=parameters, learning_rate=context.settings.edit_learning_rate, edits=tuple(edits.values())
    )


def attach_bias(context: BlockContext) -> Attached:
    """Train the biases of the linears that have one; a linear without has no place in the checkpoint for it."""
    parameters = {}
    for name, layer in context.layers.items():
        if layer.bias is not None:
            layer.bias_edit = nn.Parameter(torch.zeros(layer.out_features, device=layer.weight.device))
            parameters[f"{name}.bias_edit"] = layer.bias_edit
    return Attached(parameters=parameters, learning_rate=context.settings.bias_learning_rate)


def attach_transform(context: BlockContext) -> Attached:
    """Give the block's fold sites their scales, started from activation and weight magnitudes."""
    transform = EquivalentTransform(context.block, context.spec)
    transform.init_from(context.activation_amax)
    transform.attach()
    parameters = {f"transform.{name}": value for name, value in transform.named_parameters()}
    return Attached(
        parameters=parameters,
        learning_rate=context.settings.transform_learning_rate,
        before_forward=transform.refresh,
        transform=transform,
    )


# (setting that switches the class on, how it attaches), in the order in which they are attached
PARAMETER_CLASSES: tuple[tuple[str, Callable[[BlockContext], Attached]], ...] = (
    ("transform_learning_rate", attach_transform),
    ("clip_learning_rate", attach_clipping),
    ("edit_learning_rate", attach_edit),
    ("bias_learning_rate", attach_bias),
)


class Trainable:
    """All trainable tensors of one or many blocks, their optimizer, and the last state known to be good."""

    def __init__(self, contexts: Iterable[BlockContext]) -> None:
        self.attached: list[Attached] = []
        self.named: dict[str, nn.Parameter] = {}
        groups: dict[str, dict[str, Any]] = {}  # one a class: the optimizer steps a group at once
        for context in contexts:
            for setting, attach in PARAMETER_CLASSES:
                if not getattr(context.settings, setting):
                    continue
                part = attach(context)
                if part.parameters:
                    self.attached.append(part)
                    self.named.update({f"{context.index}.{name}": value for name, value in part.parameters.items()})
                    rates = {"lr": part.learning_rate, "base_lr": part.learning_rate}
                    groups.setdefault(setting, {"params": [], **rates})["params"] += part.parameters.values()
        self.optimizer = _optimizer(list(groups.values())) if groups else None
        self.rate_factor = 1.0

    def set_rate(self, factor: float) -> None:
        """Scale every class's learning rate by `factor`, and by what divergences have cost so far."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                rate = group["base_lr"] * factor * self.rate_factor
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def before_forward(self) -> None:
        """Recompute what the forward pass derives from the parameters."""
        for part in self.attached:
            if part.before_forward is not None:
                part.before_forward()

    def zero_grad(self) -> None:
        """Forget the gradients gathered so far."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update the parameters and bring them back inside their bounds."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.zero_grad()
        project_edits(edit for part in self.attached for edit in part.edits)

    def fold(self, storage_dtype: torch.dtype) -> None:
        """Fold the transforms into the blocks' weights and norms."""
        self.before_forward()
        for part in self.attached:
            if part.transform is not None:
                part.transform.fold(storage_dtype)

    def state(self) -> dict[str, Tensor]:
        """Return parameters and optimizer moments as flat tensors, copied."""
        tensors = {f"value.{name}": value.detach() for name, value in self.named.items()}
        for name, value in self.named.items():
            for key, moment in (self.optimizer.state[value] if self.optimizer else {}).items():
                tensors[f"{key}.{name}"] = moment.detach()
        copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        if copies:  # a few kernels for thousands of tensors
            torch._foreach_copy_(list(copies.values()), list(tensors.values()))
        return copies

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, bit for bit; every tensor keeps its address, which a recorded step needs."""
        for name, value in self.named.items():
            value.copy_(tensors[f"value.{name}"])
            for key, moment in (self.optimizer.state[value] if self.optimizer else {}).items():
                moment.copy_(tensors[f"{key}.{name}"])


def _optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return AdamW over the groups, its moments made; on a GPU one kernel steps a group, rate and count live there."""
    device = groups[0]["params"][0].device
    on_gpu = device.type == "cuda"
    for group in groups if on_gpu else ():
        group["lr"] = torch.tensor(group["lr"], device=device)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=on_gpu or None, capturable=on_gpu)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=device if on_gpu else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
