"""Activation streams of the block-wise engine: what enters the next block in each model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qrealign.calibrate.distributed import ALONE, Team
from qrealign.data.capture import run_block, select_rows


@dataclass(kw_only=True)
class Inputs:
    """The calibration samples as the blocks see them.

    `mask` `[N, T]` is 1 at real tokens; `last_index` `[N]` is each prompt's last real position; `malicious` `[N]` bool;
    `kwargs` holds, per block, the keyword arguments that Hugging Face's own forward passes it, batched over N.
    Everything is on the device that the blocks run on, so that a step picks its samples there.
    """

    mask: Tensor
    last_index: Tensor
    malicious: Tensor
    kwargs: Sequence[dict[str, Any]]

    def kwargs_of(self, block: int, rows: Tensor) -> dict[str, Any]:
        """Return block `block`'s arguments for some samples."""
        return select_rows(self.kwargs[block], rows, len(self.mask))

    def to(self, device: torch.device) -> Inputs:
        """Return the inputs on a device; block arguments are there already, because the model made them there."""
        tensors = {name: getattr(self, name).to(device) for name in ("mask", "last_index", "malicious")}
        return Inputs(**tensors, kwargs=self.kwargs)


@dataclass(kw_only=True)
class Streams:
    """The hidden states entering the next block, `[N, T, H]`, in each model whose activations are needed."""

    student: Tensor
    finetuned: Tensor
    aligned: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


Place = Callable[[Tensor], Tensor]  # returns a copy of a stream where streams are kept


def stream_place(device: torch.device, dtype: torch.dtype, *, low_memory: bool) -> Place:
    """Return where streams are kept: on the device or, with little memory, in host memory that a GPU reads and writes
    directly."""
    if low_memory and device.type == "cuda":
        return lambda stream: _mapped_copy(stream.to(dtype), device)
    return lambda stream: stream.to(device, dtype, copy=True)


def _mapped_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of `tensor` in page-locked host memory, as a tensor of the GPU, whose kernels reach it there."""
    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    whole = torch.as_tensor(_HostBytes(held), device=device)
    return whole.view(tensor.dtype).view(tensor.shape)


class _HostBytes:
    """Shows page-locked memory as CUDA bytes, and keeps it alive as long as a tensor uses it."""

    def __init__(self, held: Tensor) -> None:
        self.held = held
        size = held.numel() * held.itemsize
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (held.data_ptr(), False),
        }


@torch.no_grad()
def advance(
    block: nn.Module,
    index: int,
    stream: Tensor,
    inputs: Inputs,
    *,
    rows: Tensor,
    batch_size: int,
    place: Place,
    team: Team = ALONE,
) -> Tensor:
    """Return the stream after the block, `[N, T, H]` where `place` keeps it.

    Only `rows` are computed, the others stay. Every process of a team computes some of them, and gets the others'.
    """
    result = place(stream)
    for chunk in rows[team.rank :: team.size].split(batch_size):
        result[chunk] = run_block(block, stream[chunk], inputs.kwargs_of(index, chunk))
    if team.size > 1:
        own = torch.zeros_like(stream)
        own[rows[team.rank :: team.size]] = result[rows[team.rank :: team.size]]
        result[rows] = team.add(own)[rows]
    if result.is_cuda:  # host memory that kernels still read must not be given up, and torch does not know that they do
        torch.cuda.current_stream(result.device).synchronize()
    return result


class InputMaxima:
    """Records the largest magnitude of each input channel of a block's linears while samples run through it."""

    def __init__(self, block: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        self.handles = [
            module.register_forward_pre_hook(self._recorder(name))
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            amax = args[0].detach().abs().flatten(0, -2).amax(dim=0).float()
            self.values[name] = torch.maximum(self.values[name], amax) if name in self.values else amax

        return record

    def __enter__(self) -> InputMaxima:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
