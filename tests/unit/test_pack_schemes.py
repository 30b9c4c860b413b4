"""Which layers of a compressed-tensors checkpoint have which scheme, and what is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from qrealign.config import parse_scheme
from qrealign.errors import CheckpointFormatError
from qrealign.pack.format import quantization_config
from qrealign.pack.schemes import parse_schemes


def arguments(num_bits: int, strategy: str, **others: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False, **others}


def block(**changes: Any) -> dict[str, Any]:
    """Return llm-compressor's W8A8, observers and all."""
    group = {
        "targets": ["Linear"],
        "format": "int-quantized",
        "weights": arguments(8, "channel", observer="minmax", observer_kwargs={}, block_structure=None, actorder=None),
        "input_activations": arguments(8, "token", dynamic=True, observer=None),
        "output_activations": None,
    }
    plain = {"format": "int-quantized", "ignore": ["lm_head"], "config_groups": {"group_0": group}}
    return {**plain, "quant_method": "compressed-tensors", "quantization_status": "compressed", **changes}


def changed(where: str, **values: Any) -> dict[str, Any]:
    found = copy.deepcopy(block())
    group = found["config_groups"]["group_0"]
    (group if where == "group" else group[where]).update(values)
    return found


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a16", "w4a16_channel", "w4a16_asym", "w4a8", "w4a4"])
def test_our_own_blocks_give_their_scheme(name: str) -> None:
    scheme = parse_scheme(name)
    found = parse_schemes(quantization_config(scheme, ["lm_head"])).scheme_for(["model.layers.0.mlp.up_proj"])
    assert found is not None and (found.weights, found.activations) == (scheme.weights, scheme.activations)


def test_names_go_before_patterns_and_patterns_before_the_class() -> None:
    four = changed("weights", num_bits=4)["config_groups"]["group_0"]
    groups = {
        "class": block()["config_groups"]["group_0"],
        "pattern": {**four, "targets": ["re:.*mlp.*", "re:.*down_proj"], "input_activations": None},
        "name": {**four, "targets": ["a.mlp.up_proj"]},
    }
    schemes = parse_schemes(block(config_groups=groups, ignore=["a.mlp.gate", "re:.*router"]))

    def name(*linear: str) -> str | None:
        found = schemes.scheme_for(linear)
        return None if found is None else found.name

    assert name("a.self_attn.q_proj") == "w8a8"
    assert name("a.mlp.down_proj") == "w4a16_channel"
    assert name("a.mlp.up_proj") == "w4a8_channel"
    assert name("a.mlp.gate") is None and name("a.router") is None
    assert name("ours.gate", "a.mlp.gate") is None  # called so in the file


def test_one_scale_for_a_tensor_counts_as_one_per_row() -> None:
    found = parse_schemes(changed("weights", strategy="tensor")).scheme_for(["a"])
    assert found is not None and found.weights.granularity == "per_channel"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (changed("weights", type="float"), "weights in 8-bit floating point"),
        (changed("weights", num_bits=3), "weights in 3 bits"),
        (changed("weights", strategy="block"), "weights with one scale per block"),
        (changed("weights", dynamic=True), "quantized while the model runs"),
        (changed("input_activations", type="float"), "activations in 8-bit floating point"),
        (changed("input_activations", dynamic=False, strategy="tensor"), "static quantization"),
        (changed("input_activations", dynamic="local"), "static quantization"),
        (changed("input_activations", strategy="group", group_size=128), "one scale per group"),
        (changed("input_activations", symmetric=False), "activations with a zero point"),
        (changed("group", output_activations=arguments(8, "tensor")), "output_activations"),
        (changed("group", weights=None), "weights are not quantized"),
        (changed("group", format="nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
        (block(kv_cache_scheme=arguments(8, "tensor")), "kv_cache_scheme"),
        (block(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (block(transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (block(config_groups=[]), "no compressed-tensors block"),
        (changed("weights", symmetric=None, strategy="group"), "no compressed-tensors block"),
        ({}, "no compressed-tensors block"),
    ],
)
def test_what_is_not_run_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointFormatError, match=named):
        parse_schemes(given)
