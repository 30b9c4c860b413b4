"""A training batch in parts: when memory runs out the step starts again with parts of half the size."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from qrealign.data.batching import is_out_of_memory
from qrealign.errors import DeviceError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Parts:
    """Runs batches in parts of at most `size` items, which stays at what has been found to fit.

    Args:
        size: items of the first attempt.
        reset: forgets what a failed attempt has added to the gradients.
    """

    def __init__(self, size: int, reset: Callable[[], None]) -> None:
        self.size = size
        self.reset = reset

    def run(self, work: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
        """Return what `work` makes of each part of `items`, in order.

        Raises:
            DeviceError: a single item does not fit.
        """
        while True:
            try:
                return [work(items[start : start + self.size]) for start in range(0, len(items), self.size)]
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
