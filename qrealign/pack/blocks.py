"""One block as the tensors of a checkpoint, and the comparison of a block with what a file holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qrealign.config import QuantScheme
from qrealign.models.checkpoint import WeightFiles
from qrealign.pack.format import linear_of, tensors_of
from qrealign.quant.packed import QuantizedLinear

if TYPE_CHECKING:
    from qrealign.models.source import ModelSource

MOST_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What comparing blocks with a file has shown: codes and zero points that differ, and tensors by name."""

    compared_codes: int = 0
    differing_codes: int = 0
    problems: tuple[str, ...] = ()

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            compared_codes=self.compared_codes + other.compared_codes,
            differing_codes=self.differing_codes + other.differing_codes,
            problems=self.problems + other.problems,
        )


def rename(name: str, source: ModelSource) -> str:
    """Return the name that the source's checkpoint family gives to a tensor."""
    for ours, theirs in source.spec.renames:
        name = name.replace(ours, theirs)
    return name


def as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the checkpoint's floating dtype; integers stay what they are."""
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()


def block_tensors(block: nn.Module, index: int, source: ModelSource, scheme: QuantScheme) -> dict[str, Tensor]:
    """Return the stored tensors of block `index` by their full name in the checkpoint.

    Args:
        block: quantized linears are `QuantizedLinear`; any other parameter or buffer is stored in the source's dtype.
        index: its position.
        source: gives names and dtype.
        scheme: the recipe that every quantized linear must have.

    Raises:
        ValueError: a linear has another recipe, or a scale is not representable in the source's dtype.
    """
    dtype = source.storage_dtype
    linears = {name: module for name, module in block.named_modules() if isinstance(module, QuantizedLinear)}
    tensors: dict[str, Tensor] = {}
    for name, linear in linears.items():
        if (linear.scheme.weights, linear.scheme.activations) != (scheme.weights, scheme.activations):
            raise ValueError(
                f"{name} is quantized as {linear.scheme}, the checkpoint as {scheme}: servers need one recipe"
            )
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors_of(linear, dtype).items()})
    for name, tensor in block.state_dict().items():
        if name.rpartition(".")[0] not in linears:
            tensors[name] = as_stored(tensor, dtype)
    prefix = source.spec.block_name(index)
    return {rename(f"{prefix}.{name}", source): tensor for name, tensor in tensors.items()}


def compare_block(
    files: WeightFiles, block: nn.Module, index: int, source: ModelSource, scheme: QuantScheme
) -> Comparison:
    """Compare block `index` with a file: every code after unpacking, and every tensor bit for bit."""
    expected = block_tensors(block, index, source, scheme)
    missing = sorted(name for name in expected if name not in files.tensors)
    if missing:
        return Comparison(problems=(f"block {index} is not whole in the file: {some_of(missing)}",))
    stored = files.read(expected)
    compared = differing = 0
    for name, linear in block.named_modules():
        if isinstance(linear, QuantizedLinear):
            prefix = rename(f"{source.spec.block_name(index)}.{name}.", source)
            parts = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
            loaded = linear_of(parts, scheme)
            compared += linear.codes.numel()
            differing += _count_differing(linear.codes, loaded.codes)
            differing += _count_differing(linear.zero_point, loaded.zero_point)
    changed = sorted(name for name, tensor in expected.items() if not torch.equal(stored[name], tensor.cpu()))
    problems = (f"block {index} differs from the file in {some_of(changed)}",) if changed else ()
    return Comparison(compared_codes=compared, differing_codes=differing, problems=problems)


def some_of(names: list[str]) -> str:
    """Return the first few names, for a message."""
    return ", ".join(names[:MOST_NAMES_SHOWN]) + (", ..." if len(names) > MOST_NAMES_SHOWN else "")


def _count_differing(ours: Tensor | None, theirs: Tensor | None) -> int:
    if ours is None or theirs is None:
        return 0 if ours is theirs else 1
    if ours.shape != theirs.shape:
        return ours.numel()
    return int((ours.cpu() != theirs).sum())
