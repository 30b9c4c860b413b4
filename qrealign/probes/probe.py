"""The frozen linear probes of the aligned model, one per block, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrealign.errors import CheckpointFormatError, ModelError
from qrealign.files import read_json, write_json, write_tensors

PROBE_FILE = "probes.safetensors"
_FORMAT = "qrealign-probe-1"
_TENSORS = ("weight", "bias", "temperature")


@dataclass(frozen=True, kw_only=True)
class BlockFit:
    """How one block's probe was fitted and how well it holds on prompts it has not seen.

    `accuracy` is held out, in [0, 1]; `inverse_penalty` is the C chosen by validation; `margins` maps a class name to
    the 5, 25, 50, 75 and 95 % quantiles of the held-out logits.
    """

    accuracy: float
    fisher_ratio: float
    inverse_penalty: float
    nonzero: int
    margins: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SafetyProbe:
    """Linear probes on block outputs: logit > 0 says malicious.

    Attributes:
        weight: `[L, H]` float32, one direction per block, on the raw (unstandardised) block output.
        bias: `[L]` float32.
        temperature: `[L]` float32 > 0, median |logit| on the aligned model's malicious prompts: the unit of a block's
            logit.
        fits: one `BlockFit` per block, empty where the probe was made by hand.
        hashes: SHA-256 by name of what the probe was fitted on (`model`, `data`).
    """

    weight: Tensor
    bias: Tensor
    temperature: Tensor
    fits: list[BlockFit] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def accuracies(self) -> list[float]:
        """Held-out accuracy per block, in [0, 1]."""
        return [fit.accuracy for fit in self.fits]

    def logit(self, hidden: Tensor, block: int) -> Tensor:
        """Return the logit of block `block` for states `[..., H]` of any dtype and device, as float32 `[...]`."""
        weight, bias = self.weight[block].to(hidden.device), self.bias[block].to(hidden.device)
        return hidden.float() @ weight + bias

    def scaled_logit(self, hidden: Tensor, block: int) -> Tensor:
        """Return the logit in units of the block's temperature, so that one step size fits every block."""
        return self.logit(hidden, block) / self.temperature[block].to(hidden.device)

    def to(self, device: torch.device | str) -> SafetyProbe:
        """Return this probe with its tensors on `device`."""
        return replace(
            self, weight=self.weight.to(device), bias=self.bias.to(device), temperature=self.temperature.to(device)
        )

    def check_model(self, num_blocks: int, hidden_size: int) -> None:
        """Refuse a model of another shape.

        Raises:
            ModelError: the model has another number of blocks or another hidden size.
        """
        if (self.num_blocks, self.hidden_size) != (num_blocks, hidden_size):
            raise ModelError(
                f"the probe was fitted on a model of {self.num_blocks} blocks and hidden size {self.hidden_size}, "
                f"but this model has {num_blocks} blocks and hidden size {hidden_size}: fit a probe on its own "
                "aligned model"
            )

    def save(self, path: Path | str, hashes: Mapping[str, str] | None = None) -> Path:
        """Write `path` (safetensors; a folder gets `probes.safetensors`) and the JSON of the same stem beside it.

        `hashes` are stored with the probe, beside those it already has. Returns the path of the tensor file.
        """
        file = _tensor_file(Path(path))
        write_tensors(file, {name: getattr(self, name) for name in _TENSORS}, {"format": _FORMAT})
        write_json(
            file.with_suffix(".json"),
            {
                "format": _FORMAT,
                "num_blocks": self.num_blocks,
                "hidden_size": self.hidden_size,
                "hashes": {**self.hashes, **(hashes or {})},
                "blocks": [asdict(fit) for fit in self.fits],
            },
        )
        return file

    @classmethod
    def load(cls, path: Path | str) -> SafetyProbe:
        """Read a probe written by `save`; `path` is its tensor file, its JSON or their folder.

        Raises:
            ModelError: a file is missing.
            CheckpointFormatError: a file is not a probe, or the two files do not belong together.
        """
        file = _tensor_file(Path(path))
        tensors, details = _read_tensors(file), _read_details(file.with_suffix(".json"))
        shape = tuple(tensors["weight"].shape)
        if shape != (details.get("num_blocks"), details.get("hidden_size")):
            raise CheckpointFormatError(
                f"{file} holds a probe of shape {list(shape)}, but its JSON describes "
                f"[{details.get('num_blocks')}, {details.get('hidden_size')}]: the two files belong to different probes"
            )
        try:
            fits = [BlockFit(**block) for block in details.get("blocks", [])]
            hashes = dict(details.get("hashes", {}))
        except (TypeError, ValueError) as error:
            raise CheckpointFormatError(
                f"{file.with_suffix('.json')} describes blocks or hashes in an unknown way ({error}): fit the probe "
                "again"
            ) from error
        return cls(**tensors, fits=fits, hashes=hashes)


def _tensor_file(path: Path) -> Path:
    """Return the tensor file meant by `path`."""
    if path.suffix == ".json":
        return path.with_suffix(".safetensors")
    return path if path.suffix == ".safetensors" else path / PROBE_FILE


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Read and check the three tensors of a probe file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ModelError(
            f"there is no probe at {file}: give --probe a file written by an earlier run (probes.safetensors), or "
            f"leave it out"
        )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointFormatError(f"{file} is no readable safetensors file ({error}): fit the probe again") from error
    if set(tensors) != set(_TENSORS):
        raise CheckpointFormatError(
            f"{file} is no probe: it holds {sorted(tensors)[:4]} where {list(_TENSORS)} are expected"
        )
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    blocks = tensors["weight"].shape[:1]
    if tensors["weight"].ndim != 2 or tensors["bias"].shape != blocks or tensors["temperature"].shape != blocks:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise CheckpointFormatError(f"{file} is no probe: its shapes {shapes} are not [L, H], [L] and [L]")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise CheckpointFormatError(f"{file} holds numbers that are not finite: fit the probe again")
    return tensors


def _read_details(file: Path) -> dict[str, Any]:
    """Read the JSON beside the tensors."""
    if not file.is_file():
        raise ModelError(
            f"the probe's description {file} is missing: copy it beside the tensor file, or fit the probe again"
        )
    try:
        details = read_json(file)
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointFormatError(f"{file} is no readable JSON ({error}): fit the probe again") from error
    if not isinstance(details, dict) or details.get("format") != _FORMAT:
        raise CheckpointFormatError(f"{file} does not describe a probe of this project: fit the probe again")
    return details
