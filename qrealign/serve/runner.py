"""One model and its slots: prompts in, next-token logits out, for many sequences of different lengths at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qrealign.data.generate import find_device, last_logits_only
from qrealign.deploy.decoder import has_fixed_program
from qrealign.errors import DeviceError, UnsupportedArchitectureError
from qrealign.models.device import free_bytes
from qrealign.serve.graphs import SlotGraphs
from qrealign.serve.slots import MaskMaker, Place, SlotCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Lengths that are read are rounded up to this many cells, so that the allocator meets few shapes.
_CELLS = 64
_PROMPT_TOKENS = {"cpu": 512, "cuda": 2048}  # most prompt tokens between two decode steps: how long streams may pause
CACHE_SHARE = 0.8  # of the memory that is free once the weights are loaded: the rest is for activations
_CHECK_LENGTHS = (5, 9)  # tokens of the two prompts that `check` runs
FEWEST_TOKENS = max(_CHECK_LENGTHS) + 1  # of a slot, so that both fit with the token behind them
_LEAST_LIKENESS = 0.99  # cosine of the logits; rounding of activations to int8 moves it by less than 0.001


class Runner:
    """Runs a model over the rows of a `SlotCache`. Rows are numbered; who owns which is the caller's matter.

    Args:
        model: a causal language model in eval mode, on its device.
        slots: rows.
        max_length: most tokens of a sequence.
        cache_bits: 8 keeps keys and values as int8 codes, None in the model's dtype.
        cuda_graphs: replay passes as CUDA graphs where the model is on a GPU and leaves nothing to the host.

    Attributes:
        prompt_tokens: most tokens that one pass should read of prompts, what fills up its shape included.

    Raises:
        UnsupportedArchitectureError: the model's attention cannot be masked row by row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_length: int,
        cache_bits: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.model = model
        self.device = find_device(model)
        self.max_length = max_length
        self.slots = slots
        self.prompt_tokens = _PROMPT_TOKENS.get(self.device.type, _PROMPT_TOKENS["cpu"])
        self.bind_thread()
        config = model.config.get_text_config()
        self.cache = SlotCache(config.num_hidden_layers, slots, max_length, cache_bits)
        self._masks = MaskMaker(config, next(model.parameters()).dtype)
        self._last_only = last_logits_only(model)
        self._pad = max(config.pad_token_id or 0, 0)  # some configurations name -1
        replays = cuda_graphs and self.device.type == "cuda" and has_fixed_program(model)
        self._graphs: SlotGraphs | None = None
        if replays:
            self._graphs = SlotGraphs(
                self._forward, slots=slots, tokens=self.prompt_tokens, spare=max_length, device=self.device
            )

    def bind_thread(self) -> None:
        """Make the model's GPU the current one of this thread, on which kernels and graphs are launched."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @torch.no_grad()
    def prefill(self, rows: Sequence[int], chunks: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Read a piece of a prompt into each of some rows.

        Args:
            rows: which.
            chunks: their next tokens, none empty; the lengths may differ.
            starts: how many tokens each row holds already.

        Returns:
            `[len(rows), V]`, the logits behind the last token of each chunk, valid until the next call.
        """
        width = max(map(len, chunks))
        ids = torch.full((len(rows), width), self._pad, dtype=torch.int64)
        cells = torch.full_like(ids, self.max_length)  # padding stands on the left and is written to the spare cell
        for index, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
            own = slice(width - len(chunk), width)
            ids[index, own] = torch.as_tensor(chunk, dtype=torch.int64)
            cells[index, own] = torch.arange(start, start + len(chunk))
        place = Place(
            rows=torch.as_tensor(rows, dtype=torch.int64),
            cells=cells,
            length=max(start + len(chunk) for start, chunk in zip(starts, chunks, strict=True)),
            first_rows=list(rows) == list(range(len(rows))),
        )
        return self._run(ids, place)

    def padded_tokens(self, rows: int, width: int) -> int:
        """Return how many tokens a pass computes in which so many rows read at most `width` tokens of a prompt."""
        return rows * width if self._graphs is None else math.prod(self._graphs.padded(rows, width))

    @torch.no_grad()
    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Add one token to each of the rows 0 to B - 1; return `[B, V]` logits behind it, valid until the next call."""
        ids, cells = (torch.as_tensor(values, dtype=torch.int64)[:, None] for values in (tokens, positions))
        rows = torch.arange(len(ids))
        return self._run(ids, Place(rows=rows, cells=cells, length=max(positions) + 1, first_rows=True))

    def check(self) -> None:
        """Run two prompts side by side and compare with each alone: a model that needs more than a mask is refused.

        Raises:
            UnsupportedArchitectureError: the answers differ.
            DeviceError: the slots do not fit into the memory.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        prompts = [[(7 * index + 3) % vocabulary for index in range(length)] for length in _CHECK_LENGTHS]
        try:
            self.prefill([0, 1][: self.slots], prompts[: self.slots], [0, 0][: self.slots])
            together = self.decode(*zip(*((prompt[0], len(prompt)) for prompt in prompts[: self.slots]), strict=True))
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{self.slots} slots of {self.max_length} tokens do not fit into the memory of {self.device}: "
                "lower --max-slots or --max-length"
            ) from error
        for logits, prompt in zip(together, prompts, strict=False):
            alone = self._alone([*prompt, prompt[0]])
            if torch.nn.functional.cosine_similarity(logits.float(), alone.float(), dim=-1) < _LEAST_LIKENESS:
                raise UnsupportedArchitectureError(
                    f"model type {self.model.config.model_type!r} answers otherwise in a batch than alone, so "
                    "the server cannot batch it: serve it with another server"
                )

    def warm_up(self) -> None:
        """Record passes over few cells, so that no request waits for kernels to compile; nothing may run."""
        if self._graphs is None:
            return
        for rows, width in self._graphs.shapes():
            self.prefill(range(rows), [[self._pad] * width] * rows, [0] * rows)

    @torch.no_grad()
    def _alone(self, ids: list[int]) -> Tensor:
        """Return the logits `[V]` behind `ids` without a cache."""
        return self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0, -1]

    def _run(self, ids: Tensor, place: Place) -> Tensor:
        """Return the logits behind the last of `[B, Q]` ids, which are on the host as their place is."""
        if self._graphs is not None and (logits := self._graphs.run(ids, place)) is not None:
            return logits
        length = min(-(-place.length // _CELLS) * _CELLS, self.max_length)
        rows, cells = place.rows.to(self.device), place.cells.to(self.device)
        return self._forward(ids.to(self.device), replace(place, rows=rows, cells=cells, length=length))

    def _forward(self, ids: Tensor, place: Place) -> Tensor:
        """Run the model; only device work, so that it can be captured."""
        self.cache.aim(place)
        positions = place.cells % self.max_length  # 0 for what stands in the spare cell
        output = self.model(
            input_ids=ids,
            attention_mask=self._masks.make(positions, place.length),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **self._last_only,
        )
        return output.logits[:, -1]


@torch.no_grad()
def cache_bytes_per_token(model: PreTrainedModel, bits: int | None = None) -> int:
    """Return the bytes of keys and values that one token takes, as codes of `bits` bits or not; it runs one."""
    output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=find_device(model)), use_cache=True)
    layers = output.past_key_values.layers
    found = [states for layer in layers for states in (layer.keys, layer.values)]
    return sum(states.nbytes if bits is None else states.numel() + 4 * states.shape[1] for states in found)


def fitting_slots(model: PreTrainedModel, max_length: int, most: int, cache_bits: int | None = None) -> int:
    """Return how many slots of `max_length` tokens fit into the free memory, `most` at most.

    Raises:
        DeviceError: not even one does.
    """
    device = find_device(model)
    one, room = cache_bytes_per_token(model, cache_bits) * (max_length + 1), CACHE_SHARE * free_bytes(device)
    if one > room:
        raise DeviceError(
            f"one slot of {max_length} tokens takes {one / 2**30:.1f} GiB, and {device} has {room / 2**30:.1f} GiB for "
            "them: lower --max-length"
        )
    return min(most, int(room // one))
