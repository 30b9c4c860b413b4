"""A training batch in parts: of like lengths where padding costs more than a pass, smaller when memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from qrealign.data.batching import is_out_of_memory
from qrealign.errors import DeviceError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Batch = TypeVar("Batch", bound="Sliceable")


class Sliceable(Protocol):
    """A sequence or a tensor: it has a length, and slices of it are of its own kind."""

    def __len__(self) -> int: ...

    def __getitem__(self: Batch, part: slice, /) -> Batch: ...


class Parts:
    """Runs batches in parts of at most `size` items, which stays at what has been found to fit.

    Args:
        size: items of the first attempt.
        reset: forgets what a failed attempt has added to the gradients.
        split: divides a batch first, where that is worth it; None leaves it whole.
    """

    def __init__(
        self, size: int, reset: Callable[[], None], split: Callable[[Any], Sequence[Any]] | None = None
    ) -> None:
        self.size = size
        self.reset = reset
        self.split = split

    def run(self, work: Callable[[Batch], Result], items: Batch) -> list[Result]:
        """Return what `work` makes of each part of `items`, in order.

        Raises:
            DeviceError: a single item does not fit.
        """
        while True:
            try:
                return [
                    work(group[start : start + self.size])
                    for group in ([items] if self.split is None else self.split(items))
                    for start in range(0, len(group), self.size)
                ]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve()

    def _halve(self) -> None:
        self.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.size == 1:
            raise DeviceError(
                "the memory does not hold one calibration prompt: use a larger device, --engine blockwise or a shorter "
                "--sequence-length"
            )
        self.size //= 2
        logger.warning("out of memory: going on with parts of %d prompts, the same result in more time", self.size)
