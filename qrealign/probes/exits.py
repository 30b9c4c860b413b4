"""Answers that a model gives when it stops at an early block: does what a block knows already make the model refuse?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from qrealign.arch import BlockSpec
from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import generate_answers
from qrealign.errors import DataError
from qrealign.judges.degeneracy import is_degenerate
from qrealign.judges.refusal import is_refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ExitRates:
    """What a model's answers are when it stops at one block; shares in [0, 1], of `n_malicious` and `n_benign` prompts.

    A broken answer is neither a refusal nor an answer; `degenerate` counts those of both kinds of prompts together.
    """

    refused_malicious: float
    refused_benign: float
    degenerate: float
    n_malicious: int
    n_benign: int


def choose_exits(num_blocks: int, most: int) -> list[int]:
    """Return the blocks to stop at, ascending: all, or `most` evenly spread ones that end with the last."""
    count = min(num_blocks, most)
    return [(place + 1) * num_blocks // count - 1 for place in range(count)]


@contextmanager
def early_exit(model: nn.Module, spec: BlockSpec, block: int) -> Iterator[None]:
    """Make `model` skip the blocks behind `block`: its final norm and head then read that block's output.

    The kept blocks are the model's own, whatever is in them, so packed, fake-quantized and streamed models work, with
    and without a KV cache (one made inside must not be used outside). Leaving restores the model.

    Args:
        model: a Hugging Face causal language model.
        spec: its row of the architecture table; `spec.blocks` is the path of its list of blocks.
        block: index of the last block that runs.

    Raises:
        ValueError: there is no such block.

    Source: the semantic separability of arXiv 2601.08089, whose authors truncate the model likewise.
    """
    parent_path, _, name = spec.blocks.rpartition(".")
    parent, blocks = model.get_submodule(parent_path), spec.blocks_of(model)
    if not 0 <= block < len(blocks):
        raise ValueError(f"the model has blocks 0 to {len(blocks) - 1}, none is {block}")
    whole = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(blocks[: block + 1]))
    try:
        yield
    finally:
        setattr(parent, name, whole)


def semantic_separability(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    malicious: Sequence[str],
    benign: Sequence[str],
    spec: BlockSpec,
    *,
    exits: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
) -> dict[int, ExitRates]:
    """Return how often a model refuses malicious and benign prompts when it stops at each block of `exits`.

    Every exit answers every prompt anew, greedily: an exit at block l costs (l + 1) / L of the whole model's answers.

    Args:
        model: a Hugging Face causal language model.
        encoder: its prompt encoder.
        malicious: prompts that should be refused, at least one.
        benign: prompts that should not be, at least one.
        spec: the model's row of the architecture table.
        exits: indices of blocks, such as those of `choose_exits`.
        max_new_tokens: longest answer; refusals open an answer, so few are enough.
        batch_size: most prompts at once.
        progress: label of a progress bar, or None for silence.

    Raises:
        DataError: there are no prompts of a kind.
        DeviceError: the memory does not hold a single prompt.
    """
    if not malicious or not benign:
        raise DataError("semantic separability needs malicious and benign prompts, but there are none of one kind")
    rates = {}
    for block in exits:
        with early_exit(model, spec, block):
            answers = generate_answers(
                model,
                encoder,
                [*malicious, *benign],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=None if progress is None else f"{progress}, from block {block}",
            )
        broken = [is_degenerate(answer) for answer in answers]
        refused = [not bad and is_refusal(answer) for bad, answer in zip(broken, answers, strict=True)]
        rates[block] = ExitRates(
            refused_malicious=sum(refused[: len(malicious)]) / len(malicious),
            refused_benign=sum(refused[len(malicious) :]) / len(benign),
            degenerate=sum(broken) / len(broken),
            n_malicious=len(malicious),
            n_benign=len(benign),
        )
    return rates
