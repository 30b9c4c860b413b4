"""LoRA adapters merged into weights one tensor at a time, so a merged model never has to exist as a whole."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrealign.errors import CheckpointFormatError, ModelError
from qrealign.files import sha256_of_text
from qrealign.models.checkpoint import WeightFiles

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>(?:embedding_)?[AB]|magnitude_vector)(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_FIELDS = {"A": "a", "B": "b", "magnitude_vector": "magnitude"}
# Options whose merged weight is not W + scaling * B @ A, or depends on more than the two files.
_REFUSED_OPTIONS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(kw_only=True)
class _Update:
    """What the adapter does to one tensor: stored names of its parts, None where absent."""

    module: str
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    bias: str | None = None
    replacement: str | None = None
    embedding: bool = False


class LoraAdapter:
    """A LoRA or DoRA adapter as saved by peft, to be merged tensor by tensor.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ModelError: the folder is no adapter, or one of a kind that cannot be merged exactly.
        CheckpointFormatError: its weights are damaged or a pickle.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        file = folder / WEIGHTS_NAME
        if not file.is_file():
            if (folder / "adapter_model.bin").is_file():
                raise CheckpointFormatError(
                    f"{folder} holds pickle weights only (adapter_model.bin), which can run code when read and are "
                    "refused: load the adapter where you trust it and save it again with save_pretrained(folder)"
                )
            raise ModelError(
                f"adapter {folder} has no {WEIGHTS_NAME}: give the folder that peft's save_pretrained wrote"
            )
        self.files = WeightFiles([file])
        self._updates = self._parse()
        if not self._updates:
            raise ModelError(f"adapter {folder} holds no tensors, so it changes nothing: give a trained adapter")

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], renames: Iterable[tuple[str, str]] = (), tied: Iterable[str] = ()
    ) -> None:
        """Match the adapter to a model's tensors; afterwards `merge` takes those names.

        Args:
            shapes: full tensor name -> shape of the model.
            renames: pairs (text in the model's names, text in the checkpoint's) to undo in the adapter's names.
            tied: names of tied tensors, which cannot be changed one without the other.

        Raises:
            ModelError: a module is missing in the model, a shape differs, or a tied tensor would be changed.
        """
        bound = {}
        tied = set(tied)
        for name, update in self._updates.items():
            found = _find_name(name, shapes, renames)
            if found is None:
                raise self._foreign(f"it changes {name}, which the model does not have")
            if found in tied:
                raise ModelError(
                    f"adapter {self.folder} changes {found}, which this model shares between embedding and "
                    "head: merge it with "
                    "peft's merge_and_unload, save the result with untied embeddings and give that folder as the model"
                )
            expected = self._target_shape(update)
            if expected is not None and expected != shapes[found]:
                raise self._foreign(f"{found} has shape {shapes[found]} in the model and {expected} in the adapter")
            bound[found] = update
        self._updates = bound

    def touches(self, name: str) -> bool:
        """Tell whether the adapter changes the tensor called `name`."""
        return name in self._updates

    @torch.no_grad()
    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor` (which the model calls `name`) with the adapter merged.

        Computed in float32 on the device of `tensor`, returned in its dtype.
        """
        update = self._updates.get(name)
        if update is None:
            return tensor
        names = [part for part in (update.a, update.b, update.magnitude, update.bias, update.replacement) if part]
        parts = {name: part.to(tensor.device) for name, part in self.files.read(names).items()}
        merged = parts[update.replacement].float() if update.replacement else tensor.float()
        if update.bias:
            merged = merged + self._scaling(update) * parts[update.bias].float()
        if update.a and update.b:
            delta = self._scaling(update) * (parts[update.b].float() @ parts[update.a].float())
            merged = merged + (delta.T if self._is_transposed(update) else delta)
        if update.magnitude:
            axis = 0 if self._is_transposed(update) else 1
            norm = torch.linalg.vector_norm(merged, dim=axis, keepdim=True)
            merged = merged * (parts[update.magnitude].float().reshape(norm.shape) / norm)
        return merged.to(tensor.dtype)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the adapter's configuration and a sample of every tensor."""
        return sha256_of_text(json.dumps(self.config, sort_keys=True), self.files.fingerprint())

    def _parse(self) -> dict[str, _Update]:
        """Sort the stored tensors into updates by the name of the tensor they change."""
        updates: dict[str, _Update] = {}
        for stored in self.files.tensors:
            match = _LORA_KEY.fullmatch(stored)
            if match is None:
                name = re.sub(r"\.modules_to_save(\.default)?|\.base_layer", "", stored.removeprefix(_PREFIX))
                updates.setdefault(name, _Update(module=name.rpartition(".")[0])).replacement = stored
                continue
            module = match["module"].removeprefix(_PREFIX)
            is_bias = match["leaf"] == ".bias"
            update = updates.setdefault(f"{module}.bias" if is_bias else f"{module}.weight", _Update(module=module))
            update.embedding = update.embedding or match["part"].startswith("embedding")
            setattr(update, "bias" if is_bias else _FIELDS[match["part"].removeprefix("embedding_")], stored)
        for name, update in updates.items():
            halved = (update.a is None) != (update.b is None)
            if halved or (update.magnitude and (update.a is None or update.embedding)):
                raise ModelError(
                    f"adapter {self.folder} has only half of the factors for {name}: save it again with "
                    "save_pretrained(folder)"
                )
        return updates

    def _scaling(self, update: _Update) -> float:
        """Return the factor in front of B @ A, as peft computes it."""
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", update.module):
                alpha = value
                break
        factor = update.a or self._updates_of_module(update.module).a
        assert factor is not None
        rank = self.files.tensors[factor].shape[0]
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _updates_of_module(self, module: str) -> _Update:
        """Return the weight update of a module (a bias update takes its rank from there)."""
        return next(update for update in self._updates.values() if update.module == module and update.a)

    def _is_transposed(self, update: _Update) -> bool:
        """Tell whether the changed tensor is stored `[in, out]` (embeddings, and Conv1D layers)."""
        return update.embedding or bool(self.config.get("fan_in_fan_out"))

    def _target_shape(self, update: _Update) -> tuple[int, ...] | None:
        """Return the shape that the changed tensor must have."""
        stored = self.files.tensors
        if update.replacement:
            return stored[update.replacement].shape
        if update.a and update.b:
            shape = (stored[update.b].shape[0], stored[update.a].shape[1])
            return shape[::-1] if self._is_transposed(update) else shape
        return stored[update.bias].shape if update.bias else None

    def _foreign(self, detail: str) -> ModelError:
        """Return the error for an adapter of another model."""
        base = self.config.get("base_model_name_or_path")
        made_for = f" (it was made for {base})" if base else ""
        return ModelError(
            f"adapter {self.folder} belongs to another model{made_for}: {detail}; give the model it was trained "
            "on with --model"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """Read and check adapter_config.json."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise ModelError(
            f"{folder} is no adapter: it has no {CONFIG_NAME}; give the folder that peft's save_pretrained wrote"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = str(config.get("peft_type")).upper()
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        raise ModelError(f"{file} is no valid JSON object: copy the adapter again") from None
    if kind != "LORA":
        raise ModelError(
            f"adapter {folder} is of type {kind}, and only LORA (with DoRA and rsLoRA) can be merged: merge it "
            "with peft first"
        )
    refused = [option for option in _REFUSED_OPTIONS if config.get(option)]
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        refused.append(f"init_lora_weights={init}")
    if refused or "lora_alpha" not in config:
        what = f"uses {', '.join(refused)}" if refused else "has no lora_alpha"
        raise ModelError(
            f"adapter {folder} {what}, which cannot be merged tensor by tensor: merge it with peft and give the "
            "merged model"
        )
    _check_alphas(config, file)
    return config


def _check_alphas(config: dict[str, Any], file: Path) -> None:
    """Refuse factors that are no numbers, of all modules or of some."""
    pattern = config.get("alpha_pattern") or {}
    alphas = [config["lora_alpha"], *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    for alpha in alphas:
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ModelError(
                f"{file} has {alpha!r} for a number in lora_alpha or alpha_pattern: copy the adapter again"
            )


def _find_name(name: str, shapes: Mapping[str, Any], renames: Iterable[tuple[str, str]]) -> str | None:
    """Return the model's name of a tensor that the adapter calls `name`, which may be older or lack `model.`."""
    renamed = name
    for ours, theirs in renames:
        renamed = renamed.replace(theirs, ours)
    for candidate in (name, renamed, f"model.{renamed}"):
        if candidate in shapes:
            return candidate
    return None
