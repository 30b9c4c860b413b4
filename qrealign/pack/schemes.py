"""Which scheme each linear of a compressed-tensors checkpoint has, and what of that format cannot be run here.

The format allows several groups of layers, each with its recipe, named by module class, exact name or `re:` pattern;
llm-compressor writes such files. What this project runs is a subset; everything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qrealign.config import QuantArgs, QuantScheme
from qrealign.errors import CheckpointFormatError
from qrealign.pack.format import INT_FORMAT, PACKED_FORMAT, scheme_name

LAYOUTS = (INT_FORMAT, PACKED_FORMAT, "naive-quantized", "mixed-precision")
_WEIGHT_STRATEGIES = ("tensor", "channel", "group")
_PATTERN = "re:"


@dataclass(frozen=True)
class LayerSchemes:
    """The recipes of a checkpoint: `targets` maps a class, name or pattern to its scheme, `ignore` names the others."""

    targets: Mapping[str, QuantScheme]
    ignore: tuple[str, ...]

    def scheme_for(self, names: Iterable[str]) -> QuantScheme | None:
        """Return the scheme of a linear, None where it is none's target.

        A name goes before a pattern and a pattern before the class, as in the format's own package.

        Args:
            names: what the linear is called: our full name, and the checkpoint's where it differs.
        """
        known = tuple(names)
        if any(_matches(target, known) for target in self.ignore):
            return None
        for target in sorted(self.targets, key=lambda text: (text == "Linear", text.startswith(_PATTERN), text)):
            if _matches(target, known):
                return self.targets[target]
        return None


def parse_schemes(block: Mapping[str, Any]) -> LayerSchemes:
    """Return the schemes that a `quantization_config` block describes.

    Raises:
        CheckpointFormatError: a group cannot be run here; the message names what it asks for.
    """
    try:
        _require_plain(block)
        targets = {
            target: scheme
            for group in block["config_groups"].values()
            for scheme in [_scheme(group, block)]
            for target in group["targets"]
        }
        return LayerSchemes(targets, tuple(block.get("ignore") or ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointFormatError(f"its quantization_config is no compressed-tensors block ({error!r})") from error


def _matches(target: str, names: tuple[str, ...]) -> bool:
    """Tell whether a target of the format means a linear with these names."""
    if target.startswith(_PATTERN):
        return any(re.match(target.removeprefix(_PATTERN), name) for name in names)
    return target == "Linear" or target in names


def _require_plain(block: Mapping[str, Any]) -> None:
    """Refuse what a block may ask for beside quantized linears."""
    if block.get("kv_cache_scheme"):
        raise _cannot("a quantized key-value cache (kv_cache_scheme)")
    sparsity = block.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise _cannot(f"sparse weights (sparsity_config {sparsity['format']})")
    if (block.get("transform_config") or {}).get("config_groups"):
        raise _cannot("rotations of the hidden states (transform_config)")


def _scheme(group: Mapping[str, Any], block: Mapping[str, Any]) -> QuantScheme:
    layout = group.get("format") or block.get("format")
    if layout not in LAYOUTS:
        raise _cannot(f"the tensor layout {layout}")
    if group.get("output_activations"):
        raise _cannot("quantized outputs (output_activations)")
    if not group.get("weights"):
        raise _cannot("layers whose weights are not quantized")
    weights = _weights(group["weights"])
    activations = _activations(group["input_activations"]) if group.get("input_activations") else None
    return QuantScheme(name=scheme_name(weights, activations), weights=weights, activations=activations)


def _weights(values: Mapping[str, Any]) -> QuantArgs:
    _require_integers("weights", values)
    strategy = values["strategy"]
    if strategy not in _WEIGHT_STRATEGIES:
        raise _cannot(f"weights with one scale per {strategy}")
    if values.get("dynamic"):
        raise _cannot("weights that are quantized while the model runs")
    if not isinstance(values["symmetric"], bool):
        raise ValueError(f"symmetric {values['symmetric']!r}")
    group_size = values.get("group_size") if strategy == "group" else None
    # One scale for the whole tensor becomes one per row when the layer is read.
    return QuantArgs(
        num_bits=values["num_bits"],
        granularity="per_channel" if group_size is None else "per_group",
        symmetric=values["symmetric"],
        group_size=group_size,
    )


def _activations(values: Mapping[str, Any]) -> QuantArgs:
    _require_integers("activations", values)
    if values.get("dynamic") is not True:
        raise _cannot("activations with stored scales (static quantization)")
    if values["strategy"] != "token":
        raise _cannot(f"activations with one scale per {values['strategy']}")
    if not values["symmetric"]:
        raise _cannot("activations with a zero point")
    return QuantArgs(num_bits=values["num_bits"], granularity="per_token")


def _require_integers(what: str, values: Mapping[str, Any]) -> None:
    """Refuse floating-point codes and widths other than 4 and 8 bits."""
    kind, bits = values["type"], values["num_bits"]
    if kind != "int":
        raise _cannot(f"{what} in {bits}-bit floating point")
    if bits not in (4, 8):
        raise _cannot(f"{what} in {bits} bits")


def _cannot(what: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"it has {what}, which is not run here: use int8 or int4 weights with 16-bit or dynamic per-token activations"
    )
