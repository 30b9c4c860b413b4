"""The decode step as a CUDA graph: at few rows the launches of a step take longer than its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, int], Tensor]  # ids [B, 1], positions [B, 1], length -> logits [B, V]

_WARM_UP = 2  # runs before a capture, in which kernels are compiled and workspaces allocated
_SHORTEST = 256  # cells


class DecodeGraphs:
    """Captures the step once for each shape it meets and replays it from then on.

    Rows and cells are rounded up to powers of two, so the shapes are few; a row that only fills up the shape writes
    into the spare cell of its slot.

    Args:
        step: device work alone, without a synchronisation.
        slots: most rows.
        device: a CUDA device.
    """

    def __init__(self, step: Step, slots: int, device: torch.device) -> None:
        self._step = step
        self._slots = slots
        self._ids = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def step(self, tokens: Sequence[int], positions: Sequence[int], length: int, *, spare: int) -> Tensor:
        """Return `[B, V]` logits, overwritten by the next step; `spare` is the cell that filling rows write to."""
        rows = min(_power_of_two(len(tokens)), self._slots)
        cells = min(max(_power_of_two(length), _SHORTEST), spare)
        values = torch.tensor(
            [[*tokens, *[0] * (rows - len(tokens))], [*positions, *[spare] * (rows - len(tokens))]], dtype=torch.int64
        )
        self._ids[:rows, 0].copy_(values[0])
        self._positions[:rows, 0].copy_(values[1])
        if (rows, cells) not in self._graphs:
            self._graphs[rows, cells] = self._capture(rows, cells)
        graph, logits = self._graphs[rows, cells]
        graph.replay()
        return logits[: len(tokens)]

    def _capture(self, rows: int, cells: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the step; running it again with the same tokens writes the same cells, so a warm-up does no harm."""
        ids, positions = self._ids[:rows], self._positions[:rows]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step(ids, positions, cells)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(ids, positions, cells)
        return graph, logits


def powers_of_two(most: int) -> list[int]:
    """Return the numbers of rows that graphs are recorded for: 1, 2, 4 and so on, and `most`."""
    return [*(1 << bit for bit in range((most - 1).bit_length())), most]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
