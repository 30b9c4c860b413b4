"""Reads the next block from disk while the present one is worked on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from qrealign.models.source import ModelSource


class BlockReader:
    """Gives a model's blocks one after the other, each read ahead in a thread.

    Args:
        source: the model.
        device: where blocks go; for a GPU they wait in page-locked memory, from which copies run beside kernels.
        dtype: floating-point dtype of their tensors there, None for the stored one.

    Use it as a context manager: leaving it ends the thread.
    """

    def __init__(self, source: ModelSource, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="block-reader")
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    def load(self, model: nn.Module, index: int) -> nn.Module:
        """Put block `index` into `model`, return it, and begin to read the one after it."""
        ahead = self._ahead.pop(index, None)
        state = self._read(index) if ahead is None else ahead.result()
        self._forget()
        if index + 1 < self.source.num_blocks:
            self._ahead[index + 1] = self._thread.submit(self._read, index + 1)
        return self.source.load_block(model, index, self.device, self.dtype, state=state)

    def _read(self, index: int) -> dict[str, Tensor]:
        state = self.source.block_state(index)
        return {name: tensor.pin_memory() for name, tensor in state.items()} if self.device.type == "cuda" else state

    def _forget(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()
        self._thread.shutdown()
