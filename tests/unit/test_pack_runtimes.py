"""Who takes which file: the tables of the servers' dispatch rules."""

from __future__ import annotations

import pytest

from qrealign.config import QuantArgs, QuantScheme, parse_scheme
from qrealign.errors import CheckpointFormatError
from qrealign.pack import runtimes
from qrealign.pack.format import quantization_config
from qrealign.pack.runtimes import Runtime, compatible_runtimes


def shapes(hidden: int = 4096, mlp: int = 11008, kv_width: int | None = None) -> dict[str, tuple[int, int]]:
    prefix, kv_width = "model.layers.0", kv_width or hidden
    return {
        f"{prefix}.self_attn.q_proj": (hidden, hidden),
        f"{prefix}.self_attn.k_proj": (kv_width, hidden),
        f"{prefix}.self_attn.v_proj": (kv_width, hidden),
        f"{prefix}.self_attn.o_proj": (hidden, hidden),
        f"{prefix}.mlp.gate_proj": (mlp, hidden),
        f"{prefix}.mlp.up_proj": (mlp, hidden),
        f"{prefix}.mlp.down_proj": (hidden, mlp),
    }


def ask(
    scheme: str | QuantScheme,
    linears: dict[str, tuple[int, int]] | None = None,
    *,
    version: str = "5.23.0",
    **config: object,
) -> dict[str, Runtime]:
    parsed = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    values = {
        "model_type": "llama",
        "num_attention_heads": 32,
        "quantization_config": quantization_config(parsed, ["lm_head"]),
        **config,
    }
    answers = compatible_runtimes(values, shapes() if linears is None else linears, transformers_version=version)
    return {answer.name.split()[0]: answer for answer in answers}


@pytest.mark.parametrize(
    ("scheme", "accepting"),
    [
        ("w8a8", "vLLM SGLang transformers"),
        ("w8a16", "vLLM SGLang transformers"),
        ("w4a16", "vLLM SGLang transformers"),
        ("w4a16_channel", "vLLM SGLang transformers"),
        ("w4a16_asym", "vLLM SGLang"),
        ("w4a8", "vLLM transformers"),
        ("w4a4", "vLLM transformers"),
    ],
)
def test_who_accepts_what(scheme: str, accepting: str) -> None:
    answers = ask(scheme)
    assert [name for name, answer in answers.items() if answer.accepted] == accepting.split()
    assert all(answer.why for answer in answers.values())
    assert all(bool(answer.kernel and answer.gpus) == answer.accepted for answer in answers.values())


@pytest.mark.parametrize(
    ("scheme", "server", "kernel", "gpus"),
    [
        ("w8a8", "vLLM", "Cutlass", "7.5 to 9.x"),
        ("w8a8", "SGLang", "Cutlass", "8.0 and above"),
        ("w4a16", "vLLM", "Machete", "7.5 and above"),
        ("w4a16", "SGLang", "Marlin", "8.0 and above"),
        ("w4a8", "vLLM", "as W4A16", "7.5 and above"),
        ("w8a8", "transformers", "decompressed", "any"),
    ],
)
def test_kernels_and_gpus(scheme: str, server: str, kernel: str, gpus: str) -> None:
    answer = ask(scheme)[server]
    assert kernel in answer.kernel and gpus in answer.gpus


def test_silent_changes_are_said() -> None:
    assert "silently left in 16 bits unless it is started with --linear-backend humming" in ask("w4a8")["vLLM"].why
    asymmetric = QuantScheme(
        name="w8a8",
        weights=QuantArgs(num_bits=8, granularity="per_channel"),
        activations=QuantArgs(num_bits=8, granularity="per_token", symmetric=False),
    )
    assert "silently quantized without their zero point" in ask(asymmetric)["SGLang"].why
    assert ask(asymmetric)["vLLM"].accepted


def test_int8_weights_with_a_zero_point_are_refused_by_servers() -> None:
    scheme = QuantScheme(
        name="w8a8",
        weights=QuantArgs(num_bits=8, granularity="per_channel", symmetric=False),
        activations=QuantArgs(num_bits=8, granularity="per_token"),
    )
    answers = ask(scheme)
    assert not answers["vLLM"].accepted and not answers["SGLang"].accepted
    assert "zero point" in answers["vLLM"].why


def test_other_layouts() -> None:
    block = quantization_config(parse_scheme("w4a8"), ["lm_head"])
    block["format"] = block["config_groups"]["group_0"]["format"] = "int-quantized"
    answers = {
        a.name.split()[0]: a
        for a in compatible_runtimes({"quantization_config": block}, shapes(), transformers_version="5.23.0")
    }
    assert not answers["vLLM"].accepted and "Arm" in answers["vLLM"].why
    five = QuantScheme(name="w5a16", weights=QuantArgs(num_bits=5, granularity="per_channel"), activations=None)
    assert not ask(five)["SGLang"].accepted
    odd = QuantScheme(
        name="w4a16", weights=QuantArgs(num_bits=4, granularity="per_group", group_size=16), activations=None
    )
    assert "groups of 32, 64 or 128" in ask(odd)["vLLM"].why
    with pytest.raises(CheckpointFormatError):
        compatible_runtimes({"quantization_config": {"config_groups": {}, "format": "x", "ignore": []}}, {})


@pytest.mark.parametrize(
    ("version", "accepted"), [("4.57.3", False), ("5.19.0", True), ("5.22.1", True), ("5.23.0", False), ("", False)]
)
def test_zero_points_in_transformers_depend_on_its_version(version: str, accepted: bool) -> None:
    assert ask("w4a16_asym", version=version)["transformers"].accepted is accepted
    assert ask("w4a16", version=version)["transformers"].accepted


def test_the_installed_version_is_taken_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"quantization_config": quantization_config(parse_scheme("w8a8"), ["lm_head"])}
    assert compatible_runtimes(config, shapes())[-1].name.startswith("transformers 5.")

    def missing(_: str) -> str:
        raise runtimes.PackageNotFoundError

    monkeypatch.setattr(runtimes, "version", missing)
    assert compatible_runtimes(config, shapes())[-1].name == "transformers"


@pytest.mark.parametrize(
    ("scheme", "linears", "heads", "key_value", "counts"),
    [
        ("w4a16", shapes(), 32, 32, (1, 2)),  # 11008 / 4 = 2752 is no multiple of 128
        ("w8a8", shapes(), 32, 32, (1, 2, 4, 8)),
        ("w4a16", shapes(4096, 14336, 1024), 32, 8, (1, 2, 4, 8)),
        ("w4a16", shapes(512, 1408, 256), 8, 4, (1,)),
        ("w4a16", shapes(896, 4864, 128), 14, 2, (1,)),
    ],
    ids=["7B", "7B int8", "8B GQA", "testbed", "0.5B"],
)
def test_tensor_parallel_counts(
    scheme: str, linears: dict[str, tuple[int, int]], heads: int, key_value: int, counts: tuple[int, ...]
) -> None:
    answers = ask(scheme, linears, num_attention_heads=heads, num_key_value_heads=key_value)
    assert answers["vLLM"].tensor_parallel == answers["SGLang"].tensor_parallel == counts
    assert answers["transformers"].tensor_parallel == ()


def test_shapes_that_marlin_cannot_take_are_named() -> None:
    answers = ask("w4a16", shapes(512, 1472))
    assert not answers["vLLM"].accepted and not answers["SGLang"].accepted and answers["transformers"].accepted
    assert "down_proj 512 x 1472" in answers["vLLM"].why
    assert ask("w8a8", shapes(512, 1400))["vLLM"].accepted
    ignoring = {
        "quantization_config": quantization_config(
            parse_scheme("w4a16_channel"), ["lm_head", "model.layers.0.mlp.down_proj"]
        )
    }
    linears = {name: shape for name, shape in shapes(512, 1408).items() if "down" not in name}
    assert compatible_runtimes(ignoring, {**linears, "model.layers.0.mlp.down_proj": (512, 1400)})[0].accepted


def test_what_transformers_does_not_do_exactly_is_said() -> None:
    experts = {"model.layers.0.mlp.experts.0.up_proj": (128, 128)}
    assert "fused parameters" in ask("w8a8", experts)["transformers"].why
    assert "their inputs are not quantized" in ask("w4a16", experts)["transformers"].why
    assert "not exact" in ask("w8a8", model_type="opt")["transformers"].why
    assert "exact but" in ask("w8a16", model_type="opt")["transformers"].why
