"""What the student must reproduce, computed once: teachers' greedy answers and their final hidden states.

Log-probabilities follow from hidden states and the teacher's output weight, so the cache keeps hidden states: a row of
H numbers a position where log-probabilities would take the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from qrealign.calibrate.readout import final_hidden
from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import generate_ids
from qrealign.data.prompts import Label, Prompt
from qrealign.errors import DataError
from qrealign.files import write_tensors
from qrealign.judges.refusal import is_refusal

JUDGED_TOKENS = 24  # enough of an answer for the refusal rule


@dataclass(frozen=True, kw_only=True)
class TeacherSample:
    """One prompt with its teacher's answer, and where the teacher is to be matched.

    `input_ids` `[T]` int64; `positions` `[P]` int64 into it; `weights` `[P]` float32, summing to 1; `hidden` `[P, H]`,
    the teacher's final hidden states there.
    """

    label: Label
    input_ids: Tensor
    positions: Tensor
    weights: Tensor
    hidden: Tensor


@dataclass(kw_only=True)
class TeacherCache:
    """All teacher samples; `head_weight` is the aligned model's output weight where it differs from the student's."""

    samples: list[TeacherSample]
    head_weight: Tensor | None = None

    def of_class(self, label: Label) -> list[int]:
        """Return the indices of the samples of one class."""
        return [index for index, sample in enumerate(self.samples) if sample.label == label]

    def save(self, path: Path) -> None:
        """Write the cache as one safetensors file."""
        tensors = {
            f"{i:06d}.{key}": getattr(sample, key)
            for i, sample in enumerate(self.samples)
            for key in ("input_ids", "positions", "weights", "hidden")
        }
        tensors["labels"] = torch.tensor([int(sample.label) for sample in self.samples])
        if self.head_weight is not None:
            tensors["head_weight"] = self.head_weight
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> TeacherCache:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            labels = file.get_tensor("labels").tolist()
            samples = [
                TeacherSample(
                    label=Label(label),
                    **{
                        key: file.get_tensor(f"{i:06d}.{key}")
                        for key in ("input_ids", "positions", "weights", "hidden")
                    },
                )
                for i, label in enumerate(labels)
            ]
            head = file.get_tensor("head_weight") if "head_weight" in file.keys() else None  # noqa: SIM118 (no mapping)
        return cls(samples=samples, head_weight=head)


def teach_refusals(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    *,
    answer_tokens: int,
    batch_size: int,
    progress: str | None,
) -> list[TeacherSample]:
    """Return the aligned model's samples on the malicious prompts that it refuses.

    Half the weight lies on the first answer token, which decides between refusing and complying; the other half is
    spread over the next `answer_tokens`.

    Raises:
        DataError: the model refuses fewer than half of the prompts, so it cannot teach refusal.
    """
    answers = _answers(model, encoder, prompts, JUDGED_TOKENS, batch_size, progress)
    refused = [
        (prompt, answer[:answer_tokens])
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_refusal(encoder.decode(answer))
    ]
    if 2 * len(refused) < len(prompts):
        raise DataError(
            f"the aligned model refuses only {len(refused)} of {len(prompts)} malicious calibration prompts: "
            "check --aligned, its chat template and the labels of --safety-data"
        )

    def weigh(prompt_length: int, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(prompt_length - 1, length)
        weights = torch.full((len(positions),), 0.5 / max(1, len(positions) - 1))
        weights[0] = 0.5 if len(positions) > 1 else 1.0
        return positions, weights

    return _teach(model, encoder, refused, Label.MALICIOUS, weigh, batch_size=batch_size)


def teach_behaviour(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    *,
    answer_tokens: int,
    batch_size: int,
    progress: str | None,
) -> list[TeacherSample]:
    """Return the fine-tuned model's samples: half the weight over all positions, half over those that answer."""
    answers = _answers(model, encoder, prompts, answer_tokens, batch_size, progress)

    def weigh(prompt_length: int, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length)
        answering = positions >= prompt_length - 1
        return positions, 0.5 / length + 0.5 * answering / answering.sum()

    return _teach(model, encoder, list(zip(prompts, answers, strict=True)), Label.BENIGN, weigh, batch_size=batch_size)


def _answers(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    new_tokens: int,
    batch_size: int,
    progress: str | None,
) -> list[list[int]]:
    """Return each prompt's greedy answer as token ids."""
    ids = encoder.encode_many([prompt.text for prompt in prompts])
    return generate_ids(model, encoder, ids, max_new_tokens=new_tokens, batch_size=batch_size, progress=progress)


@torch.no_grad()
def _teach(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    pairs: Sequence[tuple[Prompt, list[int]]],
    label: Label,
    weigh: Callable[[int, int], tuple[Tensor, Tensor]],
    *,
    batch_size: int,
) -> list[TeacherSample]:
    """Run prompt and answer through the teacher and keep its hidden states at the weighted positions."""
    samples: list[TeacherSample] = []
    for start in range(0, len(pairs), batch_size):
        heads = [encoder.encode(prompt.text) for prompt, _ in pairs[start : start + batch_size]]
        rows = [head + answer for head, (_, answer) in zip(heads, pairs[start : start + batch_size], strict=True)]
        batch = encoder.pad(rows, side="right")
        hidden = final_hidden(model, batch.input_ids.to(model.device), batch.attention_mask.to(model.device))
        for index, (head, row) in enumerate(zip(heads, rows, strict=True)):
            positions, weights = weigh(len(head), len(row))
            samples.append(
                TeacherSample(
                    label=label,
                    input_ids=torch.tensor(row),
                    positions=positions,
                    weights=weights.float(),
                    hidden=hidden[index, positions.to(hidden.device)].cpu().clone(),
                )
            )
    return samples
