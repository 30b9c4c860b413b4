"""Decoding on a static cache: a prompt in pieces, then steps; a GPU replays either as one recorded graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qrealign.data.generate import last_logits_only
from qrealign.deploy.cache import static_cache
from qrealign.models.experts import ExpertList

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UP_STEPS = 3  # before a graph is recorded, so that kernels are compiled and workspaces allocated
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # they read the longest position back to the host


class StaticDecoder:
    """Decodes batches of a fixed size on one static cache that is made once.

    A step reads and writes fixed tensors only, so on a GPU it is recorded as a CUDA graph and replayed: it then takes
    the GPU's own time. Steps of models that decide on the host what to run go without: see `records`.

    Args:
        model: a causal language model in eval mode, from `load_packed` or any other; not used otherwise meanwhile.
        batch_size: sequences that every prefill brings.
        max_length: most tokens of a sequence: padding, prompt and answer together.
        compile_step: whether `torch.compile` fuses the step's small kernels first, which takes a minute or more, once.
        cache_bits: 8 keeps keys and values as int8 codes, None in the model's dtype.
        prompt_piece: most tokens of a prompt that are read at once, so that a long one takes no more memory; pieces of
            this length are recorded too. None reads every prompt whole, without a graph.

    Attributes:
        records: whether steps are replayed. Not on a CPU, with sliding windows, experts, or a rotary embedding that
            depends on the length.
        records_prompts: whether pieces of a prompt are.

    Raises:
        ConfigError: no cache has codes of that width.
        UnsupportedArchitectureError: codes are asked for, and the model has sliding windows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_size: int,
        max_length: int,
        compile_step: bool = False,
        cache_bits: int | None = None,
        prompt_piece: int | None = None,
    ) -> None:
        self.model, self.batch_size, self.max_length = model, batch_size, max_length
        self.cache = static_cache(model.config, max_length, cache_bits)
        slides = _slides(self.cache)  # a window in pieces is no longer what its class expects
        self._piece = None if slides or prompt_piece is None else min(prompt_piece, max_length)
        self.records = model.device.type == "cuda" and has_fixed_program(model) and not slides
        self._last_only = last_logits_only(model)
        masks = getattr(model.config, "_attn_implementation", None) == "sdpa"  # takes a mask of booleans that is given
        self.records_prompts = self.records and self._piece is not None and masks and bool(self._last_only)
        self._token_ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self._positions = torch.zeros_like(self._token_ids)
        self._mask = torch.ones(batch_size, max_length, dtype=torch.int64, device=model.device)
        self._prompt = _Piece(batch_size, self._piece or 0, model.device)
        self._compiled = torch.compile(self._forward, fullgraph=True, dynamic=False) if compile_step else None
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self._recorded_piece: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        if self.records:
            self.record()

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Forget what the cache holds, fill it with prompts, and return the logits of their next tokens.

        Args:
            input_ids: `[B, T]` int64, padded on the left; T is less than `max_length`.
            attention_mask: `[B, T]`, 0 where a token is padding; None where none is.

        Returns:
            `[B, V]` in the model's dtype; the next prefill or step may overwrite it.

        Raises:
            ValueError: B is not `batch_size`, or T leaves no room for an answer.
        """
        rows, length = input_ids.shape
        if rows != self.batch_size or not 0 < length < self.max_length:
            raise ValueError(
                f"prompts must be [{self.batch_size}, 1 to {self.max_length - 1}] tokens, got {tuple(input_ids.shape)}"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        self.cache.reset()
        self._mask.fill_(1)
        self._mask[:, :length] = mask
        self._positions.copy_(positions[:, -1:] + 1)
        width = self._piece or length
        logits = self._mask  # a prompt has a piece at least
        for start in range(0, length, width):
            ids, places = (tensor[:, start : start + width] for tensor in (input_ids, positions))
            if self._recorded_piece is not None and start + width <= self.max_length:
                logits = self._replay(ids, places, start)
            else:
                logits = self._read(ids, places, mask if start == 0 and width >= length else self._mask)
        return logits

    def _read(self, input_ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Run the model on a piece of a prompt and return the logits behind its last token."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **self._last_only,
        )
        return output.logits[:, -1]

    def _replay(self, input_ids: Tensor, positions: Tensor, start: int) -> Tensor:
        """Replay the recorded piece; a shorter one is filled up behind its end, where the next tokens overwrite it."""
        assert self._recorded_piece is not None
        graph, logits = self._recorded_piece
        length = input_ids.shape[1]
        self._prompt.token_ids[:, :length].copy_(input_ids)
        self._prompt.positions[:, :length].copy_(positions)
        self._prompt.start.fill_(start)
        self._prompt.last.fill_(length - 1)
        graph.replay()
        if length < self._prompt.token_ids.shape[1]:
            layer: Any
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(start + length)
        return logits

    def _forward_piece(self) -> Tensor:
        """Run the model on the piece's tensors and return `[B, V]` logits behind its last token."""
        piece = self._prompt
        cells = piece.start + torch.arange(piece.token_ids.shape[1], device=self.model.device)
        seen = torch.arange(self.max_length, device=self.model.device) <= cells[:, None]  # [T, max_length]
        output = self.model(
            input_ids=piece.token_ids,
            attention_mask=seen & self._mask[:, None, None].bool(),
            position_ids=piece.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=piece.last,
        )
        return output.logits[:, -1]

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """Add a token to every sequence and return the logits of the next ones.

        The caller counts: behind `max_length` tokens there is no room.

        Args:
            token_ids: `[B]` int64, on the model's device or not.

        Returns:
            `[B, V]` in the model's dtype; the next prefill or step may overwrite it.
        """
        self._token_ids.copy_(token_ids[:, None])
        if self._recorded is None:
            return self._run()
        graph, logits = self._recorded
        graph.replay()
        return logits

    def _run(self) -> Tensor:
        return self._forward() if self._compiled is None else self._compiled()

    def _forward(self) -> Tensor:
        """Run the model on the token ids, move the positions on, and return `[B, V]` logits."""
        output = self.model(
            input_ids=self._token_ids,
            attention_mask=self._mask,  # of the whole cache: causality hides what is not written yet
            position_ids=self._positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self._positions.add_(1)
        return output.logits[:, -1]

    @torch.no_grad()
    def record(self) -> None:
        """Record the graphs, with kernels as they are launched now; forgets what the cache holds."""
        self._recorded = self._recorded_piece = None
        gc.collect()  # a graph of another decoder that is freed while this one is recorded ends the recording
        self._read(self._token_ids, self._positions, self._mask[:, :1])  # makes the cache
        aside = torch.cuda.Stream(self.model.device)
        self._recorded = self._record(self._run, aside, None)
        if self.records_prompts:
            self._recorded_piece = self._record(self._forward_piece, aside, self._recorded[0].pool())

    def _record(
        self, run: Callable[[], Tensor], aside: torch.cuda.Stream, pool: Any
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return the graph of a call and its result."""
        aside.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP_STEPS):
                self.cache.reset()
                run()
        torch.cuda.current_stream(self.model.device).wait_stream(aside)
        self.cache.reset()
        graph = torch.cuda.CUDAGraph()
        # On a stream whose workspaces are there already: 32 MiB less to keep. One pool, since graphs take turns.
        with torch.cuda.graph(graph, pool=pool, stream=aside):
            logits = run()
        return graph, logits


class _Piece:
    """The tensors that a recorded piece of `tokens` tokens reads.

    token_ids, positions: `[B, tokens]`. start: `[1]`, the cell of the first one. last: `[1]`, the last that is no
    filling.
    """

    def __init__(self, batch_size: int, tokens: int, device: torch.device) -> None:
        self.token_ids, self.positions = torch.zeros(2, batch_size, tokens, dtype=torch.int64, device=device)
        self.start, self.last = torch.zeros(2, 1, dtype=torch.int64, device=device)


def has_fixed_program(model: PreTrainedModel) -> bool:
    """Tell whether a step launches the same kernels wherever the sequences stand, as far as the model decides it."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    return not (
        rope.get("rope_type") in LENGTH_DEPENDENT_ROPE
        or any(isinstance(module, ExpertList) for module in model.modules())
    )


def _slides(cache: object) -> bool:
    """Tell whether a layer of the cache forgets tokens, which moves the others."""
    return any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ()))
