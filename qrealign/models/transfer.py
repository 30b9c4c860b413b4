"""Blocks of weights on their way to a GPU: read by threads into pinned memory, copied on a stream of their own."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qrealign.errors import DeviceError
from qrealign.models.device import available_host_bytes

if TYPE_CHECKING:
    from qrealign.models.source import ModelSource

READERS = 4  # threads that fill pinned memory: one copies about 5 GB/s, a bus takes 15 to 55
PINNED_SHARE = 0.6  # of the available host memory
_ALIGNMENT = 256  # bytes, as torch's own allocator


@dataclass(frozen=True)
class BlockLayout:
    """Where each tensor of a block stands in one flat buffer: name -> (first byte, shape, dtype)."""

    places: Mapping[str, tuple[int, tuple[int, ...], torch.dtype]]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> BlockLayout:
        """Lay tensors, given as name -> (shape, dtype), one behind the other."""
        places, end = {}, 0
        for name, (shape, dtype) in tensors.items():
            places[name] = (end, shape, dtype)
            size = math.prod(shape) * dtype.itemsize
            end += math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        return cls(places, end)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors in a flat uint8 buffer of at least `num_bytes`, which they share."""
        return {
            name: buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (start, shape, dtype) in self.places.items()
        }


class PinnedBuffer:
    """Host memory that a GPU reads by itself, of exactly the size asked for; plain memory for any other device."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8)
        self._unpin: Callable[[], object] = lambda: None
        if device.type != "cuda":
            return
        address, runtime = self.bytes.data_ptr(), torch.cuda.cudart()
        if int(runtime.cudaHostRegister(address, num_bytes, 0)) != 0:
            raise DeviceError(
                f"{num_bytes / 2**30:.2f} GiB of host memory could not be pinned: raise the limit of locked memory "
                "(ulimit -l), or use --memory resident on a larger device"
            )
        self._unpin = weakref.finalize(self, runtime.cudaHostUnregister, address)

    def release(self) -> None:
        """Unpin the memory, which else happens when it goes; calling it twice is harmless."""
        self._unpin()


class HostBlocks:
    """The blocks of a model in host memory, read ahead by threads.

    Args:
        source: the model.
        dtype: floating-point dtype of the tensors.
        device: where they will go.
        kept: blocks that stay in host memory once read; all others share a few buffers and are read anew for each use.
    """

    def __init__(
        self, source: ModelSource, dtype: torch.dtype, device: torch.device, *, kept: Iterable[int] = ()
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.kept: set[int] = set()
        self.layouts = [source.block_layout(index, dtype) for index in range(source.num_blocks)]
        self.largest = max(layout.num_bytes for layout in self.layouts)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-blocks")
        self._fixed: dict[int, Future[PinnedBuffer]] = {}
        self._merged: set[int] = set()  # blocks that stay and hold the changes
        self._moving: dict[int, Future[PinnedBuffer]] = {}
        self._free: list[PinnedBuffer] = []
        self._all: list[PinnedBuffer] = []
        self._lock = threading.Lock()
        self.keep(kept)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the blocks that stay."""
        return sum(self.layouts[index].num_bytes for index in self.kept)

    def keep(self, indices: Iterable[int]) -> None:
        """Have further blocks stay, which are read at once; none may be on its way."""
        new = sorted(set(indices) - self.kept)
        self.kept.update(new)
        for index in new:
            self._fixed[index] = self._pool.submit(self._fill, index)

    def become(self, source: ModelSource) -> bool:
        """Serve another model, if only changes of the weights lie between this one and that; return whether they do."""
        if source.fingerprint() == self.source.fingerprint():
            return True
        if not self.source.becomes(source, self.dtype):
            return False
        self.source = source
        self._merged.clear()
        return True

    def request(self, index: int) -> Future[PinnedBuffer]:
        """Return the buffer of a block, filled when the future is done; `hand_back` it after use."""
        if index in self._fixed:
            return self._fixed[index]
        with self._lock:
            if index not in self._moving:
                self._moving[index] = self._pool.submit(self._fill, index)
            return self._moving[index]

    def put(self, index: int, target: Tensor) -> None:
        """Queue the copy of a block into a flat uint8 tensor on the current stream, changes merged.

        A block that stays is merged on its first way and written back: reading an adapter and merging it takes the host
        longer than the bus takes for the block. All copies of one block must be queued on one stream.
        """
        buffer, layout = self.request(index).result(), self.layouts[index]
        held, sent = buffer.bytes[: layout.num_bytes], target[: layout.num_bytes]
        sent.copy_(held, non_blocking=True)
        if index not in self._merged:
            changed = self.source.merge_block(index, layout.views(target))
            if index in self._fixed:
                if changed:
                    held.copy_(sent, non_blocking=True)
                self._merged.add(index)
        if index not in self._fixed:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # before the buffer is filled anew
            self.hand_back(index, buffer)

    def hand_back(self, index: int, buffer: PinnedBuffer) -> None:
        """Allow the buffer of a block that is not kept to be filled with another one."""
        with self._lock:
            if index not in self._fixed and self._moving.pop(index, None) is not None:
                self._free.append(buffer)

    def close(self) -> None:
        """Wait for the readers and give the memory back."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for buffer in self._all:
            buffer.release()
        self._all, self._free, self._fixed, self._moving = [], [], {}, {}

    def _fill(self, index: int) -> PinnedBuffer:
        """Read a block into a buffer."""
        with self._lock:
            buffer = self._free.pop() if self._free and index not in self.kept else None
        if buffer is None:
            size = self.layouts[index].num_bytes if index in self.kept else self.largest
            buffer = PinnedBuffer(size, self.device)
            with self._lock:
                self._all.append(buffer)
        state = self.source.unmerged_block(index, self.dtype)
        for name, view in self.layouts[index].views(buffer.bytes).items():
            view.copy_(state[name])
        return buffer


class _Slot:
    """Device memory for one block: which one it holds, or is about to."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.index = -1
        self.arrival: Future[torch.cuda.Event | None] | None = None


class BlockStream:
    """The blocks of a model that stay on the device, and two that come and go: the one that runs, and the next one.

    While blocks run, the next one that has to come is copied on a stream of its own. Which one that is follows from the
    walk: up in a forward pass, down when a backward pass recomputes, and from the last block back to the first one or,
    with gradients enabled, down.

    Args:
        host: where the blocks come from.
        device: where they go; a CPU gets copies too, without a stream.
        held: blocks that stay on the device once they have come.
    """

    def __init__(self, host: HostBlocks, device: torch.device, *, held: Iterable[int] = ()) -> None:
        self.host, self.device = host, device
        self._held: dict[int, Tensor | None] = dict.fromkeys(held)
        self._coming = [index for index in range(len(host.layouts)) if index not in self._held]
        self._slots = [_Slot(host.largest, device) for _ in range(min(2, len(self._coming)))]
        self._feeder = ThreadPoolExecutor(1, thread_name_prefix="feed-device")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last = -1

    def acquire(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of block `index`, valid until the block after the next is acquired.

        Work on all other blocks must have been queued on the current stream.
        """
        if index in self._held:
            return self.host.layouts[index].views(self._hold(index))
        slot = next((slot for slot in self._slots if slot.index == index), None)
        if slot is None:
            slot = next(slot for slot in self._slots if slot.index != self._last or self._last < 0)
            self._send(index, slot)
        assert slot.arrival is not None
        arrived = slot.arrival.result()
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        following = self._following(index)
        self._last = index
        if all(other.index != following for other in self._slots):
            self._send(following, next(other for other in self._slots if other is not slot))
        return self.host.layouts[index].views(slot.bytes)

    def close(self) -> None:
        """Wait for what is on its way and free the memory; the host's buffers too."""
        self.detach().close()

    def detach(self) -> HostBlocks:
        """Wait for what is on its way, free the device's memory and return the host's blocks, for another stream."""
        self._feeder.shutdown(wait=True)
        if self._stream is not None:
            self._stream.synchronize()
        self._slots, self._held = [], {}
        return self.host

    def _hold(self, index: int) -> Tensor:
        """Return the memory of a block that stays, brought at its first use."""
        held = self._held[index]
        if held is None:
            held = torch.empty(self.host.layouts[index].num_bytes, dtype=torch.uint8, device=self.device)
            self.host.put(index, held)
            self._held[index] = held
        return held

    def _following(self, index: int) -> int:
        """Return the block that has to come next, apart from this one."""
        place, last = self._coming.index(index), len(self._coming) - 1
        down = index < self._last or (index == self._last and place == last)
        if last == 0:
            following = 0
        elif down:
            following = place - 1 if place else 1
        elif place < last:
            following = place + 1
        else:
            following = last - 1 if torch.is_grad_enabled() else 0
        return self._coming[following]

    def _send(self, index: int, slot: _Slot) -> None:
        """Start copying a block into a slot, once the work queued so far has left it."""
        free = torch.cuda.current_stream(self.device).record_event() if self._stream is not None else None
        self.host.request(index)  # before the feeder hands it back: behind that, it would be read once more for nothing
        slot.index, slot.arrival = index, self._feeder.submit(self._copy, index, slot, free)

    @torch.no_grad()
    def _copy(self, index: int, slot: _Slot, free: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Queue the copy of a block into a slot; runs in the feeder's thread."""
        if self._stream is None or free is None:
            self.host.put(index, slot.bytes)
            return None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            self.host.put(index, slot.bytes)
            return self._stream.record_event()


def read_blocks(
    source: ModelSource, device: torch.device, dtype: torch.dtype, *, start: int = 0, ahead: int = READERS
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield index and tensors of every block from `start` on, in device memory of their own, in order.

    `ahead` blocks are being read while one is used.
    """
    host, count = HostBlocks(source, dtype, device), source.num_blocks
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    try:
        for index in range(start, min(start + ahead, count)):
            host.request(index)
        for index in range(start, count):
            target = torch.empty(host.layouts[index].num_bytes, dtype=torch.uint8, device=device)
            if stream is None:
                host.put(index, target)
            else:
                stream.wait_stream(torch.cuda.current_stream(device))  # it may still use what the memory held before
                with torch.cuda.stream(stream):
                    host.put(index, target)
            if index + ahead < count:
                host.request(index + ahead)
            yield index, host.layouts[index].views(target)
    finally:
        host.close()


def open_stream(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    *,
    held_bytes: float = 0.0,
    pin: bool = True,
    host: HostBlocks | None = None,
) -> BlockStream:
    """Return a stream of a model's blocks, some of which stay on the device.

    Args:
        source: the model.
        dtype: floating-point dtype of the tensors.
        device: where they go.
        held_bytes: what the blocks that stay may take; they are spread evenly, so that copies have time between them.
        pin: keep the others in pinned host memory, as far as `PINNED_SHARE` of what is available goes.
        host: blocks that nobody uses any more, which are taken over where the model is of the same files and else given
            back: locking and filling their memory takes as long as some ten passes.
    """
    if host is not None and not host.become(source):
        host.close()
        host = None
    sizes = [source.block_layout(index, dtype).num_bytes for index in range(source.num_blocks)]
    count = min(len(sizes), int(held_bytes / max(sizes)))
    held = {int((place + 0.5) * len(sizes) / count) for place in range(count)}
    present = 0 if host is None else host.kept_bytes
    left = PINNED_SHARE * (available_host_bytes() + present) if pin else 0.0
    coming = [index for index in range(len(sizes)) if index not in held]
    totals = itertools.accumulate(sizes[index] for index in coming)
    kept = [index for index, total in zip(coming, totals, strict=True) if total <= left]
    if host is None:
        host = HostBlocks(source, dtype, device)
    host.keep(kept)
    return BlockStream(host, device, held=held)
