"""The checkpoint format: config block and tensors, against its specification and the compressed-tensors package."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from qrealign.config import QuantScheme, parse_scheme
from qrealign.errors import CheckpointFormatError
from qrealign.pack.format import (
    INT_FORMAT,
    PACKED_FORMAT,
    linear_of,
    quantization_config,
    scheme_of,
    storage_format,
    tensors_of,
)
from qrealign.quant.packed import QuantizedLinear
from qrealign_kernels import quantize_weight

SCHEMES = ("w8a8", "w8a16", "w4a16", "w4a16_g32", "w4a16_asym", "w4a16_channel", "w4a16_channel_asym", "w4a8", "w4a4")


def linear(
    scheme: QuantScheme, rows: int = 24, columns: int = 256, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> QuantizedLinear:
    args = scheme.weights
    codes, scale, zero_point = quantize_weight(
        torch.randn(rows, columns),
        num_bits=args.num_bits,
        group_size=args.group_size,
        symmetric=args.symmetric,
        scale_dtype=dtype,
    )
    return QuantizedLinear(codes, scale, zero_point, torch.randn(rows).to(dtype) if bias else None, scheme)


def test_the_block_of_w8a8_is_the_specified_one() -> None:
    assert quantization_config(parse_scheme("w8a8"), ["lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.17.0",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "int-quantized",
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "group_size": None,
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "group_size": None,
                    "dynamic": True,
                },
                "output_activations": None,
            }
        },
    }


@pytest.mark.parametrize("name", SCHEMES)
def test_the_block_is_valid_and_says_what_the_scheme_says(name: str) -> None:
    scheme = parse_scheme(name)
    block = quantization_config(scheme, ["lm_head", "model.layers.0.mlp.gate"], provenance={"method": "realign"})
    (group,) = QuantizationConfig.model_validate(copy.deepcopy(block)).config_groups.values()
    args = scheme.weights
    assert (group.weights.num_bits, group.weights.symmetric, group.weights.group_size) == (
        args.num_bits,
        args.symmetric,
        args.group_size,
    )
    assert group.weights.strategy == ("group" if args.group_size else "channel")
    assert (group.input_activations is None) == (scheme.activations is None)
    assert group.format == block["format"] == (INT_FORMAT if name == "w8a8" else PACKED_FORMAT)
    parsed = scheme_of(block)
    assert (parsed.weights, parsed.activations) == (scheme.weights, scheme.activations)
    assert parse_scheme(parsed.name) == parsed
    assert block["qrealign"] == {"method": "realign"}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [24, 21], ids=["even", "ragged"])
def test_tensors_and_back(name: str, rows: int) -> None:
    layer = linear(parse_scheme(name), rows)
    tensors = tensors_of(layer, torch.bfloat16)
    back = linear_of(tensors, layer.scheme)
    for kind in ("codes", "scale", "bias"):
        assert torch.equal(getattr(back, kind), getattr(layer, kind))
    assert (back.zero_point is None and layer.zero_point is None) or torch.equal(back.zero_point, layer.zero_point)  # type: ignore[arg-type]


def test_names_shapes_and_dtypes_follow_the_tables() -> None:
    def table(name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            key: (t.dtype, tuple(t.shape)) for key, t in tensors_of(linear(parse_scheme(name)), torch.bfloat16).items()
        }

    bias = {"bias": (torch.bfloat16, (24,))}
    packed = {"weight_packed": (torch.int32, (24, 32)), "weight_shape": (torch.int64, (2,)), **bias}
    assert table("w8a8") == {"weight": (torch.int8, (24, 256)), "weight_scale": (torch.bfloat16, (24, 1)), **bias}
    assert table("w8a16") == {
        **packed,
        "weight_packed": (torch.int32, (24, 64)),
        "weight_scale": (torch.bfloat16, (24, 1)),
    }
    assert table("w4a16") == {**packed, "weight_scale": (torch.bfloat16, (24, 2))}
    assert table("w4a8") == table("w4a4") == table("w4a16")
    assert table("w4a16_channel") == {**packed, "weight_scale": (torch.bfloat16, (24, 1))}
    assert table("w4a16_asym") == {**table("w4a16"), "weight_zero_point": (torch.int32, (3, 2))}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_reads_the_same_weight(name: str) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    layer = linear(parse_scheme(name))
    tensors = tensors_of(layer, torch.bfloat16)
    if storage_format(layer.scheme) == INT_FORMAT:
        assert torch.equal(tensors["weight"], layer.codes)
        return
    bits = layer.scheme.weights.num_bits
    assert torch.equal(
        helpers.unpack_from_int32(tensors["weight_packed"], bits, torch.Size(layer.codes.shape)), layer.codes
    )
    assert torch.equal(helpers.pack_to_int32(layer.codes, bits), tensors["weight_packed"])
    if layer.zero_point is not None:
        shape = torch.Size(layer.zero_point.shape)
        assert torch.equal(
            helpers.unpack_from_int32(tensors["weight_zero_point"], bits, shape, packed_dim=0), layer.zero_point
        )


def test_a_scale_that_storage_would_change_is_our_own_bug() -> None:
    layer = linear(parse_scheme("w8a8"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"not representable in torch\.bfloat16"):
        tensors_of(layer, torch.bfloat16)


def test_contradicting_tensors_are_refused() -> None:
    layer = linear(parse_scheme("w4a16_asym"))
    tensors = tensors_of(layer, torch.bfloat16)
    with pytest.raises(CheckpointFormatError, match="lacks weight_zero_point"):
        linear_of({key: t for key, t in tensors.items() if key != "weight_zero_point"}, layer.scheme)
    with pytest.raises(CheckpointFormatError, match="contradict"):
        linear_of({**tensors, "weight_shape": torch.tensor([24, 300])}, layer.scheme)
    with pytest.raises(CheckpointFormatError, match="needs int8 codes and 2 scales a row"):
        linear_of(
            {
                **tensors,
                "weight_scale": tensors["weight_scale"][:, :1],
                "weight_zero_point": tensors["weight_zero_point"][:, :1],
            },
            layer.scheme,
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block["config_groups"].update(group_1={}),
        lambda block: block["config_groups"]["group_0"]["weights"].update(type="float"),
        lambda block: block["config_groups"]["group_0"].pop("weights"),
        lambda block: block.pop("config_groups"),
    ],
    ids=["two groups", "float", "no weights", "no groups"],
)
def test_other_configurations_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    block = quantization_config(parse_scheme("w8a8"), ["lm_head"])
    change(block)
    with pytest.raises(CheckpointFormatError, match="no single compressed-tensors integer scheme"):
        scheme_of(block)
