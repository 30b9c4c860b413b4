"""Schemes: names, suffixes, refusals, and fitting group sizes to a model."""

import pytest

from qrealign.config import QuantArgs, parse_scheme
from qrealign.errors import SchemeError


@pytest.mark.parametrize(
    ("name", "weight_bits", "group_size", "activation_bits"),
    [
        ("w8a8", 8, None, 8),
        ("w8a16", 8, None, None),
        ("w4a16", 4, 128, None),
        ("w4a8", 4, 128, 8),
        ("W4A4", 4, 128, 4),
        ("w4a16_g64", 4, 64, None),
        ("w4a16_channel", 4, None, None),
    ],
)
def test_presets(name, weight_bits, group_size, activation_bits):
    scheme = parse_scheme(name)
    assert (scheme.weights.num_bits, scheme.weights.group_size) == (weight_bits, group_size)
    assert (scheme.activations.num_bits if scheme.activations else None) == activation_bits
    assert scheme.weights.symmetric


def test_asymmetric_suffix_is_for_four_bits_only():
    assert not parse_scheme("w4a16_asym").weights.symmetric
    with pytest.raises(SchemeError, match="symmetric and per channel"):
        parse_scheme("w8a8_asym")


@pytest.mark.parametrize("name", ["w2a16", "w8a4", "int8", "", "w4a16_g48", "w4a16_g64_channel", "w8a8_g128"])
def test_unknown_schemes_are_refused_by_name(name):
    with pytest.raises(SchemeError, match="scheme"):
        parse_scheme(name)


def test_group_size_fits_the_narrowest_layer():
    scheme = parse_scheme("w4a16")
    assert scheme.fit_to([4096, 11008]) == scheme
    assert scheme.fit_to([4096, 704]).weights.group_size == 64
    assert scheme.fit_to([4096, 100]).weights.granularity == "per_channel"
    assert parse_scheme("w8a8").fit_to([100]) == parse_scheme("w8a8")


def test_group_size_goes_with_groups_only():
    with pytest.raises(SchemeError, match="group_size"):
        QuantArgs(num_bits=4, granularity="per_group")
    assert (
        QuantArgs(num_bits=4, granularity="per_channel").qmin,
        QuantArgs(num_bits=8, granularity="per_token").qmax,
    ) == (-8, 127)
