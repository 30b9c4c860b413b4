"""A language model or a sequence classifier as judge, in batches, streamed where it does not fit into memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qrealign.data.batching import run_in_batches
from qrealign.data.encode import Batch, ChatEncoder
from qrealign.data.generate import generate_ids
from qrealign.errors import ModelError
from qrealign.judges.forms import JudgeForm, find_form, split_form
from qrealign.judges.question import Unread, settle_verdicts
from qrealign.models.device import choose_device
from qrealign.models.loading import load_or_stream
from qrealign.models.source import ModelSource, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE_TOKENS = 8  # a text cut between two tokens may come back as a few more


class ModelJudge:
    """Judges by a model of `FORMS`. It takes memory only while it judges: each call loads it and lets it go.

    A verdict that cannot be read counts as harmful, and `note` says how many there were.
    """

    def __init__(
        self, name: str, source: ModelSource, form: JudgeForm, device: torch.device, batch_size: int, progress: bool
    ) -> None:
        self.name = name
        self.form = form
        self.note = f"asked in the form {form.name}"
        self._unread = Unread()
        self._source = source
        self._device = device
        self._batch_size = batch_size
        self._progress = f"judge {name}" if progress else None

    def harmful(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether each answer does harm.

        Raises:
            JudgeError: no verdict can be read.
            ModelError: the tokenizer is missing, or its chat template does not fit the form.
            DeviceError: the memory does not hold a single question.
        """
        if not prompts:
            return []
        writer = QuestionWriter(self._source.tokenizer(), self.form, _known_positions(self._source.config))
        questions = [writer.write(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        model = load_or_stream(self._source, self._device)
        try:
            if self.form.verdict is None:
                return self._classify(model, writer.encoder, questions)
            return self._ask(model, writer.encoder, questions, self.form.verdict)
        finally:
            del model
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _ask(
        self, model: PreTrainedModel, encoder: ChatEncoder, questions: Sequence[Sequence[int]], pattern: str
    ) -> list[bool]:
        """Return the verdicts that a language model writes."""
        written = generate_ids(
            model,
            encoder,
            questions,
            max_new_tokens=self.form.max_new_tokens,
            batch_size=self._batch_size,
            progress=self._progress,
        )
        verdicts = settle_verdicts([encoder.decode(ids) for ids in written], pattern, self.name, self._unread)
        self.note = f"asked in the form {self.form.name}{self._unread.remark()}"
        return verdicts

    def _classify(self, model: PreTrainedModel, encoder: ChatEncoder, questions: Sequence[Sequence[int]]) -> list[bool]:
        """Return whether a classifier gives some label a probability above the threshold, for each question."""
        order = sorted(range(len(questions)), key=lambda index: len(questions[index]), reverse=True)
        verdicts = [False] * len(questions)

        def work(indices: Sequence[int]) -> list[bool]:
            batch = encoder.pad([questions[index] for index in indices]).to(self._device)
            return (label_probabilities(model, batch).amax(dim=1) > self.form.threshold).tolist()

        for indices, found in run_in_batches(work, order, self._batch_size):
            for index, verdict in zip(indices, found, strict=True):
                verdicts[index] = verdict
        return verdicts


@torch.no_grad()
def label_probabilities(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the probability of every label, `[B, labels]` float32, from the last real token of each row.

    The model's own pooling looks for the last token that is no padding by its id, and errs where a text ends in the
    id that pads; the mask knows.
    """
    hidden = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    rows = torch.arange(len(batch.last_index), device=hidden.device)
    return torch.sigmoid(model.get_submodule("score")(hidden[rows, batch.last_index]).float())


class QuestionWriter:
    """Turns a prompt and an answer into the token ids that a judge of one form reads.

    Args:
        tokenizer: the judge's.
        form: how it is asked.
        positions: most tokens that the judge can read, or None.

    Raises:
        ModelError: the form needs a chat template and the tokenizer has none, or none that shows the answer.
    """

    def __init__(self, tokenizer: Any, form: JudgeForm, positions: int | None) -> None:
        self.form = form
        self._template = tokenizer.chat_template
        tokenizer.chat_template = None  # below, the template is given by hand; the encoder only pads and decodes
        self._tokenizer = tokenizer
        longest = min(form.max_length, positions or form.max_length) - (form.max_new_tokens if form.verdict else 0)
        self.encoder = ChatEncoder(tokenizer, max_length=longest)
        if form.layout != "text" and not self._template:
            raise ModelError(
                f"the judge's tokenizer has no chat template, which the form {form.name} needs: use a checkpoint that "
                "has one"
            )
        self._as_parts = form.layout == "conversation" and not self._shows(as_parts=False)
        if self._as_parts and not self._shows(as_parts=True):
            raise ModelError(
                f"the chat template of the judge's tokenizer shows no answer in the form {form.name}: use the "
                "checkpoint as its authors publish it"
            )
        self._longest = longest
        self._room = longest - len(self._encode("", "")) - _SPARE_TOKENS
        if self._room < _SPARE_TOKENS:
            raise ModelError(f"the judge reads {longest} tokens, too few for a question in the form {form.name}")

    def write(self, prompt: str, answer: str) -> list[int]:
        """Return the ids of one question. What does not fit is cut: the prompt above half the room, the answer."""
        ids = self._encode(prompt, answer)
        if len(ids) <= self._longest:
            return ids
        prompt = self._cut(prompt, self._room // 2)
        return self._encode(prompt, self._cut(answer, self._room - len(self._tokens(prompt))))

    def _encode(self, prompt: str, answer: str) -> list[int]:
        text = self._render(prompt, answer, self._as_parts)
        return list(self._tokenizer(text, add_special_tokens=self.form.layout == "text", verbose=False).input_ids)

    def _render(self, prompt: str, answer: str, as_parts: bool) -> str:
        if self.form.layout == "text":
            return self.form.template.format(prompt=prompt, answer=answer)
        if self.form.layout == "user_turn":
            turns = [("user", self.form.template.format(prompt=prompt, answer=answer))]
        else:
            turns = [("user", prompt), ("assistant", answer)]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in turns
        ]
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=self.form.layout == "user_turn",
                enable_thinking=False,
            )
        )

    def _shows(self, *, as_parts: bool) -> bool:
        """Tell whether the chat template takes a conversation in this shape and shows the answer."""
        try:
            return "mark of the answer" in self._render("mark of the prompt", "mark of the answer", as_parts)
        except Exception:  # jinja2's errors, and whatever the template's own code raises
            return False

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _cut(self, text: str, tokens: int) -> str:
        """Return the beginning of `text` that takes at most `tokens` tokens."""
        ids = self._tokens(text)
        return text if len(ids) <= tokens else self.encoder.decode(ids[:tokens])


def open_model_judge(spec: str, *, device: str, batch_size: int, progress: bool) -> ModelJudge:
    """Open the judge `MODEL` or `MODEL#form`, a Hub id or a folder; no weights are read.

    Raises:
        JudgeError: the form is unknown or cannot be found.
        ModelError: the model cannot be used; subclasses say why.
        AbsentDeviceError: the device is absent.
    """
    model, form_name = split_form(spec)
    # A Hub id must tell its form by its name: nobody waits for 26 GB to read that it cannot be asked.
    form = find_form(model, form_name, _read_config(Path(model).expanduser()))
    source = open_model(model, head="classification" if form.verdict is None else "language")
    return ModelJudge(spec.rstrip("/").rpartition("/")[2], source, form, choose_device(device), batch_size, progress)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return config.json as it stands, empty where there is none: `open_model` says what is wrong."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _known_positions(config: Any) -> int | None:
    return getattr(config, "max_position_embeddings", None)
