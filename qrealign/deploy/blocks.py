"""A block of a packed checkpoint into Hugging Face's own block, with as few products and launches as its table row
allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from qrealign.arch import BlockSpec
from qrealign.config import QuantScheme
from qrealign.deploy.layers import GatedMLP, JoinedLinears, JoinedPart, MovedNorm, NormQuantizer, PackedLinear
from qrealign.errors import CheckpointFormatError
from qrealign.models.placement import assign_tensors, move_buffers, replace_module
from qrealign.pack.blocks import rename
from qrealign.pack.format import QUANTIZED_SUFFIXES, read_linear
from qrealign_kernels import repack_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qrealign.pack.source import PackedSource

_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # children of an MLP that is down(act(gate(x)) * up(x))
_SILU = ("SiLU", "SiLUActivation")  # torch's and transformers' own


def deploy_block(
    model: PreTrainedModel, source: PackedSource, index: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Fill block `index` of a skeleton: its quantized linears become packed products, one group at a time.

    Args:
        model: a skeleton of `source`.
        source: the packed checkpoint.
        index: which block.
        device: where the weights are unpacked and laid out anew for the device's kernels.
        dtype: of everything that is not packed.

    Raises:
        CheckpointFormatError: a layer's tensors are missing or contradict each other.
    """
    prefix = source.spec.block_name(index)
    block = model.get_submodule(prefix)
    linears = [name.removeprefix(f"{prefix}.") for name in source.schemes if name.startswith(f"{prefix}.")]
    wanted = [name for name in block.state_dict() if name.rpartition(".")[0] not in linears]
    for group in _groups(linears, source, prefix):
        _install(block, group, [_read(source, f"{prefix}.{name}", device) for name in group], dtype)
    stored = {name: source.stored_names[f"{prefix}.{name}"] for name in wanted}
    state = source.files.read(stored.values())
    assign_tensors(block, {name: state[file_name] for name, file_name in stored.items()}, device, dtype)
    move_buffers(block, device)
    if source.spec.known:
        _move_norms(block, source.spec)
        _join_gates(block, source.spec)
    return block


def _groups(linears: Sequence[str], source: PackedSource, prefix: str) -> list[tuple[str, ...]]:
    """Return the linears of a block in the groups that become one product each."""
    joined = source.spec.fused_groups(linears) if source.spec.known else []
    joined = [group for group in joined if _can_join([f"{prefix}.{name}" for name in group], source)]
    taken = {name for group in joined for name in group}
    return joined + [(name,) for name in linears if name not in taken]


def _can_join(names: Sequence[str], source: PackedSource) -> bool:
    """Tell whether linears have one scheme and input width, and their columns lie in the order of the groups."""
    shapes = source.linear_shapes()
    first = source.schemes[names[0]]
    return all(
        (source.schemes[name].weights, source.schemes[name].activations) == (first.weights, first.activations)
        and shapes[name][1] == shapes[names[0]][1]
        and f"{rename(name, source)}.weight_g_idx" not in source.files.tensors
        for name in names
    )


class _Linear(NamedTuple):
    """A linear on its way from the file to a product: what `StoredLinear` holds, its columns in the order of groups."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    column_order: Tensor | None
    scheme: QuantScheme


def _read(source: PackedSource, name: str, device: torch.device) -> _Linear:
    """Return a linear of the file, unpacked on the device."""
    stored = rename(name, source)
    found = {suffix: f"{stored}.{suffix}" for suffix in (*QUANTIZED_SUFFIXES, "bias")}
    found = {suffix: file_name for suffix, file_name in found.items() if file_name in source.files.tensors}
    tensors = source.files.read(found.values())
    scheme = source.schemes[name]
    linear = read_linear({suffix: tensors[file_name].to(device) for suffix, file_name in found.items()}, scheme)
    if linear.codes.shape != source.linear_shapes()[name]:
        raise CheckpointFormatError(
            f"{source.path}: layer {stored} is {tuple(linear.codes.shape)}, but config.json calls for "
            f"{source.linear_shapes()[name]}: weights and config.json are of different models"
        )
    order = None
    codes = linear.codes
    if linear.column_group is not None:
        counts = torch.bincount(linear.column_group, minlength=linear.scale.shape[1]).tolist()
        if counts != [scheme.weights.group_size] * linear.scale.shape[1]:
            raise CheckpointFormatError(f"{source.path}: layer {stored} has groups of unequal size: copy it again")
        order = torch.argsort(linear.column_group, stable=True)
        codes = codes[:, order]
    return _Linear(codes, linear.scale, linear.zero_point, linear.bias, order, scheme)


def _install(block: nn.Module, names: Sequence[str], linears: Sequence[_Linear], dtype: torch.dtype) -> None:
    """Put linears of one input in the places `names` of a block, as one product."""
    zero_points = [linear.zero_point for linear in linears if linear.zero_point is not None]
    scheme = linears[0].scheme
    weight = repack_weight(
        torch.cat([linear.codes for linear in linears]),
        torch.cat([linear.scale for linear in linears]),
        torch.cat(zero_points) if zero_points else None,
        num_bits=scheme.weights.num_bits,
        activation_bits=None if scheme.activations is None else scheme.activations.num_bits,
    )
    bias = _join_biases(linears, dtype)
    if len(names) == 1:
        replace_module(block, names[0], PackedLinear(weight, bias, linears[0].column_order))
        return
    joined = JoinedLinears(weight, bias, sizes=tuple(len(linear.codes) for linear in linears))
    for index, name in enumerate(names):
        replace_module(block, name, JoinedPart(joined, index))


def _join_biases(linears: Sequence[_Linear], dtype: torch.dtype) -> Tensor | None:
    """Return the biases one behind the other, zeros where a linear has none; None where none has."""
    if all(linear.bias is None for linear in linears):
        return None
    biases = [
        linear.codes.new_zeros(len(linear.codes), dtype=dtype) if linear.bias is None else linear.bias
        for linear in linears
    ]
    return torch.cat([bias.to(dtype) for bias in biases])


def _move_norms(block: nn.Module, spec: BlockSpec) -> None:
    """Move every RMS norm that feeds a single quantizing product, and nothing else, into that product.

    A fold site says which linears read a norm's output: all that do, or its scales would change another output.
    """
    for site in spec.sites:
        if not site.name.startswith("norm_to_"):
            continue
        norm, product = _find(block, site.producer), _product_of([_find(block, name) for name in site.consumers])
        if product is None or product.weight.activation_bits is None or product.column_order is not None:
            continue
        if norm is None or (eps := rms_norm_eps(norm)) is None:
            continue
        weight, bits = norm.get_parameter("weight"), product.weight.activation_bits
        product.norm = NormQuantizer(weight, eps, offset=float(spec.norm_weight_offset), num_bits=bits)
        replace_module(block, site.producer, MovedNorm(product))


def rms_norm_eps(norm: nn.Module) -> float | None:
    """Return what a Hugging Face RMS norm adds to the mean square, None where the module is no such norm."""
    eps: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if type(norm).__name__.endswith("RMSNorm") else None


def _join_gates(block: nn.Module, spec: BlockSpec) -> None:
    """Replace the gated MLPs over joined linears, where their activation is SiLU."""
    for site in spec.sites:
        name, _, leaf = site.producer.rpartition(".")
        if site.name != "up_to_down" or leaf != "up_proj" or (mlp := _find(block, name)) is None:
            continue
        children = dict(mlp.named_children())
        if children.keys() != _GATED or type(children["act_fn"]).__name__ not in _SILU:
            continue
        down, gate_up = children["down_proj"], _product_of([children["gate_proj"], children["up_proj"]])
        if isinstance(gate_up, JoinedLinears) and isinstance(down, PackedLinear):
            replace_module(block, name, GatedMLP(gate_up, down))


def _find(block: nn.Module, name: str) -> nn.Module | None:
    """Return a submodule by name, None where the block has none."""
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _product_of(modules: Sequence[nn.Module | None]) -> PackedLinear | None:
    """Return the one product that all of `modules`, and no others, stand for; None if there is no such product."""
    if len(modules) == 1 and isinstance(modules[0], PackedLinear):
        return modules[0]
    parts = [module for module in modules if isinstance(module, JoinedPart)]
    whole = len(parts) == len(modules) and all(part.joined is parts[0].joined for part in parts)
    return parts[0].joined if whole and parts and len(parts[0].joined.sizes) == len(parts) else None
