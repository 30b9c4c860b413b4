"""Perplexity of running text: windows of one text each, one BOS per window, every other token counted once."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from qrealign.data.batching import run_in_batches
from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import find_device
from qrealign.errors import DataError

_LARGEST_MEAN = 700.0  # its exponential is still a finite number
_LOGIT_BYTES = 1 << 28  # most bytes of one batch's float32 logits


def measure_perplexity(
    model: nn.Module,
    encoder: ChatEncoder,
    texts: Sequence[str],
    *,
    max_tokens: int,
    window: int = 512,
    batch_size: int = 16,
    progress: str | None = None,
) -> float:
    """Return exp of the mean negative log-likelihood per token over the first `max_tokens` tokens of `texts`.

    Texts are not joined: a window never spans two. A BOS stands before each window where the tokenizer starts texts
    with one; it is not scored. Without BOS a window's first token has no context and is not scored either.

    Args:
        model: a causal language model.
        encoder: its tokenizer is used without the chat form.
        texts: running text.
        max_tokens: tokens read at most, in the order of `texts`.
        window: longest sequence, BOS included.
        batch_size: most windows at once; fewer where the vocabulary is large.
        progress: text before the progress bar on standard error, None for no bar.

    Raises:
        DataError: the texts hold no token that can be scored.
        DeviceError: the memory does not hold a single window.
    """
    windows = sorted(cut_windows(encoder.tokenizer, texts, max_tokens=max_tokens, window=window), key=len, reverse=True)
    config: Any = model.config
    batch_size = max(1, min(batch_size, _LOGIT_BYTES // (4 * config.vocab_size * len(windows[0]))))
    total, count = 0.0, 0
    with tqdm(total=len(windows), desc=progress, unit="window", disable=progress is None, leave=False) as bar:
        for batch, loss in run_in_batches(lambda batch: _sum_of_losses(model, encoder, batch), windows, batch_size):
            total += loss
            count += sum(len(ids) - 1 for ids in batch)
            bar.update(len(batch))
    mean = total / count
    return exp(mean) if mean < _LARGEST_MEAN else exp(_LARGEST_MEAN)  # also for a model that gives NaN


def cut_windows(tokenizer: object, texts: Sequence[str], *, max_tokens: int, window: int) -> list[list[int]]:
    """Return windows of ids, none longer than `window`, holding at most `max_tokens` ids besides BOS.

    Raises:
        DataError: the texts hold no token that can be scored.
    """
    windows: list[list[int]] = []
    left = max_tokens
    for text in texts:
        if left <= 0:
            break
        head = _bos_of(tokenizer)
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:left]  # type: ignore[operator]
        left -= len(ids)
        step = window - len(head)
        windows += [head + ids[start : start + step] for start in range(0, len(ids), step)]
    windows = [ids for ids in windows if len(ids) >= 2]
    if not windows:
        raise DataError("the texts for perplexity hold no two tokens in a row: give longer texts")
    return windows


def _bos_of(tokenizer: object) -> list[int]:
    """Return the BOS that the tokenizer puts before a text, if it does."""
    bos = tokenizer.bos_token_id  # type: ignore[attr-defined]
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []  # type: ignore[operator]


@torch.no_grad()
def _sum_of_losses(model: nn.Module, encoder: ChatEncoder, windows: Sequence[list[int]]) -> float:
    batch = encoder.pad(windows, side="right").to(find_device(model))
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[
        :, :-1
    ]  # [B, T-1, V]
    targets = batch.input_ids[:, 1:].masked_fill(batch.attention_mask[:, 1:] == 0, -100)
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return float(losses.double().sum())
