"""Moving tensors into and out of modules whose parameters start on the meta device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Contents = dict[nn.Module, tuple[dict[str, nn.Module | None], dict[str, nn.Parameter | None], dict[str, Tensor | None]]]


def assign_tensor(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where `root` holds the parameter or buffer called `name`; a parameter keeps its `requires_grad`."""
    parent_name, _, leaf = name.rpartition(".")
    module = root.get_submodule(parent_name)
    old = module._parameters.get(leaf)
    if old is not None:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        raise KeyError(f"{type(root).__name__} holds no tensor called {name}")


def assign_tensors(
    root: nn.Module, state: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype | None
) -> None:
    """Put every tensor of `state` on `device` and into `root`; floating-point ones are cast to `dtype`, if given."""
    for name, tensor in state.items():
        moved = tensor.to(device)
        assign_tensor(root, name, moved.to(dtype) if dtype is not None and moved.is_floating_point() else moved)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `root` holds the submodule called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def move_buffers(root: nn.Module, device: torch.device | str) -> None:
    """Move the buffers that hold data (rotary frequencies and the like) to `device`."""
    for module in root.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer.to(device)


def release_weights(root: nn.Module) -> None:
    """Move every parameter that needs no gradient to the meta device; trainable parameters and buffers stay."""
    for module in root.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def save_contents(root: nn.Module) -> Contents:
    """Return what `root` and its submodules hold: their children, parameters and buffers, by reference."""
    return {
        module: (dict(module._modules), dict(module._parameters), dict(module._buffers)) for module in root.modules()
    }


def restore_contents(contents: Contents) -> None:
    """Put back what `save_contents` gave; tensors and modules that came since are dropped."""
    for module, (children, parameters, buffers) in contents.items():
        module._modules.clear()
        module._modules.update(children)
        module._parameters.clear()
        module._parameters.update(parameters)
        module._buffers.clear()
        module._buffers.update(buffers)
