"""The compressed-tensors checkpoint format: a scheme in `config.json`, and a linear layer as named tensors.

Layout of one linear `[N, K]` with G groups along K (1 when per channel):

- `int-quantized` (8-bit weights and activations): `weight` int8 `[N, K]`, `weight_scale` `[N, 1]`.
- `pack-quantized` (all others): `weight_packed` int32 `[N, K * bits / 32]`, `weight_scale` `[N, G]`, `weight_shape`
  int64 `[2]`, and with a zero point `weight_zero_point` int32 `[N * bits / 32, G]`.

Scales and biases have the checkpoint's dtype. The config block is written with the keys that every reader since
compressed-tensors 0.12 takes; unknown ones are refused there.

Files of llm-compressor are read too: they may hold 4-bit codes unpacked, one scale for a whole tensor, zero points that
are not packed, and columns whose groups are named one by one (`weight_g_idx` `[K]`, its `actorder`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qrealign.config import Granularity, QuantArgs, QuantScheme
from qrealign.errors import CheckpointFormatError
from qrealign.quant.packed import QuantizedLinear
from qrealign_kernels import pack_codes, unpack_codes

INT_FORMAT = "int-quantized"
PACKED_FORMAT = "pack-quantized"
FORMAT_VERSION = "0.17.0"
QUANTIZED_SUFFIXES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

_STRATEGY: dict[Granularity, str] = {"per_channel": "channel", "per_group": "group", "per_token": "token"}
_GRANULARITY = {strategy: granularity for granularity, strategy in _STRATEGY.items()}


def storage_format(scheme: QuantScheme) -> str:
    """Return the name of the tensor layout that servers expect for `scheme`."""
    both_eight = scheme.weights.num_bits == 8 and scheme.activations is not None and scheme.activations.num_bits == 8
    return INT_FORMAT if both_eight else PACKED_FORMAT


def quantization_config(
    scheme: QuantScheme, ignore: Iterable[str], *, provenance: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the `quantization_config` block of `config.json`.

    Args:
        scheme: recipe of every linear that is not ignored.
        ignore: exact names of the linears left in floating point.
        provenance: kept under the key `qrealign`, which readers pass over.
    """
    layout = storage_format(scheme)
    group = {
        "targets": ["Linear"],
        "format": layout,
        "weights": _arguments(scheme.weights, dynamic=False),
        "input_activations": None if scheme.activations is None else _arguments(scheme.activations, dynamic=True),
        "output_activations": None,
    }
    block = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(set(ignore)),
        "sparsity_config": {},
        "transform_config": {},
        "version": FORMAT_VERSION,
        "config_groups": {"group_0": group},
    }
    return {**block, "qrealign": dict(provenance)} if provenance is not None else block


def _arguments(args: QuantArgs, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": args.num_bits,
        "type": "int",
        "symmetric": args.symmetric,
        "strategy": _STRATEGY[args.granularity],
        "group_size": args.group_size,
        "dynamic": dynamic,
    }


def scheme_of(block: Mapping[str, Any]) -> QuantScheme:
    """Return the scheme that a `quantization_config` block describes.

    Raises:
        CheckpointFormatError: the block is no single integer scheme in this format.
    """
    try:
        (group,) = block["config_groups"].values()
        weights, activations = _parse_arguments(group["weights"]), group["input_activations"]
        parsed = None if activations is None else _parse_arguments(activations)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointFormatError(
            f"the quantization_config is no single compressed-tensors integer scheme ({error!r})"
        ) from error
    return QuantScheme(name=scheme_name(weights, parsed), weights=weights, activations=parsed)


def _parse_arguments(values: Mapping[str, Any]) -> QuantArgs:
    if values["type"] != "int":
        raise ValueError(f"type {values['type']!r}")
    return QuantArgs(
        num_bits=values["num_bits"],
        granularity=_GRANULARITY[values["strategy"]],
        symmetric=values["symmetric"],
        group_size=values["group_size"],
    )


def scheme_name(weights: QuantArgs, activations: QuantArgs | None) -> str:
    """Return the name that `parse_scheme` gives to this recipe."""
    name = f"w{weights.num_bits}a{16 if activations is None else activations.num_bits}"
    if weights.num_bits == 4:
        name += "_channel" if weights.group_size is None else f"_g{weights.group_size}"
    return name if weights.symmetric else f"{name}_asym"


def expected_suffixes(scheme: QuantScheme) -> frozenset[str]:
    """Return the tensor names of one quantized linear, without its bias."""
    if storage_format(scheme) == INT_FORMAT:
        return frozenset({"weight", "weight_scale"})
    names = {"weight_packed", "weight_scale", "weight_shape"}
    return frozenset(names if scheme.weights.symmetric else names | {"weight_zero_point"})


def missing_suffixes(found: Collection[str], scheme: QuantScheme) -> list[str]:
    """Return what a linear lacks of which a file holds the tensors called `found`, whichever layout it has."""
    needed = {"weight_scale", "weight_packed", "weight_shape"} if "weight_packed" in found else {"weight_scale"}
    if "weight_packed" not in found and "weight" not in found:
        needed = set(expected_suffixes(scheme))
    if not scheme.weights.symmetric:
        needed.add("weight_zero_point")
    return sorted(needed.difference(found))


def tensors_of(linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the stored tensors of a frozen linear by suffix (`weight_packed`, `weight_scale`, ..., `bias`).

    Args:
        linear: the layer; its scales are exactly representable in `dtype`.
        dtype: the checkpoint's floating dtype.

    Raises:
        ValueError: a scale changes when it is stored, so the file would not hold the calibrated weight.
    """
    stored_scale = linear.scale.to(dtype)
    if not torch.equal(stored_scale.float(), linear.scale.float()):
        raise ValueError(
            f"the scales of this layer are not representable in {dtype}: round them before codes are computed"
        )
    tensors = {"weight_scale": stored_scale}
    if storage_format(linear.scheme) == INT_FORMAT:
        tensors["weight"] = linear.codes
    else:
        bits = linear.scheme.weights.num_bits
        tensors["weight_packed"] = pack_codes(linear.codes, bits, dim=1)
        tensors["weight_shape"] = torch.tensor([linear.out_features, linear.in_features], dtype=torch.int64)
        if linear.zero_point is not None:
            tensors["weight_zero_point"] = pack_codes(linear.zero_point, bits, dim=0)
    if linear.bias is not None:
        tensors["bias"] = linear.bias.detach().to(dtype)
    return tensors


@dataclass(frozen=True, kw_only=True)
class StoredLinear:
    """One quantized linear of a file, unpacked.

    Attributes:
        codes: `[N, K]` int8.
        scale: `[N, G]` in the checkpoint's dtype.
        zero_point: `[N, G]` int8, or None when symmetric.
        column_group: `[K]` int64, the group of each column where they do not follow each other, else None.
        bias: `[N]` in the checkpoint's dtype, or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    column_group: Tensor | None
    bias: Tensor | None


def read_linear(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> StoredLinear:
    """Return the linear whose stored tensors by suffix are `tensors`, unpacked on their device.

    Raises:
        CheckpointFormatError: a tensor is missing, or a shape or dtype contradicts another.
    """
    if missing := missing_suffixes(tensors.keys(), scheme):
        raise CheckpointFormatError(f"a quantized layer lacks {', '.join(missing)} for scheme {scheme.name}")
    bits, zero_point = scheme.weights.num_bits, None
    try:
        if "weight_packed" in tensors:
            rows, columns = (int(n) for n in tensors["weight_shape"])
            codes = unpack_codes(tensors["weight_packed"], bits, (rows, columns), dim=1)
        else:
            codes = tensors["weight"]
            rows, columns = codes.shape
        scale = tensors["weight_scale"]
        if scale.numel() == 1:
            scale = scale.reshape(1, 1).expand(rows, 1).contiguous()
        if not scheme.weights.symmetric:
            zero_point = tensors["weight_zero_point"]
            if zero_point.dtype == torch.int32:
                zero_point = unpack_codes(zero_point, bits, (rows, scale.shape[1]), dim=0)
            zero_point = zero_point.reshape(-1, 1).expand(rows, 1) if zero_point.numel() == 1 else zero_point
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointFormatError(f"a quantized layer's tensors contradict each other ({error})") from error
    groups = columns // scheme.weights.group_size if scheme.weights.group_size else 1
    if codes.dtype != torch.int8 or scale.shape != (rows, groups):
        raise CheckpointFormatError(
            f"a quantized layer holds {codes.dtype} codes {tuple(codes.shape)} and scales {tuple(scale.shape)}, "
            f"where scheme {scheme.name} needs int8 codes and {groups} scales a row"
        )
    column_group = tensors.get("weight_g_idx")
    return StoredLinear(
        codes=codes,
        scale=scale,
        zero_point=None if zero_point is None else zero_point.to(torch.int8).contiguous(),
        column_group=None if column_group is None else column_group.long(),
        bias=tensors.get("bias"),
    )


def linear_of(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedLinear:
    """Return the frozen linear that `tensors_of` has written, or another writer of the format.

    Raises:
        CheckpointFormatError: a tensor is missing, or a shape or dtype contradicts another.
    """
    stored = read_linear(tensors, scheme)
    scale, zero_point = stored.scale.float(), stored.zero_point
    if stored.column_group is not None:  # a scale for each column is the layout that needs no order
        scale = scale[:, stored.column_group]
        zero_point = None if zero_point is None else zero_point[:, stored.column_group]
    return QuantizedLinear(stored.codes, scale, zero_point, stored.bias, scheme)
