"""Work in batches, of like lengths and smaller when memory runs out, and their way to the device."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from qrealign.errors import DeviceError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_batches(
    work: Callable[[Sequence[Item]], Result], items: Sequence[Item], batch_size: int
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Yield each batch of `items` with what `work` makes of it, halving the batch whenever memory runs out.

    Raises:
        DeviceError: one item alone does not fit.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + batch_size]
        result = _try(work, batch)
        if result is None:
            if len(batch) == 1:
                raise DeviceError(
                    "the memory does not hold a single prompt: "
                    "use a larger device, a shorter sequence length or a smaller model"
                )
            batch_size = len(batch) // 2
            logger.warning("out of memory: going on with batches of %d", batch_size)
            continue
        yield batch, result[0]
        start += len(batch)


def by_length(
    items: Sequence[Item], lengths: Sequence[int], overhead: int, most: int | None = None
) -> list[list[Item]]:
    """Divide sequences into groups of like lengths, so that padding and passes together cost least.

    A group costs its number of sequences times its longest, and `overhead`.

    Args:
        items: what is divided.
        lengths: tokens of each.
        overhead: what one more pass costs, in tokens.
        most: most items of a group; None sets no limit.

    Returns:
        The groups, those of short sequences first, each in ascending order of length.
    """
    order = sorted(range(len(items)), key=lengths.__getitem__)
    best, start_of = [0], [0]  # of the sequences before each place: least cost, and where its last group starts
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        starts = range(0 if most is None else max(0, stop - most), stop)
        costs = [best[start] + (stop - start) * longest + overhead for start in starts]
        least = min(range(len(costs)), key=costs.__getitem__)
        start_of.append(starts[least])
        best.append(costs[least])
    groups, stop = [], len(order)
    while stop:
        groups.append([items[index] for index in order[start_of[stop] : stop]])
        stop = start_of[stop]
    return groups[::-1]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on `device`; a GPU fetches it from pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that device or host memory ran out."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in message or "can't allocate memory" in message or "not enough memory" in message)
    )


def _try(work: Callable[[Sequence[Item]], Result], batch: Sequence[Item]) -> tuple[Result] | None:
    """Return the result in a tuple, or None when memory ran out. The failed attempt's tensors are freed by then."""
    try:
        return (work(batch),)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
