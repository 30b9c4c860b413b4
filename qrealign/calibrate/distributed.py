"""Data-parallel calibration: the processes that torchrun starts share the samples of every step.

Each process holds the whole problem, takes its share of a batch and adds its gradients to the others'; the parameters
are tiny, so one small sum is all that is exchanged. The first process alone writes, prints and evaluates.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qrealign.errors import DeviceError

Item = TypeVar("Item")
# The others wait while the first process asks the teachers, which may take hours; torchrun itself ends a run of which
# a process has died.
PATIENCE = timedelta(days=1)
POLL_SECONDS = 1e-4


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes of a run, seen from one of them: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes, prints and evaluates."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of a batch; the parts' lengths differ by one at most."""
        return items[self.rank :: self.size]

    def add(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all processes, in place, and return it.

        Raises:
            DeviceError: a process of the run has ended.
        """
        if self.size > 1:
            with _explained():
                dist.all_reduce(tensor)
        return tensor

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every parameter's gradient by its sum over all processes: one exchange for all of them.

        A gradient that is None counts as zeros, because a process may have no sample that reaches the parameter.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in parameters])
        self.add(flat)
        for parameter, part in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
            parameter.grad = part.reshape(parameter.shape)

    def keep_largest(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace each element by the largest that any process has, in place; all have tensors of the same shapes."""
        if self.size > 1:
            with _explained():
                for name in sorted(tensors):
                    dist.all_reduce(tensors[name], op=dist.ReduceOp.MAX)

    def add_named(self, rows: list[dict[str, float]], names: Sequence[str]) -> list[dict[str, float]]:
        """Return rows of named numbers added over all processes, which need not have the same of the `names`."""
        if self.size == 1:
            return rows
        table = torch.zeros(2, len(rows), len(names), dtype=torch.float64)  # values, and how many processes have them
        for place, row in enumerate(rows):
            for name, value in row.items():
                table[:, place, names.index(name)] = torch.tensor([value, 1.0])
        values, counts = self.add(table).tolist()
        return [
            {name: value for name, value, count in zip(names, *row, strict=True) if count}
            for row in zip(values, counts, strict=True)
        ]

    def wait(self) -> None:
        """Return when every process has come here.

        Raises:
            DeviceError: a process of the run has ended.
        """
        self.add(torch.zeros(1))

    def finish(self, device: torch.device) -> None:
        """Return when the device has done its work.

        Polls where other processes may have died: a wait inside the driver would hold back the signal that says so.
        """
        if self.size == 1 or device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        while not done.query():
            time.sleep(POLL_SECONDS)


ALONE = Team()


def _gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, zeros where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what torch raises when a peer is gone into a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(
            "another process of this run has ended, or cannot be reached: the same command continues where the run "
            "stopped"
        ) from error


@contextlib.contextmanager
def joined_team() -> Iterator[Team]:
    """Join the processes that torchrun has started, and leave them at the end; a process of its own is a team of one.

    Gradients on GPUs are added by NCCL, on CPUs by gloo.

    Raises:
        DeviceError: the processes do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's own variable
    if size == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _explained():
        dist.init_process_group(backend, timeout=PATIENCE)
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
        with _explained():
            dist.all_reduce(torch.zeros(1, device="cuda"))  # connects the GPUs now, not within the first step
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield Team(rank=dist.get_rank(), size=size)
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _end(number: int, frame: FrameType | None) -> None:
    """End this process with a sentence when torchrun ends the run."""
    raise DeviceError(
        "the run was told to end, as it is when another of its processes has died: the same command continues where "
        "it stopped"
    )


def local_device(device: torch.device) -> torch.device:
    """Return the GPU that this process takes where a team has been joined and `device` names none of them."""
    if device.type != "cuda" or device.index is not None or not (dist.is_available() and dist.is_initialized()):
        return device
    return torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
