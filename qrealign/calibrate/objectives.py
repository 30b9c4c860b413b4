"""What the end-to-end engine minimises: one small class per objective, chosen by the method's settings."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from qrealign.calibrate.losses import contrast_terms, divergence, preference_loss
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.readout import final_hidden, readout
from qrealign.calibrate.teachers import TeacherCache, TeacherSample
from qrealign.data.batching import to_device
from qrealign.data.prompts import Label

PACKED_SHARE = 0.75  # of the tokens of padded batches: what packed ones may have at most
ROUND_TO = 8  # tokens: what the attention kernels want of a sequence's length

ANSWER = "answer"  # the loss of tokens that are given, not taught
LOSS_NAMES = ("malicious", "benign", "pull", "push", "preference", ANSWER)  # of all objectives


class Objective(Protocol):
    """A loss over cached samples.

    `samples` are what batches are drawn from. A batch may be split for memory: `losses` gets a part of it and what
    `count` said of the whole batch, and the parts' losses must add up to the batch's.
    """

    @property
    def samples(self) -> Sequence[Any]: ...

    def groups(self) -> tuple[list[int], list[int]]:
        """Return the sample indices of the two classes that every batch mixes; either may be empty."""
        ...

    def count(self, samples: Sequence[Any]) -> Mapping[str, int]:
        """Return what a batch's losses are divided by."""
        ...

    def length(self, sample: Any) -> int:
        """Return the tokens of a sample's longest sequence."""
        ...

    def losses(self, model: PreTrainedModel, samples: Sequence[Any], counts: Mapping[str, int]) -> dict[str, Tensor]:
        """Return losses of `samples` by names of `LOSS_NAMES`, scalars with gradients; their sum is minimised."""
        ...


@dataclass(frozen=True, kw_only=True)
class Room:
    """The size that batches are padded to.

    `length` counts the tokens of a sequence or, with `packed`, those of all of them, which then stand in one row.
    `positions` counts the matched positions of each class by its name.
    """

    length: int
    positions: Mapping[str, int]
    packed: bool = False


class BehaviourObjective:
    """Malicious prompts: KL to the aligned model. All others: KL to the fine-tuned model, times `benign_weight`.

    Labels of task prompts are learned by cross-entropy, as much as their samples say.

    `losses` is `losses_of` the batch that `collate` makes of the samples; with a `room` all batches have one shape.
    """

    def __init__(
        self, cache: TeacherCache, settings: CalibrationSettings, *, pad_id: int, device: torch.device
    ) -> None:
        self.samples = cache.samples
        self.class_weight = {"malicious": 1.0, "benign": settings.benign_weight}
        self.pad_id, self.device = pad_id, device
        self.head_weight = None if cache.head_weight is None else cache.head_weight.to(device)
        self._groups = (cache.of_class(Label.MALICIOUS), cache.of_class(Label.BENIGN))

    def groups(self) -> tuple[list[int], list[int]]:
        return self._groups

    def count(self, samples: Sequence[TeacherSample]) -> Mapping[str, int]:
        return Counter(sample.label.name.lower() for sample in samples)

    def length(self, sample: TeacherSample) -> int:
        return len(sample.input_ids)

    def losses(
        self, model: PreTrainedModel, samples: Sequence[TeacherSample], counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return each class's loss summed over `samples` and divided by its count, the benign one weighted."""
        batch = self.collate(samples, counts)
        return self.losses_of(model, {name: to_device(tensor, self.device) for name, tensor in batch.items()})

    def room(self, batches: Iterable[Sequence[TeacherSample]], *, may_pack: bool = False) -> Room:
        """Return the room that the largest of some batches needs, lengths rounded up for the kernels' sake.

        Where sequences may be packed, they are if that leaves out a quarter of the tokens: attention in one long row
        costs a little more.
        """
        padded, packed, rows, positions = 1, 1, 1, Counter[str]()
        for samples in batches:
            lengths = [len(sample.input_ids) for sample in samples]
            padded, packed, rows = max(padded, *lengths), max(packed, sum(lengths)), max(rows, len(samples))
            matched = Counter[str]()
            for sample in samples:
                matched[sample.label.name.lower()] += len(sample.positions)
                if sample.answer_weights is not None:
                    matched[ANSWER] += int(sample.answer_weights.count_nonzero())
            positions |= matched
        pack = may_pack and packed <= PACKED_SHARE * rows * padded
        length = -(-(packed if pack else padded) // ROUND_TO) * ROUND_TO
        return Room(length=length, positions=positions, packed=pack)

    def collate(
        self, samples: Sequence[TeacherSample], counts: Mapping[str, int], room: Room | None = None
    ) -> dict[str, Tensor]:
        """Return a batch as host tensors.

        `input_ids` `[B, T]`, padded on the right, or packed `[1, T]` with `sequence` `[T]`, which one each token is of,
        and `position` `[1, T]`, where in it; and by class `C` what its positions must match: `C.places` `[P]` int64
        into the tokens, `C.hidden` `[P, H]` and `C.weights` `[P]` float32, which hold all that the loss is multiplied
        with; labels have `answer.tokens` `[Q]` int64 instead of hidden states. Padding up to `room` weighs nothing.
        """
        batch, starts = self._lay_out([sample.input_ids for sample in samples], room)
        for name, class_weight in self.class_weight.items():
            rows = [(row, sample) for row, sample in enumerate(samples) if sample.label.name.lower() == name]
            missing = 0 if room is None else room.positions.get(name, 0) - sum(len(s.positions) for _, s in rows)
            if not rows and not missing:
                continue
            places = [starts[row] + sample.positions for row, sample in rows]
            hidden = [sample.hidden for _, sample in rows]
            weights = [sample.weights * (class_weight / counts[name]) for _, sample in rows]
            if missing:
                like = samples[0]
                places.append(like.positions.new_zeros(missing))
                hidden.append(like.hidden.new_zeros(missing, like.hidden.shape[1]))
                weights.append(like.weights.new_zeros(missing))
            batch |= {
                f"{name}.places": torch.cat(places),
                f"{name}.hidden": torch.cat(hidden),
                f"{name}.weights": torch.cat(weights),
            }
        return batch | self._answers(samples, starts, counts, room)

    def _answers(
        self, samples: Sequence[TeacherSample], starts: Sequence[int], counts: Mapping[str, int], room: Room | None
    ) -> dict[str, Tensor]:
        """Return what of a batch is learned as it stands: `answer.places`, `.tokens` and `.weights`, all `[Q]`."""
        places, tokens, weights = [], [], []
        for start, sample in zip(starts, samples, strict=True):
            if sample.answer_weights is None:
                continue
            name = sample.label.name.lower()
            index = sample.answer_weights.nonzero()[:, 0]
            at = sample.positions[index]
            places.append(start + at)
            tokens.append(sample.input_ids[at + 1])
            weights.append(sample.answer_weights[index] * (self.class_weight[name] / counts[name]))
        missing = 0 if room is None else room.positions.get(ANSWER, 0) - sum(map(len, places))
        if missing:
            places.append(torch.zeros(missing, dtype=torch.int64))
            tokens.append(torch.zeros(missing, dtype=torch.int64))
            weights.append(torch.zeros(missing))
        parts = {"places": places, "tokens": tokens, "weights": weights}
        return {f"{ANSWER}.{name}": torch.cat(part) for name, part in parts.items()} if places else {}

    def _lay_out(self, rows: Sequence[Tensor], room: Room | None) -> tuple[dict[str, Tensor], list[int]]:
        """Return sequences as a batch's tokens, and the place of each one's first token among all of them."""
        if room is None or not room.packed:
            input_ids = pad_sequence(list(rows), batch_first=True, padding_value=self.pad_id)
            if room is not None:
                input_ids = F.pad(input_ids, (0, room.length - input_ids.shape[1]), value=self.pad_id)
            return {"input_ids": input_ids}, [row * input_ids.shape[1] for row in range(len(rows))]
        lengths = [len(row) for row in rows]
        fill = room.length - sum(lengths)  # a sequence of its own, which nothing looks at
        tokens = torch.cat([*rows, rows[0].new_full((fill,), self.pad_id)])
        places = torch.cat([torch.arange(length) for length in (*lengths, fill)])
        sequence = torch.repeat_interleave(torch.tensor([*lengths, fill]))
        starts = [0, *itertools.accumulate(lengths)][:-1]
        return {"input_ids": tokens[None], "position": places[None], "sequence": sequence}, starts

    def losses_of(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of each class in a batch that `collate` made, its tensors on the device.

        A `mask`, which `readout.causal_mask` makes, may be among them; packed sequences need it.
        """
        mask, sequence = batch.get("mask"), batch.get("sequence")
        if mask is not None and sequence is not None:
            mask = mask & (sequence[:, None] == sequence)
        hidden = final_hidden(model, batch["input_ids"], mask, batch.get("position"))
        losses = {
            name: _class_loss(
                model,
                hidden,
                batch[f"{name}.places"],
                batch[f"{name}.hidden"],
                batch[f"{name}.weights"],
                self.head_weight if name == "malicious" else None,
            )
            for name in self.class_weight
            if f"{name}.places" in batch
        }
        if f"{ANSWER}.places" in batch:
            student = readout(model, hidden.flatten(0, 1).index_select(0, batch[f"{ANSWER}.places"]))  # [Q, V]
            surprise = F.cross_entropy(student.float(), batch[f"{ANSWER}.tokens"], reduction="none")
            losses[ANSWER] = (surprise * batch[f"{ANSWER}.weights"]).sum()
        return losses


def _class_loss(
    model: PreTrainedModel, hidden: Tensor, places: Tensor, teacher: Tensor, weights: Tensor, head: Tensor | None
) -> Tensor:
    """Return the weighted KL summed over positions; `head` reads the teacher's states, None for the student's own."""
    with torch.no_grad():
        target = readout(model, teacher.to(hidden.dtype), head)
    student = readout(model, hidden.flatten(0, 1).index_select(0, places))  # [P, V]
    return (divergence(target, student) * weights).sum()


@dataclass(frozen=True, kw_only=True)
class ContrastSample:
    """Ordinary text as two models continue it: final hidden states `[P, H]` of both at `positions` `[P]`.

    `input_ids` is `[T]` int64.
    """

    input_ids: Tensor
    positions: Tensor
    aligned: Tensor
    base: Tensor


class ContrastiveObjective:
    """Ordinary text is pulled to the aligned and pushed from the base model, the rest kept as fine-tuned.

    Args:
        contrast: samples of the contrastive term.
        aligned_head, base_head: output weights `[V, H]` where they differ from the student's, else None.
        utility: the fine-tuned model's samples, weighted by `benign_weight`.
        settings: `contrast_alpha`, `contrast_top` and `push_limit` shape the term.

    Source: arXiv 2511.07842; its push term has no lower bound, this one stops at `push_limit` nats a position. The KL
    to the fine-tuned model is added: the paper keeps an alignment that is still there, and has no task to keep.
    """

    def __init__(
        self,
        contrast: Sequence[ContrastSample],
        aligned_head: Tensor | None,
        base_head: Tensor | None,
        utility: TeacherCache,
        settings: CalibrationSettings,
        *,
        pad_id: int,
        device: torch.device,
    ) -> None:
        self.samples: list[ContrastSample | TeacherSample] = [*contrast, *utility.samples]
        self.settings, self.pad_id = settings, pad_id
        self.heads = [None if head is None else head.to(device) for head in (aligned_head, base_head)]
        self._contrast = len(contrast)

    def groups(self) -> tuple[list[int], list[int]]:
        return list(range(self._contrast)), list(range(self._contrast, len(self.samples)))

    def count(self, samples: Sequence[ContrastSample | TeacherSample]) -> Mapping[str, int]:
        return Counter("contrast" if isinstance(sample, ContrastSample) else "benign" for sample in samples)

    def length(self, sample: ContrastSample | TeacherSample) -> int:
        return len(sample.input_ids)

    def losses(
        self, model: PreTrainedModel, samples: Sequence[ContrastSample | TeacherSample], counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return "pull", "push" (negative where it pushes) and "benign"."""
        hidden = _hidden(model, [sample.input_ids for sample in samples], self.pad_id)
        contrast = [(row, sample) for row, sample in enumerate(samples) if isinstance(sample, ContrastSample)]
        utility = [(row, sample) for row, sample in enumerate(samples) if isinstance(sample, TeacherSample)]
        losses = {}
        if contrast:
            terms = torch.stack([self._terms(model, hidden[row], sample) for row, sample in contrast])  # [S, 2]
            losses["pull"], losses["push"] = (terms.sum(dim=0) / counts["contrast"]).unbind()
        if utility:
            weight, length, device = self.settings.benign_weight / counts["benign"], hidden.shape[1], hidden.device
            losses["benign"] = _class_loss(
                model,
                hidden,
                to_device(torch.cat([row * length + sample.positions for row, sample in utility]), device),
                to_device(torch.cat([sample.hidden for _, sample in utility]), device),
                to_device(torch.cat([sample.weights * weight for _, sample in utility]), device),
                None,
            )
        return losses

    def _terms(self, model: PreTrainedModel, hidden: Tensor, sample: ContrastSample) -> Tensor:
        """Return the mean pull and push over one sample's positions, `[2]`."""
        settings, device = self.settings, hidden.device
        with torch.no_grad():
            aligned, base = (
                readout(model, states.to(device, hidden.dtype), head)
                for states, head in zip((sample.aligned, sample.base), self.heads, strict=True)
            )
        student = readout(model, hidden[sample.positions.to(device)])
        pull, push = contrast_terms(aligned, base, student, top=settings.contrast_top, limit=settings.push_limit)
        return torch.stack([pull.mean(), -settings.contrast_alpha * push.mean()])


@dataclass(frozen=True, kw_only=True)
class PairSample:
    """One prompt with a preferred and a rejected answer, and the reference's log-probabilities of both.

    `chosen` `[Tc]` and `rejected` `[Tr]` are prompt and answer, int64; `start` `[]` int64 is the prompt's length;
    `reference` `[2]` float32 holds the summed log-probabilities of the chosen and the rejected answer.
    """

    chosen: Tensor
    rejected: Tensor
    start: Tensor
    reference: Tensor


class PreferenceObjective:
    """Direct preference optimisation: chosen answers gain on rejected ones, measured against the cached reference.

    Source: DPO, arXiv 2305.18290, as Q-resafe uses it (arXiv 2506.20251); the reference is the quantized model.
    """

    def __init__(self, pairs: Sequence[PairSample], settings: CalibrationSettings, *, pad_id: int) -> None:
        self.samples = pairs
        self.beta, self.pad_id = settings.preference_beta, pad_id

    def groups(self) -> tuple[list[int], list[int]]:
        return list(range(len(self.samples))), []

    def count(self, samples: Sequence[PairSample]) -> Mapping[str, int]:
        return {"preference": len(samples)}

    def length(self, sample: PairSample) -> int:
        return max(len(sample.chosen), len(sample.rejected))

    def losses(
        self, model: PreTrainedModel, samples: Sequence[PairSample], counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        rows = [sample.chosen for sample in samples] + [sample.rejected for sample in samples]
        starts = [int(sample.start) for sample in samples] * 2
        chosen, rejected = answer_log_probs(model, rows, starts, self.pad_id).chunk(2)
        reference = torch.stack([sample.reference for sample in samples]).to(chosen.device)  # [B, 2]
        losses = preference_loss(chosen - reference[:, 0], rejected - reference[:, 1], self.beta)
        return {"preference": losses.sum() / counts["preference"]}


@dataclass(frozen=True, kw_only=True)
class AnswerSample:
    """A prompt with the answer to be learned, `input_ids` `[T]` int64; `start` is the prompt's length."""

    input_ids: Tensor
    start: int


class AnswerObjective:
    """Supervised fine-tuning: cross-entropy of the answers' tokens, the mean over each answer."""

    def __init__(self, samples: Sequence[AnswerSample], *, pad_id: int) -> None:
        self.samples, self.pad_id = samples, pad_id

    def groups(self) -> tuple[list[int], list[int]]:
        return list(range(len(self.samples))), []

    def count(self, samples: Sequence[AnswerSample]) -> Mapping[str, int]:
        return {"answer": len(samples)}

    def length(self, sample: AnswerSample) -> int:
        return len(sample.input_ids)

    def losses(
        self, model: PreTrainedModel, samples: Sequence[AnswerSample], counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        rows, starts = [sample.input_ids for sample in samples], [sample.start for sample in samples]
        lengths = torch.tensor([len(row) - start for row, start in zip(rows, starts, strict=True)])
        log_probs = answer_log_probs(model, rows, starts, self.pad_id)
        return {ANSWER: -(log_probs / lengths.to(log_probs.device)).sum() / counts["answer"]}


def answer_log_probs(model: PreTrainedModel, rows: Sequence[Tensor], starts: Sequence[int], pad_id: int) -> Tensor:
    """Return the summed log-probability of each answer given its prompt, `[B]` float32.

    Args:
        model: any causal language model, its head on its own device.
        rows: prompt and answer of each sample, `[T]` int64.
        starts: where each answer begins.
        pad_id: fills the batch.
    """
    hidden = _hidden(model, rows, pad_id)
    sums = []
    for row, start, states in zip(rows, starts, hidden, strict=True):
        logits = readout(model, states[start - 1 : len(row) - 1]).float()  # [answer, V]
        sums.append(-F.cross_entropy(logits, row[start:].to(logits.device), reduction="sum"))
    return torch.stack(sums)


def _hidden(model: PreTrainedModel, rows: Sequence[Tensor], pad_id: int) -> Tensor:
    """Return the final hidden states `[B, T, H]` of sequences padded on the right.

    No real token sees what stands behind it, and what comes out at padding enters no loss, so padding is not masked.
    """
    input_ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    return final_hidden(model, to_device(input_ids, model.device))
