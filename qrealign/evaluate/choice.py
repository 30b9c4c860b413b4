"""Multiple choice by likelihood: of the options, which one does the model find likeliest behind the question?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from qrealign.data.batching import run_in_batches
from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import find_device, last_logits_only
from qrealign.errors import DataError, ModelError
from qrealign.evaluate.book import AnswerBook, key_of

LETTERS = "ABCDEFGHIJ"
ScoredBy = Literal["letter", "text"]
_LOGIT_BYTES = 1 << 28  # most bytes of one batch's float32 logits
_CACHED_TOKENS = 1 << 16  # most tokens of one batch that a KV cache holds


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """A question with options.

    `head` is what many questions have in common (the task's description and solved examples), `body` the question with
    its options up to where the answer begins, `endings` what may stand there, one per option; `answer` is the right
    one's index. With `normalise`, the log-likelihood of an ending counts per UTF-8 byte, so that long options have a
    chance.
    """

    suite: str
    head: str
    body: str
    endings: tuple[str, ...]
    answer: int
    normalise: bool = False


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A question in token ids: `shared` + `body` + one of `tails`; `position` is its place in the input."""

    position: int
    shared: tuple[int, ...]
    body: tuple[int, ...]
    tails: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds for the question once its options are added."""
        width = len(self.shared) + len(self.body) + max(map(len, self.tails))
        return width * (len(self.tails) if any(len(tail) > 1 for tail in self.tails) else 1)


def choose_options(
    model: nn.Module,
    encoder: ChatEncoder,
    questions: Sequence[ChoiceQuestion],
    book: AnswerBook,
    *,
    batch_size: int,
    progress: str | None = None,
) -> list[int]:
    """Return the index of the likeliest option of each question; of equal ones the first.

    The tokens that a batch's questions begin with alike run once, then those of each question, then those of its
    options, all on one KV cache.

    Args:
        model: a causal language model that takes a KV cache.
        encoder: its tokenizer is used without the chat form.
        questions: what to choose from.
        book: choices made already; new ones are entered.
        batch_size: most questions at once; fewer where they are long.
        progress: text before the progress bar on standard error, None for no bar.

    Raises:
        DataError: an option alone is too long for the model.
        ModelError: the model's cache cannot be copied, and the options are longer than a token.
        DeviceError: the memory does not hold a single question.
    """
    most = _most_tokens(model, encoder)
    items = [_encode(encoder.tokenizer, question, index, most) for index, question in enumerate(questions)]
    keys = [key_of("choice", item.shared, item.body, item.tails, questions[item.position].normalise) for item in items]
    chosen: list[int | None] = [book.get("choices", key) for key in keys]
    left = sorted(
        (item for item in items if chosen[item.position] is None), key=lambda item: (item.shared, -len(item.body))
    )
    hidden = progress is None or not left
    with tqdm(total=len(left), desc=progress, unit="question", disable=hidden, leave=False) as bar:
        for group in _groups(left, model):
            size = max(1, min(batch_size, _CACHED_TOKENS // max(item.tokens for item in group)))
            for batch, sums in run_in_batches(lambda part: _score_batch(model, encoder, part), group, size):
                for item, values in zip(batch, sums, strict=True):
                    question = questions[item.position]
                    choice = _best(values, question)
                    chosen[item.position] = choice
                    book.put("choices", keys[item.position], choice, question.body)
                bar.update(len(batch))
                book.save()
    return [0 if choice is None else int(choice) for choice in chosen]


def _best(log_likelihoods: list[float], question: ChoiceQuestion) -> int:
    lengths = [len(ending.strip().encode()) if question.normalise else 1 for ending in question.endings]
    values = [value / max(1, length) for value, length in zip(log_likelihoods, lengths, strict=True)]
    return max(range(len(values)), key=lambda index: values[index])


def _most_tokens(model: nn.Module, encoder: ChatEncoder) -> int:
    """Return the longest sequence that the model knows positions for."""
    config: Any = model.config
    return int(getattr(config, "max_position_embeddings", None) or encoder.max_length)


def _encode(tokenizer: Any, question: ChoiceQuestion, position: int, most: int) -> _Item:
    """Return the ids of a question; what is too long loses the beginning of its head, BOS aside."""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, verbose=False).input_ids)  # with BOS where texts begin with one

    context = ids_of(question.head + question.body)
    whole = [ids_of(question.head + question.body + ending) for ending in question.endings]
    # A tokenizer may write the end of the question otherwise when an option follows: the options begin there.
    prefix = _common_beginning([context, *whole])
    tails = tuple(tuple(ids[len(prefix) :]) for ids in whole)
    if not all(tails):
        prefix = prefix[:-1]
        tails = tuple(tuple(ids[len(prefix) :]) for ids in whole)
    longest = max(map(len, tails))
    surplus = len(prefix) + longest - most
    if surplus > 0:
        bos = prefix[:1] if prefix[0] == tokenizer.bos_token_id else []
        if longest + len(bos) >= most:
            raise DataError(
                f"an option of the question {question.body[:60]!r} is {longest} tokens long, and the model knows "
                f"{most} positions: shorten it, or score the options by their letter"
            )
        return _Item(position=position, shared=(), body=(*bos, *prefix[surplus + len(bos) :]), tails=tails)
    shared = _common_beginning([ids_of(question.head), prefix[:-1]]) if question.head else []
    return _Item(position=position, shared=tuple(shared), body=tuple(prefix[len(shared) :]), tails=tails)


def _common_beginning(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest list of ids that every sequence begins with."""
    alike = takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False))
    return [ids[0] for ids in alike]


def _groups(items: Sequence[_Item], model: nn.Module) -> Iterator[list[_Item]]:
    """Yield items that begin alike; where attention slides, an item that outgrows the window keeps to itself.

    Behind shared tokens the questions are padded, and a sliding window counts padding as if it were text.
    """
    window = getattr(getattr(model, "config", None), "sliding_window", None) or float("inf")
    for shared, found in groupby(items, key=lambda item: item.shared):
        group = list(found)
        longest = len(shared) + max(len(item.body) + max(map(len, item.tails)) for item in group)
        if longest >= window or len(group) == 1:
            group = [
                _Item(position=item.position, shared=(), body=shared + item.body, tails=item.tails) for item in group
            ]
        yield group


@torch.no_grad()
def _score_batch(model: nn.Module, encoder: ChatEncoder, items: Sequence[_Item]) -> list[list[float]]:
    """Return the log-likelihood of each option of each item; all items share their beginning."""
    device, options = find_device(model), last_logits_only(model)
    shared = items[0].shared
    cache: Any = None
    if shared:
        head = torch.tensor([shared], dtype=torch.int64, device=device)
        cache = model(input_ids=head, use_cache=True, **options).past_key_values
        cache.batch_select_indices(torch.zeros(len(items), dtype=torch.int64, device=device))
    batch = encoder.pad([item.body for item in items], side="left").to(device)
    mask = torch.cat([batch.attention_mask.new_ones(len(items), len(shared)), batch.attention_mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    needs_more = any(len(tail) > 1 for item in items for tail in item.tails)
    output = model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=positions[:, len(shared) :],
        past_key_values=cache,
        use_cache=needs_more or cache is not None,
        **options,
    )
    first = functional.log_softmax(output.logits[:, -1].float(), dim=-1)  # [B, V]
    sums = [[float(first[row, tail[0]]) for tail in item.tails] for row, item in enumerate(items)]
    if needs_more:
        rest = _score_rest(model, encoder, items, output.past_key_values, mask, positions[:, -1])
        sums = [[a + b for a, b in zip(one, other, strict=True)] for one, other in zip(sums, rest, strict=True)]
    return sums


def _score_rest(
    model: nn.Module, encoder: ChatEncoder, items: Sequence[_Item], cache: Any, mask: Tensor, last: Tensor
) -> list[list[float]]:
    """Return the log-likelihood of every option without its first token, given the cache of the questions."""
    if not hasattr(cache, "batch_select_indices"):
        raise ModelError(
            f"the cache of {type(model).__name__} cannot be copied for each option: score the options by their letter"
        )
    rows = torch.tensor([row for row, item in enumerate(items) for _ in item.tails], device=mask.device)
    tails = [tail for item in items for tail in item.tails]
    # An option of one token has nothing left to score, but a batch has no empty row: its token runs for nothing.
    fed = encoder.pad([tail[:-1] or tail for tail in tails], side="right").to(mask.device)
    cache.batch_select_indices(rows)
    width = fed.input_ids.shape[1]
    positions = last[rows][:, None] + torch.arange(1, width + 1, device=mask.device)
    logits = model(
        input_ids=fed.input_ids,
        attention_mask=torch.cat([mask[rows], fed.attention_mask], dim=1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).logits
    found = iter(_sum_tail(logits[row], tail) for row, tail in enumerate(tails))
    return [[next(found) for _ in item.tails] for item in items]


def _sum_tail(logits: Tensor, tail: tuple[int, ...]) -> float:
    """Return the log-likelihood of `tail[1:]`, given `logits` `[T, V]` behind `tail[:-1]`."""
    wanted = torch.tensor(tail[1:], dtype=torch.int64, device=logits.device)
    likely = functional.log_softmax(logits[: len(wanted)].float(), dim=-1)
    return float(likely.gather(1, wanted[:, None]).double().sum())
