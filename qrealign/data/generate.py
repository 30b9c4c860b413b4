"""Answers to many prompts, greedy or sampled: batched by length, with a KV cache, finished rows dropped."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qrealign.data.batching import by_length, run_in_batches
from qrealign.data.encode import ChatEncoder

_DROP_SHARE = 0.25  # finished rows leave the batch when they are this share of it
# What one more batch costs a CPU for each token of its answers, in tokens: a step reads all weights, however few rows.
_STEP_TOKENS = 16

Ids = tuple[int, ...]
OnBatch = Callable[[Sequence[Ids], Sequence[list[int]]], None]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw each token from the softmax of the logits divided by `temperature`, with random numbers of `seed`.

    The numbers of a sequence depend on its ids and the seed only, so batches may be composed in any way.
    """

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"sampling needs a temperature above 0, got {self.temperature}")

    def uniforms(self, sequences: Sequence[Sequence[int]], count: int) -> Tensor:
        """Return `[len(sequences), count]` float32 numbers in [0, 1), one row per sequence."""
        rows = []
        for ids in sequences:
            digest = hashlib.sha256(repr((self.seed, tuple(ids))).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            rows.append(torch.rand(count, generator=generator))
        return torch.stack(rows)


def generate_answers(
    model: nn.Module,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
    begun: Sequence[str] | None = None,
    begun_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """Return the model's answer to each prompt, in order, greedy unless `sampling` is given.

    Answers do not depend on the batch size: padding stands on the left, is masked, and positions count real tokens.
    When memory runs out the batch is halved, with a warning.

    Args:
        model: a causal language model that takes a KV cache; its blocks may be streamed.
        encoder: turns prompts into ids and ids into text.
        prompts: as a user would type them.
        max_new_tokens: longest answer, in tokens.
        batch_size: most prompts at once.
        progress: text before the progress bar on standard error, None for no bar.
        begun: the beginning of each answer, put behind the assistant's header for the model to continue; what is
            returned is the continuation alone.
        begun_tokens: most tokens of such a beginning.
        sampling: how to draw tokens; None takes the likeliest.

    Raises:
        DeviceError: the memory does not hold a single prompt.
    """
    ids = generate_ids(
        model,
        encoder,
        encoder.encode_many(prompts, begun, answer_tokens=begun_tokens),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        sampling=sampling,
    )
    if begun is None:
        return [encoder.decode(answer) for answer in ids]
    heads = [encoder.answer_ids(text, begun_tokens) for text in begun]
    return [encoder.decode_behind(head, answer) for head, answer in zip(heads, ids, strict=True)]


def generate_ids(
    model: nn.Module,
    encoder: ChatEncoder,
    sequences: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
    sampling: Sampling | None = None,
    on_batch: OnBatch | None = None,
) -> list[list[int]]:
    """Return the continuation of each sequence of ids, without the stop token. See `generate_answers`.

    `on_batch` gets the sequences and continuations of each batch as soon as it is done; equal sequences come once.
    """
    unique = sorted({tuple(ids) for ids in sequences}, key=len, reverse=True)
    stop_ids = find_stop_ids(model, encoder)
    groups = [unique]
    if find_device(model).type == "cpu":  # padding costs as much as text there; a GPU waits for its steps
        groups = by_length(unique, [len(ids) for ids in unique], _STEP_TOKENS * max_new_tokens, batch_size)[::-1]
    answers: dict[Ids, list[int]] = {}
    with tqdm(total=len(unique), desc=progress, unit="prompt", disable=progress is None, leave=False) as bar:

        def answer_batch(batch: Sequence[Ids]) -> list[list[int]]:
            return _continue_batch(model, encoder, batch, max_new_tokens, stop_ids, sampling)

        for batch, continued in chain.from_iterable(run_in_batches(answer_batch, part, batch_size) for part in groups):
            answers.update(zip(batch, continued, strict=True))
            if on_batch is not None:
                on_batch(batch, continued)
            bar.update(len(batch))
    return [answers[tuple(ids)] for ids in sequences]


def find_stop_ids(model: nn.Module, encoder: ChatEncoder) -> frozenset[int]:
    """Return the ids that end an answer: those of the generation configuration and the tokenizer's EOS."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), encoder.tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or ())
    return frozenset(found)


def find_device(model: nn.Module) -> torch.device:
    """Return the device of the first weight that is loaded (streamed blocks have none while they wait)."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """Return the argument that spares the head all positions but the last, where the model takes it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()  # inference_mode would taint weights that are loaded while streaming, and buffers that a model updates
def _continue_batch(
    model: nn.Module,
    encoder: ChatEncoder,
    sequences: Sequence[Ids],
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampling: Sampling | None,
) -> list[list[int]]:
    device = find_device(model)
    batch = encoder.pad(sequences, side="left").to(device)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    mask = batch.attention_mask  # [B, T], one column longer each step
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    rows = torch.arange(len(sequences), device=device)  # which sequence each row of the shrinking batch continues
    done = torch.zeros(len(sequences), dtype=torch.bool, device=device)
    answers = torch.full((len(sequences), max_new_tokens), -1, dtype=torch.int64, device=device)
    step_ids, cache, options = batch.input_ids, None, last_logits_only(model)
    uniforms = None if sampling is None else sampling.uniforms(sequences, max_new_tokens).to(device)
    for step in range(max_new_tokens):
        output = model(
            input_ids=step_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        logits = output.logits[:, -1]  # [B, V]
        if sampling is None or uniforms is None:
            chosen = logits.argmax(dim=-1)  # [B]
        else:
            chosen = draw_tokens(logits, sampling.temperature, uniforms[rows, step])
        done = done | torch.isin(chosen, stop)
        answers[rows, step] = torch.where(done, -1, chosen)
        if step + 1 == max_new_tokens or bool(done.all()):
            break
        cache, step_ids, positions = output.past_key_values, chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if hasattr(cache, "batch_select_indices") and int(done.sum()) >= _DROP_SHARE * len(done):
            kept = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            step_ids, positions, mask, rows, done = step_ids[kept], positions[kept], mask[kept], rows[kept], done[kept]
    return [_until_stop(row) for row in answers.cpu()]


def draw_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Return `[B]` ids drawn by inverting the cumulative distribution of `logits` `[B, V]` at `uniforms` `[B]`.

    Summed in float64, because a float32 sum over a large vocabulary loses the small probabilities.
    """
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    reach = uniforms.double() * cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, reach[:, None], right=True).squeeze(1)
    return drawn.clamp(max=logits.shape[-1] - 1)  # a model that gives NaN is past the end


def _until_stop(row: Tensor) -> list[int]:
    """Return the ids of one answer, which -1 fills up from its stop token on."""
    return row[row >= 0].tolist()
