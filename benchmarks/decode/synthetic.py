"""Checkpoints of real size that are not on disk: random tensors, plain or already packed, handed out when asked for.

Speed and memory do not depend on values, but the way into memory does matter: models are read through the same code
as files are, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.calibration.geometries import Geometry
from qrealign.config import QuantScheme, parse_scheme
from qrealign.models.checkpoint import TensorInfo, WeightFiles
from qrealign.models.source import ModelSource
from qrealign.pack.format import INT_FORMAT, quantization_config, storage_format
from qrealign.pack.schemes import parse_schemes
from qrealign.pack.source import PackedSource

_POOL = (1 << 24) + 1  # most values that tensors are cut from; odd, so that rows do not repeat
_WEIGHT_STD = 0.02
_CODE_STD = {4: 4.6, 8: 74.0}  # of codes spread evenly over their range
_DTYPES = {"BF16": torch.bfloat16, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
_BYTES = {"BF16": 2, "I8": 1, "I32": 4, "I64": 8}

Stored = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype as safetensors calls it, shape


class RandomFiles(WeightFiles):
    """Tensors that are random, the same for the same names in the same order of reading.

    Args:
        stored: what the files would hold.
        shapes: `[N, K]` of each quantized linear by its name, for `weight_shape`.
        num_bits: of the codes.
    """

    def __init__(self, stored: Stored, shapes: Mapping[str, tuple[int, int]], num_bits: int = 8) -> None:
        super().__init__([])
        for name, (dtype, shape) in stored.items():
            self.tensors[name] = TensorInfo(Path("random"), dtype, shape, 0, math.prod(shape) * _BYTES[dtype])
        self._shapes, self._scale = shapes, _WEIGHT_STD / _CODE_STD[num_bits]
        generator = torch.Generator().manual_seed(0)
        count = min(_POOL, max(math.prod(shape) for _, shape in stored.values()) | 1)
        self._normal = (torch.randn(count, generator=generator) * _WEIGHT_STD).bfloat16()
        self._bytes = torch.randint(-128, 128, (4 * count,), dtype=torch.int8, generator=generator)

    def read(self, names: Iterable[str], *, check: bool = True) -> dict[str, Tensor]:
        """Return CPU tensors by name; there is nothing to check."""
        return {name: self._draw(name, self.tensors[name]) for name in names}

    def _draw(self, name: str, info: TensorInfo) -> Tensor:
        if info.dtype == "I64":
            return torch.tensor(self._shapes[name.removesuffix(".weight_shape")], dtype=torch.int64)
        if name.endswith(".weight_scale"):
            return self._scale * (1 + 10 * _cut(self._normal, info.shape).abs())
        if info.dtype == "BF16":
            return _cut(self._normal, info.shape) if len(info.shape) > 1 else torch.ones(info.shape).bfloat16()
        return _cut(self._bytes.view(_DTYPES[info.dtype]), info.shape)


def _cut(pool: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of this shape from the beginning of a pool, repeated as often as needed."""
    count = math.prod(shape)
    return pool.repeat(-(-count // len(pool)))[:count].reshape(shape).clone()


def random_source(geometry: Geometry, scheme: str | None) -> ModelSource:
    """Return a random checkpoint of a geometry: packed by the scheme called `scheme`, or bfloat16 for None."""
    config = _config(geometry)
    stored = _plain_tensors(config)
    if scheme is None:
        return ModelSource(Path("random"), config, RandomFiles(stored, {}), None)
    recipe = parse_scheme(scheme)
    linears = {
        name.removesuffix(".weight"): shape for name, (_, shape) in stored.items() if name.endswith("proj.weight")
    }
    packed = {name: entry for name, entry in stored.items() if name.removesuffix(".weight") not in linears}
    for name, shape in linears.items():
        packed |= {f"{name}.{suffix}": entry for suffix, entry in _packed_tensors(shape, recipe).items()}
    files = RandomFiles(packed, linears, recipe.weights.num_bits)  # type: ignore[arg-type]
    return PackedSource(Path("random"), config, files, parse_schemes(quantization_config(recipe, ["lm_head"])))


def _config(geometry: Geometry) -> Any:
    from transformers import AutoConfig

    # No token ends an answer: every run decodes as many tokens as it is asked for.
    config = AutoConfig.for_model(
        geometry.model_type, **geometry.hugging_face(), bos_token_id=1, eos_token_id=None, pad_token_id=None
    )
    config.dtype = torch.bfloat16
    return config


def _plain_tensors(config: Any) -> Stored:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return {name: ("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items() if name not in tied}


def _packed_tensors(shape: tuple[int, ...], scheme: QuantScheme) -> Stored:
    """Return the tensors of one quantized linear by suffix, as `pack.format` lays them out."""
    rows, columns = shape
    args = scheme.weights
    groups = columns // args.group_size if args.group_size else 1
    if storage_format(scheme) == INT_FORMAT:
        return {"weight": ("I8", shape), "weight_scale": ("BF16", (rows, 1))}
    words: Stored = {
        "weight_packed": ("I32", (rows, columns * args.num_bits // 32)),
        "weight_scale": ("BF16", (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not args.symmetric:
        words["weight_zero_point"] = ("I32", (rows * args.num_bits // 32, groups))
    return words
