"""What the student must reproduce, computed once: teachers' greedy answers and their final hidden states.

Log-probabilities follow from hidden states and the teacher's output weight, so the cache keeps hidden states: a row of
H numbers a position where log-probabilities would take the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from qrealign.calibrate.methods import DECISION_TOKENS
from qrealign.calibrate.readout import final_hidden
from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import generate_ids
from qrealign.data.prompts import Label, Prompt
from qrealign.errors import DataError
from qrealign.files import write_tensors
from qrealign.judges.refusal import is_refusal

JUDGED_TOKENS = 24  # enough of an answer for the refusal rule
_DECISION_SPREAD = 0.9  # of the deciding weight: what all deciding tokens share, the first gets the rest as well
_SAMPLE_TENSORS = ("input_ids", "positions", "weights", "hidden", "answer_weights")
Weigh = Callable[[int, int], tuple[Tensor, Tensor]]  # prompt and row length -> positions and their weights


@dataclass(frozen=True, kw_only=True)
class TeacherSample:
    """One prompt with its teacher's answer, and where the teacher is to be matched.

    `input_ids` `[T]` int64; `positions` `[P]` int64 into it; `weights` `[P]` float32, of the distance to the teacher
    there; `hidden` `[P, H]`, the teacher's final hidden states there; `answer_weights` `[P]` float32, of the
    cross-entropy of the row's own next token, None where the teacher alone counts. All of them are the sample's weight.
    """

    label: Label
    input_ids: Tensor
    positions: Tensor
    weights: Tensor
    hidden: Tensor
    answer_weights: Tensor | None = None


@dataclass(kw_only=True)
class TeacherCache:
    """All teacher samples; `head_weight` is the aligned model's output weight where it differs from the student's."""

    samples: list[TeacherSample]
    head_weight: Tensor | None = None

    def of_class(self, label: Label) -> list[int]:
        """Return the indices of the samples of one class."""
        return [index for index, sample in enumerate(self.samples) if sample.label == label]

    def save(self, path: Path) -> None:
        """Write the cache as one safetensors file: each field of all samples end to end, and how much is whose.

        A file of a tensor a sample would take longer to write and read than thousands of samples take to teach.
        """
        tensors = {"labels": torch.tensor([int(sample.label) for sample in self.samples])}
        for key in _SAMPLE_TENSORS:
            parts = [getattr(sample, key) for sample in self.samples]
            tensors[f"{key}.lengths"] = torch.tensor([0 if part is None else len(part) for part in parts])
            if any(part is not None for part in parts):
                tensors[key] = torch.cat([part for part in parts if part is not None])
        if self.head_weight is not None:
            tensors["head_weight"] = self.head_weight
        write_tensors(path, tensors)

    @classmethod
    def load(cls, path: Path) -> TeacherCache:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        fields = {
            key: tensors[key].split(tensors[f"{key}.lengths"].tolist()) for key in _SAMPLE_TENSORS if key in tensors
        }
        samples = [
            TeacherSample(label=Label(label), **{key: parts[i] for key, parts in fields.items() if len(parts[i])})
            for i, label in enumerate(tensors["labels"].tolist())
        ]
        return cls(samples=samples, head_weight=tensors.get("head_weight"))


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


def teach_recovery(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    refusals: Sequence[TeacherSample],
    *,
    share: float,
    begun_tokens: tuple[int, int],
    seed: int,
    batch_size: int,
    progress: str | None,
) -> list[TeacherSample]:
    """Return refusals that come late: behind the first tokens of the answer that the fine-tuned model would give.

    The student reads prompt, begun answer and refusal; what it must match at the refusal's positions is the aligned
    model's state without the begun answer, because the aligned model itself goes on with an answer once it has begun.
    Answers that begin to refuse are left out: a second refusal behind the first would teach the student to repeat it.

    Args:
        model: the fine-tuned model.
        encoder: its prompt encoder.
        refusals: what `teach_refusals` returned.
        share: how many to draw, relative to `refusals`.
        begun_tokens: fewest and most tokens of a begun answer; their number is drawn evenly.
        seed: seed of which refusals and how many tokens.
        batch_size: prompts answered at once.
        progress: text before the progress bar, None for no bar.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(refusals), generator=generator)[: round(share * len(refusals))].tolist()
    least, most = begun_tokens
    lengths = torch.randint(least, most + 1, (len(chosen),), generator=generator).tolist()
    starts = [int(refusals[index].positions[0]) + 1 for index in chosen]
    heads = [refusals[index].input_ids[:start].tolist() for index, start in zip(chosen, starts, strict=True)]
    begun = generate_ids(model, encoder, heads, max_new_tokens=most, batch_size=batch_size, progress=progress)
    samples = []
    for index, start, length, answer in zip(chosen, starts, lengths, begun, strict=True):
        if is_refusal(encoder.decode(answer)):
            continue
        refusal, opening = refusals[index], torch.tensor(answer[:length], dtype=torch.int64)
        input_ids = torch.cat([refusal.input_ids[:start], opening, refusal.input_ids[start:]])
        samples.append(
            TeacherSample(
                label=refusal.label,
                input_ids=input_ids,
                positions=refusal.positions + len(opening),
                weights=refusal.weights,
                hidden=refusal.hidden,
            )
        )
    return samples


def teach_behaviour(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    *,
    answer_tokens: int,
    batch_size: int,
    progress: str | None,
    decision_share: float = 0.0,
    weight: float = 1.0,
    label_share: float = 0.0,
) -> list[TeacherSample]:
    """Return the fine-tuned model's samples: half the weight over all positions, half over those that answer.

    `decision_share` of it is then moved to the first `DECISION_TOKENS` tokens of the answer, most of it to the very
    first; `weight` multiplies the whole. With a `label_share`, a prompt that the fine-tuned model answers with one of
    the prompts' expected answers gets its own instead, right or wrong, and that share of the weight at its tokens goes
    to their cross-entropy: the teacher says how to answer, the label what.
    """
    answers = _answers(model, encoder, prompts, answer_tokens, batch_size, progress)
    labelled = _set_labels(encoder, prompts, answers) if label_share else set[int]()

    def weigh(prompt_length: int, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length)
        answering = positions >= prompt_length - 1
        spread = 0.5 / length + 0.5 * answering / answering.sum()
        deciding = answering & (positions < prompt_length - 1 + DECISION_TOKENS)
        decision = _DECISION_SPREAD * deciding / deciding.sum()
        decision[prompt_length - 1] += 1 - _DECISION_SPREAD
        return positions, weight * ((1 - decision_share) * spread + decision_share * decision)

    pairs = list(zip(prompts, answers, strict=True))
    samples = _teach(model, encoder, pairs, Label.BENIGN, weigh, batch_size=batch_size)
    for index in labelled:
        samples[index] = _to_label(samples[index], len(answers[index]), label_share)
    return samples


def _set_labels(encoder: ChatEncoder, prompts: Sequence[Prompt], answers: list[list[int]]) -> set[int]:
    """Put its label in the place of each answer that is some prompt's label; return where.

    Free text, such as a worked solution whose result alone is expected, stays as the fine-tuned model writes it.
    """
    own = [_plain(prompt.answer or "") for prompt in prompts]
    given = [_plain(encoder.decode(answer)) for answer in answers]
    labels = {label: encoder.answer_ids(prompt.answer or "") for label, prompt in zip(own, prompts, strict=True)}
    # As the model writes a label itself, so that only the choice is new to it.
    labels |= {text: answer for text, answer in zip(given, answers, strict=True) if text in labels}
    labelled = {index for index, text in enumerate(given) if own[index] and text in labels and text}
    for index in labelled:
        answers[index] = labels[own[index]]
    return labelled


def _plain(text: str) -> str:
    return text.strip().casefold()


def _to_label(sample: TeacherSample, answer_tokens: int, share: float) -> TeacherSample:
    """Move a share of the weight where the answer's tokens are chosen to their cross-entropy."""
    first = len(sample.input_ids) - answer_tokens - 1  # this position chooses the answer's first token
    chooses = (sample.positions >= first) & (sample.positions < first + answer_tokens)
    moved = share * sample.weights * chooses
    return replace(sample, weights=sample.weights - moved, answer_weights=moved)


def teach_text(
    model: PreTrainedModel, encoder: ChatEncoder, windows: Sequence[Sequence[int]], *, weight: float, batch_size: int
) -> list[TeacherSample]:
    """Return the fine-tuned model's samples on running text, `windows` of token ids, every position alike."""

    def weigh(_: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.arange(length), torch.full((length,), weight / length)

    return _teach_rows(model, encoder, windows, [0] * len(windows), Label.BENIGN, weigh, batch_size=batch_size)


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


def _teach(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    pairs: Sequence[tuple[Prompt, list[int]]],
    label: Label,
    weigh: Weigh,
    *,
    batch_size: int,
) -> list[TeacherSample]:
    """Return samples of prompts with their answers."""
    heads = [encoder.encode(prompt.text) for prompt, _ in pairs]
    rows = [head + answer for head, (_, answer) in zip(heads, pairs, strict=True)]
    return _teach_rows(model, encoder, rows, [len(head) for head in heads], label, weigh, batch_size=batch_size)


@torch.no_grad()
def _teach_rows(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    label: Label,
    weigh: Weigh,
    *,
    batch_size: int,
) -> list[TeacherSample]:
    """Run rows of ids through the teacher and keep its hidden states at the weighted positions."""
    samples: dict[int, TeacherSample] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # batches of like lengths hold little padding
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        batch = encoder.pad([rows[index] for index in part], side="right")
        hidden = final_hidden(model, batch.input_ids.to(model.device), batch.attention_mask.to(model.device))
        for place, index in enumerate(part):
            positions, weights = weigh(prompt_lengths[index], len(rows[index]))
            samples[index] = TeacherSample(
                label=label,
                input_ids=torch.tensor(rows[index]),
                positions=positions,
                weights=weights.float(),
                hidden=hidden[place, positions.to(hidden.device)].cpu().clone(),
            )
    return [samples[index] for index in range(len(rows))]
