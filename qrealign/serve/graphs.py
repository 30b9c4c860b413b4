"""Forward passes as CUDA graphs: launching the kernels of few tokens takes longer than their work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qrealign.serve.slots import Place

Forward = Callable[[Tensor, Place], Tensor]  # ids [B, Q] and where they go -> logits [B, V] behind each row's last one
Shape = tuple[int, int, int]  # rows, tokens a row, cells that are read

_WARM_UP = 2  # runs before a capture, in which kernels are compiled and workspaces allocated
_SHORTEST = 256  # cells
_NARROWEST = 64  # tokens a row of prompts: as long as reading the weights of large models, so that fewer save nothing
_WIDER = 256  # tokens a row: prompts that are longer are rounded up to multiples, not doubled


class SlotGraphs:
    """Captures a pass once for each shape it meets and replays it from then on.

    Rows and cells are rounded up to powers of two, tokens of prompts to few widths, so the shapes are few. What fills a
    shape up, on the left of prompts and in further rows, is written to the spare cell of a slot.

    Args:
        forward: device work alone, without a synchronisation.
        slots: most rows.
        tokens: of prompts, the most that a pass is recorded for.
        spare: the cell behind those that are read.
        device: a CUDA device.
    """

    def __init__(self, forward: Forward, *, slots: int, tokens: int, spare: int, device: torch.device) -> None:
        self._forward = forward
        self._slots = slots
        self._tokens = tokens
        self._spare = spare
        self._ids, self._cells = torch.zeros(2, max(slots, tokens), dtype=torch.int64, device=device)
        self._first_rows = torch.arange(slots, device=device)
        self._rows = self._first_rows.clone()
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # one for all, since they take turns

    def run(self, ids: Tensor, place: Place) -> Tensor | None:
        """Return `[B, V]` logits, overwritten by the next call; None where so many tokens are not recorded.

        Args:
            ids: `[B, Q]` on the host.
            place: where they go, on the host too.
        """
        rows, width = self.padded(*ids.shape)
        if steps := ids.shape[1] == 1 and place.first_rows:
            width = 1
        elif rows * width > self._tokens:
            return None
        length = min(max(_power_of_two(place.length), _SHORTEST), self._spare)
        filling = (width - ids.shape[1], 0, 0, rows - len(ids))
        self._part(self._ids, rows, width).copy_(pad(ids, filling))
        self._part(self._cells, rows, width).copy_(pad(place.cells, filling, value=self._spare))
        if not steps:
            taken = place.rows.tolist()
            others = [row for row in range(self._slots) if row not in taken]
            self._rows[:rows].copy_(torch.tensor([*taken, *others[: rows - len(taken)]]))
        if (rows, width, length) not in self._graphs:
            recorded = Place(
                rows=(self._first_rows if steps else self._rows)[:rows],
                cells=self._part(self._cells, rows, width),
                length=length,
                first_rows=steps,
            )
            self._graphs[rows, width, length] = self._capture(self._part(self._ids, rows, width), recorded)
        graph, logits = self._graphs[rows, width, length]
        graph.replay()
        return logits[: len(ids)]

    def padded(self, rows: int, width: int) -> tuple[int, int]:
        """Return the rows, and the tokens of each, of the recorded pass that reads so many of prompts."""
        wide = -(-width // _WIDER) * _WIDER if width > _WIDER else max(_power_of_two(width), _NARROWEST)
        return min(_power_of_two(rows), self._slots), wide

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Yield rows and tokens a row of what reads the fewest cells, the largest first: others fit into its memory."""
        longest = min(_SHORTEST, self._spare)
        numbers = _powers_of_two(self._slots)[::-1]
        widths = sorted({min(width, longest) for width in (_NARROWEST, 2 * _NARROWEST, longest)}, reverse=True)
        yield from ((rows, width) for width in widths for rows in numbers if rows * width <= self._tokens)
        yield from ((rows, 1) for rows in numbers)

    def _capture(self, ids: Tensor, place: Place) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the pass; running it again with the same tokens writes the same cells, so a warm-up does no harm."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._forward(ids, place)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(ids, place)
        self._pool = graph.pool()
        return graph, logits

    @staticmethod
    def _part(tensor: Tensor, rows: int, width: int) -> Tensor:
        return tensor[: rows * width].view(rows, width)


def _powers_of_two(most: int) -> list[int]:
    """Return the numbers of rows that passes are recorded for: 1, 2, 4 and so on, and `most`."""
    return [*(1 << bit for bit in range((most - 1).bit_length())), most]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
