"""Reads a packed checkpoint back and proves that it holds the calibrated codes and nothing is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qrealign.config import QuantScheme
from qrealign.errors import CheckpointFormatError
from qrealign.files import read_json
from qrealign.models.checkpoint import INDEX_NAME, WeightFiles, find_weight_files, read_header
from qrealign.pack.blocks import Comparison, compare_block, rename, some_of
from qrealign.pack.format import expected_suffixes, scheme_of
from qrealign.pack.size import packed_linear_bytes

if TYPE_CHECKING:
    from qrealign.models.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What reading back has shown; `differing_codes` counts integer codes and zero points over `blocks` blocks."""

    blocks: int
    compared_codes: int
    differing_codes: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.differing_codes and not self.problems


def verify_checkpoint(
    directory: Path, source: ModelSource, blocks: Iterable[tuple[int, nn.Module]] = ()
) -> Verification:
    """Check a written checkpoint against its source and against the calibrated blocks.

    Args:
        directory: folder written by `CheckpointWriter`.
        source: the model that was packed.
        blocks: (index, block) pairs as they were handed to the writer; taken one at a time.

    Returns:
        The counts and every problem: tensors missing or unknown, shapes that do not fit, layers that servers fuse but
        that differ in fate, tensors of a block that differ from the file.

    Raises:
        CheckpointFormatError: a file is missing or damaged, or the configuration is not of this format.
    """
    config = read_json(directory / "config.json")
    if "quantization_config" not in config:
        raise CheckpointFormatError(f"{directory} is not quantized: its config.json has no quantization_config")
    scheme, ignore = scheme_of(config["quantization_config"]), set(config["quantization_config"]["ignore"])
    files = WeightFiles(find_weight_files(directory))
    problems = [
        *_index_problems(directory, files),
        *_inventory_problems(files, source, scheme, ignore),
        *_fused_problems(source, ignore),
    ]
    count, comparison = 0, Comparison(problems=tuple(problems))
    for index, block in blocks:
        count, comparison = count + 1, comparison + compare_block(files, block, index, source, scheme)
    return Verification(
        blocks=count,
        compared_codes=comparison.compared_codes,
        differing_codes=comparison.differing_codes,
        problems=comparison.problems,
    )


def _index_problems(directory: Path, files: WeightFiles) -> list[str]:
    """Compare the index with the files: every tensor once, in the file that the index names."""
    path = directory / INDEX_NAME
    if not path.is_file():
        return []
    weight_map = read_json(path)["weight_map"]
    stored = {name: info.file.name for name, info in files.tensors.items()}
    wrong = sorted(name for name in weight_map.keys() | stored.keys() if weight_map.get(name) != stored.get(name))
    twice = [
        name for name, times in Counter(name for file in files.files for name in read_header(file)).items() if times > 1
    ]
    problems = [f"the index and the files disagree on {some_of(wrong)}"] if wrong else []
    return problems + ([f"more than one file holds {some_of(twice)}"] if twice else [])


def _inventory_problems(files: WeightFiles, source: ModelSource, scheme: QuantScheme, ignore: set[str]) -> list[str]:
    """Every tensor of the source must be there, as it was or as the quantized set of its layer; and nothing else."""
    quantized = {rename(name, source) for name in source.linear_shapes() if name not in ignore}
    shapes = {rename(name, source): shape for name, shape in source.shapes.items()}
    expected = {name for name in shapes if name.removesuffix(".weight") not in quantized}
    expected |= {f"{name}.{suffix}" for name in quantized for suffix in expected_suffixes(scheme)}
    missing, unknown = sorted(expected - files.tensors.keys()), sorted(files.tensors.keys() - expected)
    problems = [f"{len(missing)} tensors are missing: {some_of(missing)}"] if missing else []
    problems += [f"{len(unknown)} tensors are not of this model: {some_of(unknown)}"] if unknown else []
    for name in sorted(expected & shapes.keys() & files.tensors.keys()):
        if files.tensors[name].shape != shapes[name]:
            problems.append(f"{name} has shape {files.tensors[name].shape}, the source has {shapes[name]}")
    for name in sorted(quantized):
        stored = [
            files.tensors[f"{name}.{suffix}"]
            for suffix in expected_suffixes(scheme)
            if f"{name}.{suffix}" in files.tensors
        ]
        needed = packed_linear_bytes(_linear_shape(shapes, name), scheme, source.storage_dtype.itemsize)
        if len(stored) == len(expected_suffixes(scheme)) and sum(info.num_bytes for info in stored) != needed:
            problems.append(
                f"{name} takes {sum(info.num_bytes for info in stored)} bytes, its shape and scheme need {needed}"
            )
    return problems


def _linear_shape(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    rows, columns = shapes[f"{name}.weight"]
    return rows, columns


def _fused_problems(source: ModelSource, ignore: set[str]) -> list[str]:
    """Layers that servers fuse must be quantized together or not at all."""
    groups = source.spec.fused_groups(source.linear_shapes())
    return [
        f"servers fuse {', '.join(group)}, but only some of them are quantized"
        for group in groups
        if 0 < len(ignore.intersection(group)) < len(group)
    ]
