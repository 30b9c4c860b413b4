"""Which servers take a packed checkpoint, with which kernels on which GPUs: their dispatch rules, applied without them.

The rules are those of vLLM 0.33, SGLang 0.5.23 and transformers 5.19 to 5.23 with compressed-tensors 0.17 to 0.20. They
tell what a server accepts, not how fast it is; the server's own log line that names the kernel stays the last word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qrealign.config import QuantScheme
from qrealign.pack.format import PACKED_FORMAT, scheme_of

MARLIN_INPUT_MULTIPLE = 128
MARLIN_OUTPUT_MULTIPLE = 64
MARLIN_GROUP_SIZES = (None, 32, 64, 128)
SHARD_COUNTS = (1, 2, 4, 8)
# Linears whose input is split among the GPUs of a tensor-parallel server; the others have their output split.
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "fc2", "w2", "dense")
# Output-split linears that servers join into one before they choose a kernel.
_JOINED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "w1": "gate_up",
    "w3": "gate_up",
}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One runtime's answer: `kernel` and `gpus` are empty where it refuses, `why` is a sentence in either case.

    `tensor_parallel` holds the numbers of GPUs that the layer shapes can be split over; empty where it does not apply.
    """

    name: str
    accepted: bool
    kernel: str
    gpus: str
    why: str
    tensor_parallel: tuple[int, ...] = ()


def compatible_runtimes(
    config: Mapping[str, Any], linear_shapes: Mapping[str, tuple[int, int]], *, transformers_version: str | None = None
) -> list[Runtime]:
    """Return the answers of vLLM, SGLang and transformers to a packed checkpoint.

    Args:
        config: the checkpoint's `config.json`.
        linear_shapes: quantized linears by full name, (out_features, in_features).
        transformers_version: the version to answer for; the installed one by default.

    Raises:
        CheckpointFormatError: the configuration describes no scheme of this format.
    """
    block = config["quantization_config"]
    scheme, packed = scheme_of(block), block["format"] == PACKED_FORMAT
    ignored = set(block["ignore"])
    shapes = {name: shape for name, shape in linear_shapes.items() if name not in ignored}
    servers = [_vllm(scheme, packed), _sglang(scheme, packed)]
    if packed:
        servers = [_with_marlin_shapes(server, config, shapes, scheme) for server in servers]
    else:
        servers = [
            replace(server, tensor_parallel=_shard_counts(config, shapes, 1, 1)) if server.accepted else server
            for server in servers
        ]
    return [*servers, _transformers(scheme, packed, config, shapes, transformers_version or _installed("transformers"))]


def _refused(name: str, why: str) -> Runtime:
    return Runtime(name=name, accepted=False, kernel="", gpus="", why=why)


def _vllm(scheme: QuantScheme, packed: bool) -> Runtime:
    weights, activations = scheme.weights, scheme.activations
    if not packed:
        if weights.num_bits != 8:
            return _refused("vLLM", "unpacked 4-bit weights have kernels on Arm CPUs and XPUs only")
        if not weights.symmetric:
            return _refused("vLLM", "int8 weights with a zero point are not implemented")
        return Runtime(
            name="vLLM",
            accepted=True,
            kernel="Cutlass int8, else Triton",
            gpus="compute capability 7.5 to 9.x",
            why="int8 weights and dynamic int8 activations; not on Blackwell (10.0 and above)",
        )
    if activations is not None:
        return Runtime(
            name="vLLM",
            accepted=True,
            kernel="Machete (9.0) or Marlin, as W4A16",
            gpus="compute capability 7.5 and above",
            why=f"the {activations.num_bits}-bit activations are silently left in 16 bits unless it is started with "
            "--linear-backend humming",
        )
    kernel = "Machete (9.0) or Marlin" if weights.symmetric else "Marlin"
    return Runtime(
        name="vLLM",
        accepted=True,
        kernel=kernel,
        gpus="compute capability 7.5 and above",
        why="weights are unpacked in the kernel",
    )


def _sglang(scheme: QuantScheme, packed: bool) -> Runtime:
    weights, activations = scheme.weights, scheme.activations
    if activations is not None and weights.num_bits == 4:
        return _refused(
            "SGLang", f"linears with 4-bit weights and {activations.num_bits}-bit activations are not implemented"
        )
    if not packed:
        if not weights.symmetric:
            return _refused("SGLang", "int8 weights with a zero point are not implemented")
        why = "int8 weights and dynamic int8 activations; Blackwell (10.0 and above) is not documented"
        if activations is not None and not activations.symmetric:
            why = "it loads, but activations are silently quantized without their zero point"
        return Runtime(
            name="SGLang", accepted=True, kernel="Cutlass int8", gpus="compute capability 8.0 and above", why=why
        )
    if weights.num_bits not in (4, 8):
        return _refused("SGLang", "only 4-bit and 8-bit weights are implemented")
    return Runtime(
        name="SGLang",
        accepted=True,
        kernel="Marlin",
        gpus="compute capability 8.0 and above",
        why="weights are unpacked in the kernel",
    )


def _transformers(
    scheme: QuantScheme, packed: bool, config: Mapping[str, Any], shapes: Mapping[str, Any], installed: str
) -> Runtime:
    name = f"transformers {installed}".strip()
    has_experts = any(".experts." in linear for linear in shapes)
    if has_experts and not packed:
        return _refused(name, "it holds experts as fused parameters, which its reader fills from packed weights only")
    if not scheme.weights.symmetric and not (5, 19) <= _numbers(installed) <= (5, 22):
        return _refused(
            name,
            "packed zero points fail to load; 5.19 to 5.22 read them, and CompressedTensorsConfig(dequantize=True) "
            "gives plain weights in the stored dtype in 5.23",
        )
    why = "exact but not faster than the unquantized model"
    if has_experts:
        why = "experts become plain weights in the stored dtype, and their inputs are not quantized"
    elif config.get("model_type") == "opt" and scheme.activations is not None:
        # compressed-tensors reduces over the dimensions after the second; OPT's MLP gets `[tokens, hidden]`.
        why = "not exact: the MLP of this architecture gets one activation scale for a whole batch, not one per token"
    return Runtime(
        name=name,
        accepted=True,
        kernel="weights decompressed, plain matmul",
        gpus="any, and CPUs",
        why=f"{why}; needs the package compressed-tensors",
    )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _numbers(text: str) -> tuple[int, int]:
    """Return major and minor of a version, (0, 0) where there is none."""
    parts = [int(part) for part in text.split(".")[:2] if part.isdigit()]
    return (parts[0], parts[1]) if len(parts) == 2 else (0, 0)


def _with_marlin_shapes(
    server: Runtime, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], scheme: QuantScheme
) -> Runtime:
    """Apply the shape rules of Marlin, the kernel that packed weights end in."""
    if not server.accepted:
        return server
    if scheme.weights.group_size not in MARLIN_GROUP_SIZES:
        return _refused(
            server.name, f"Marlin takes groups of 32, 64 or 128 or whole rows, not {scheme.weights.group_size}"
        )
    counts = _shard_counts(config, shapes, MARLIN_OUTPUT_MULTIPLE, MARLIN_INPUT_MULTIPLE)
    if 1 in counts:
        return replace(server, tensor_parallel=counts)
    wrong = next(
        f"{name} {rows} x {columns}"
        for name, (rows, columns) in _joined(shapes).items()
        if rows % MARLIN_OUTPUT_MULTIPLE or columns % MARLIN_INPUT_MULTIPLE
    )
    return _refused(
        server.name,
        f"Marlin needs outputs in multiples of {MARLIN_OUTPUT_MULTIPLE} and inputs in multiples of "
        f"{MARLIN_INPUT_MULTIPLE}, unlike {wrong}: use w8a8, or leave such layers unquantized",
    )


def _joined(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the shapes of the linears as servers hold them: q, k, v in one and gate, up in one."""
    joined: dict[str, tuple[int, int]] = {}
    for name, (rows, columns) in shapes.items():
        parent, _, leaf = name.rpartition(".")
        key = f"{parent}.{_JOINED.get(leaf, leaf)}"
        joined[key] = (joined.get(key, (0, 0))[0] + rows, columns)
    return joined


def _shard_counts(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], output_multiple: int, input_multiple: int
) -> tuple[int, ...]:
    """Return the numbers of GPUs over which every linear splits into shards of the multiples that a kernel needs."""
    linears = {(name.rpartition(".")[2] in _ROW_PARALLEL, shape) for name, shape in _joined(shapes).items()}
    return tuple(
        count
        for count in SHARD_COUNTS
        if _heads_split(config, count)
        and all(
            rows % (output_multiple * (1 if by_row else count)) == 0
            and columns % (input_multiple * (count if by_row else 1)) == 0
            for by_row, (rows, columns) in linears
        )
    )


def _heads_split(config: Mapping[str, Any], count: int) -> bool:
    """Query heads must split evenly; key-value heads split evenly or are repeated evenly."""
    heads = config.get("num_attention_heads") or 1
    key_value = config.get("num_key_value_heads") or heads
    return bool(heads % count == 0 and (key_value % count == 0 or count % key_value == 0))
