"""Decoding on a static cache: one prefill, then steps that a GPU replays as one recorded graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qrealign.data.generate import last_logits_only
from qrealign.models.experts import ExpertList

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UP_STEPS = 3  # before a graph is recorded, so that kernels are compiled and workspaces allocated
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # they read the longest position back to the host


class StaticDecoder:
    """Decodes batches of a fixed size on one static cache that is made once.

    A step reads and writes fixed tensors only, so on a GPU it is recorded as a CUDA graph and replayed: it then takes
    the GPU's own time. Steps of models that decide on the host what to run go without: see `records`.

    Args:
        model: a causal language model in eval mode, from `load_packed` or any other; not used otherwise meanwhile.
        batch_size: sequences that every prefill brings.
        max_length: most tokens of a sequence: padding, prompt and answer together.
        compile_step: whether `torch.compile` fuses the step's small kernels first, which takes a minute or more, once.

    Attributes:
        records: whether steps are replayed. Not on a CPU, with sliding windows, experts, or a rotary embedding that
            depends on the length.
    """

    def __init__(self, model: PreTrainedModel, *, batch_size: int, max_length: int, compile_step: bool = False) -> None:
        from transformers import StaticCache

        self.model, self.batch_size, self.max_length = model, batch_size, max_length
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        self.records = model.device.type == "cuda" and has_fixed_program(model) and not _slides(self.cache)
        self._token_ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self._positions = torch.zeros_like(self._token_ids)
        self._mask = torch.ones(batch_size, max_length, dtype=torch.int64, device=model.device)
        self._run: Callable[[], Tensor] = self._forward
        if compile_step:
            self._run = torch.compile(self._forward, fullgraph=True, dynamic=False)
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        if self.records:
            self.record()

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Forget what the cache holds, fill it with prompts, and return the logits of their next tokens.

        Args:
            input_ids: `[B, T]` int64, padded on the left; T is less than `max_length`.
            attention_mask: `[B, T]`, 0 where a token is padding; None where none is.

        Returns:
            `[B, V]` in the model's dtype.

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
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **last_logits_only(self.model),
        )
        return output.logits[:, -1]

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """Add a token to every sequence and return the logits of the next ones.

        The caller counts: behind `max_length` tokens there is no room.

        Args:
            token_ids: `[B]` int64, on the model's device or not.

        Returns:
            `[B, V]` in the model's dtype; the next step may overwrite it.
        """
        self._token_ids.copy_(token_ids[:, None])
        if self._recorded is None:
            return self._run()
        graph, logits = self._recorded
        graph.replay()
        return logits

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
        """Record the step as a CUDA graph, with kernels as they are launched now; forgets what the cache holds."""
        self._recorded = None
        self.prefill(self._token_ids)  # makes the cache
        aside = torch.cuda.Stream(self.model.device)
        aside.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP_STEPS):
                self.cache.reset()
                self._run()
        torch.cuda.current_stream(self.model.device).wait_stream(aside)
        self.cache.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):  # whose workspaces are there already: 32 MiB less to keep
            logits = self._run()
        self._recorded = graph, logits


def has_fixed_program(model: PreTrainedModel) -> bool:
    """Tell whether a step launches the same kernels wherever the sequences stand, as far as the model decides it."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    return not (
        rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE
        or any(isinstance(module, ExpertList) for module in model.modules())
    )


def _slides(cache: object) -> bool:
    """Tell whether a layer of the cache forgets tokens, which moves the others."""
    return any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ()))
