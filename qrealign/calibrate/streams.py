"""Activation streams of the block-wise engine: what enters the next block in each model, kept on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qrealign.data.capture import run_block, select_rows


@dataclass(kw_only=True)
class Inputs:
    """The calibration samples as the blocks see them.

    `mask` `[N, T]` is 1 at real tokens; `last_index` `[N]` is each prompt's last real position; `malicious` `[N]` bool;
    `kwargs` holds, per block, the keyword arguments that Hugging Face's own forward passes it, batched over N, on the
    device.
    """

    mask: Tensor
    last_index: Tensor
    malicious: Tensor
    kwargs: Sequence[dict[str, Any]]

    def kwargs_of(self, block: int, rows: Tensor) -> dict[str, Any]:
        """Return block `block`'s arguments for some samples."""
        return select_rows(self.kwargs[block], rows, len(self.mask))


@torch.no_grad()
def advance(
    block: nn.Module, index: int, stream: Tensor, inputs: Inputs, *, rows: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Return the stream after the block, `[N, T, H]` on the host; only `rows` are computed, the others stay."""
    result = stream.clone()
    for chunk in rows.split(batch_size):
        result[chunk] = run_block(block, stream[chunk].to(device), inputs.kwargs_of(index, chunk)).cpu()
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
