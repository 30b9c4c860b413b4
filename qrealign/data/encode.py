"""Prompts as token ids: one chat form, one BOS, and batches padded on either side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qrealign.errors import DataError, ModelError
from qrealign.files import sha256_of_text

PLAIN_FORM = "### Instruction:\n{}\n\n### Response:\n"
# Templates that print the date would give other tokens tomorrow; templates that know no such variable ignore it. The
# answer itself is what is judged, so a reasoning model is asked without its thinking part.
_TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024", "enable_thinking": False}
_PROBE_TEXT = "probe of the chat template"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A padded batch: `input_ids` and `attention_mask` `[B, T]`, `last_index` `[B]` (last real token), all int64."""

    input_ids: Tensor
    attention_mask: Tensor
    last_index: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`."""
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            last_index=self.last_index.to(device),
        )


def last_real_index(attention_mask: Tensor) -> Tensor:
    """Return the position of each row's last real token, `[B]` int64, whichever side `attention_mask` `[B, T]` pads."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask.long() * positions).amax(dim=1)


class ChatEncoder:
    """Turns prompts into the token ids that the model answers, and answers back into text.

    The tokenizer's chat template decides the form, with the generation prompt on. A system text goes into the user turn
    where the template refuses or drops it. Without a template the plain "### Instruction" form is used. No sequence
    starts with two BOS tokens. A prompt that is too long loses the end of its own text, never the template's parts.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens of one sequence, answer included.
        system: system text, or None for the template's own default.

    Raises:
        ModelError: the chat template cannot be rendered.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.system = system
        self.has_template = bool(tokenizer.chat_template)
        self._cut: set[str] = set()
        self._system_in_user_turn = system is not None and not self._template_takes_system()
        self._adds_bos = _adds_bos(tokenizer)
        self._overhead = len(self._ids(_PROBE_TEXT)) - len(self._tokenize(_PROBE_TEXT))

    @property
    def notes(self) -> list[str]:
        """What a reader of the results should know about how prompts were written."""
        notes = []
        if not self.has_template:
            notes.append(
                "the tokenizer has no chat template: prompts use the plain form '### Instruction: ... ### Response:'"
            )
        elif self._system_in_user_turn:
            notes.append("the chat template takes no system role: the system text stands at the start of the user turn")
        if self._cut:
            notes.append(
                f"{len(self._cut)} prompts did not fit into {self.max_length} tokens: the end of their text was cut"
            )
        return notes

    def encode(self, text: str, answer: str | None = None) -> list[int]:
        """Return the ids of a prompt up to where the answer begins, followed by those of `answer` where given.

        An answer keeps at most half of `max_length`.

        Raises:
            DataError: the prompt is empty, or `max_length` cannot hold the template.
        """
        return self.encode_many([text], None if answer is None else [answer])[0]

    def encode_many(
        self, texts: Sequence[str], answers: Sequence[str] | None = None, *, answer_tokens: int | None = None
    ) -> list[list[int]]:
        """Return `encode(text, answer)` for each prompt; an answer keeps at most `answer_tokens`, where given."""
        if any(not text.strip() for text in texts):
            raise DataError("an empty prompt cannot be asked: remove it from the data")
        tails = [[] if answers is None else self.answer_ids(answers[i], answer_tokens) for i in range(len(texts))]
        rendered = [self._render(text) for text in texts]
        encoded = self.tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids if texts else []
        result = []
        for text, ids, tail in zip(texts, encoded, tails, strict=True):
            head, room = self._with_one_bos(ids), self.max_length - len(tail)
            result.append((head if len(head) <= room else self._encode_cut(text, room)) + tail)
        return result

    def encode_conversation(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation up to where the next answer begins; nothing is cut.

        Args:
            turns: `role` (system, user or assistant) and `content` of each turn, in order.

        Raises:
            ModelError: the chat template refuses the conversation.
        """
        return self._with_one_bos(self._tokenize(self._render_conversation([dict(turn) for turn in turns])))

    def answer_ids(self, answer: str, most: int | None = None) -> list[int]:
        """Return the ids that stand for `answer` behind a prompt: `most` at most, and half of `max_length`."""
        room = self.max_length // 2
        return self._tokenize(answer)[: room if most is None else min(most, room)]

    def pad(self, sequences: Sequence[Sequence[int]], side: Literal["left", "right"] = "right") -> Batch:
        """Pad sequences of ids to the longest one.

        Raises:
            ValueError: there is no sequence, or one is empty.
        """
        if not sequences or any(len(ids) == 0 for ids in sequences):
            raise ValueError("a batch needs at least one sequence, and no empty one")
        width = max(len(ids) for ids in sequences)
        input_ids = torch.full((len(sequences), width), self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(sequences):
            place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
            input_ids[row, place] = torch.as_tensor(ids, dtype=torch.int64)
            attention_mask[row, place] = 1
        return Batch(input_ids=input_ids, attention_mask=attention_mask, last_index=last_real_index(attention_mask))

    @property
    def pad_id(self) -> int:
        """Id that fills a batch; it is always masked, so any id serves where the tokenizer names none."""
        tokenizer = self.tokenizer
        return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_behind(self, begun: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of `ids` behind `begun`, with the space between the two that decoding `ids` alone loses."""
        head, whole = self.decode(begun), self.decode([*begun, *ids])
        return whole[len(head) :] if whole.startswith(head) else self.decode(ids)

    def fingerprint(self) -> str:
        """Return a SHA-256 over everything that decides which ids a prompt gets."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        return sha256_of_text(
            self._render(_PROBE_TEXT),
            str(self.tokenizer.chat_template),
            words,
            str(self.max_length),
            str(self._adds_bos),
        )

    def _encode_cut(self, text: str, room: int) -> list[int]:
        """Return the ids of the longest beginning of `text` that fits into `room` tokens, template included."""
        self._cut.add(text)
        low, high = 0, len(text)  # text[:low] fits; text[:high] does not
        best: list[int] = []
        while high - low > 1:
            middle = (low + high) // 2
            ids = self._ids(text[:middle]) if text[:middle].strip() else []
            if len(ids) <= room:
                low, best = middle, ids
            else:
                high = middle
        if not best:
            raise DataError(
                f"{self.max_length} tokens cannot hold a prompt: the chat form alone takes about {self._overhead}, so "
                "ask for a longer sequence"
            )
        return best

    def _ids(self, text: str) -> list[int]:
        return self._with_one_bos(self._tokenize(self._render(text)))

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        """Return `ids` with no BOS repeated, and with the tokenizer's own BOS in the plain form."""
        bos = self.tokenizer.bos_token_id
        ids = list(ids)
        if not self.has_template and self._adds_bos:
            ids = [bos, *ids]
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def _render(self, text: str) -> str:
        if self.system is not None and (self._system_in_user_turn or not self.has_template):
            text = f"{self.system}\n\n{text}"
        if not self.has_template:
            return PLAIN_FORM.format(text)
        system = self.system is not None and not self._system_in_user_turn
        return self._apply_template(
            ([{"role": "system", "content": self.system}] if system else []) + [{"role": "user", "content": text}]
        )

    def _render_conversation(self, turns: list[dict[str, str]]) -> str:
        if self.has_template:
            system = [turn["content"].strip() for turn in turns if turn["role"] == "system"]
            try:
                rendered = self._apply_template(turns)
            except ModelError:
                if not system:
                    raise
            else:
                if all(text in rendered for text in system):
                    return rendered
            return self._apply_template(_system_into_user_turn(turns))
        return "".join(
            PLAIN_FORM.format(turn["content"]) if turn["role"] == "user" else f"{turn['content']}\n\n"
            for turn in _system_into_user_turn(turns)
        )

    def _apply_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True, **_TEMPLATE_VARIABLES
                )
            )
        except Exception as error:  # jinja2's errors, and whatever the template's own code raises
            name = getattr(self.tokenizer, "name_or_path", "") or "the tokenizer"
            raise ModelError(
                f"the chat template of {name} cannot be rendered ({error}): correct it, or remove it for the plain form"
            ) from error

    def _template_takes_system(self) -> bool:
        """Return whether the template shows a system text: some raise on the role, some drop it silently."""
        if not self.has_template:
            return False
        user = {"role": "user", "content": _PROBE_TEXT}
        self._apply_template([user])
        try:
            rendered = self._apply_template([{"role": "system", "content": self.system}, user])
        except ModelError:
            return False
        return str(self.system).strip() in rendered and _PROBE_TEXT in rendered


def _system_into_user_turn(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the turns without system turns, whose text stands at the start of the first user turn."""
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    rest = [turn for turn in turns if turn["role"] != "system"]
    first = next((index for index, turn in enumerate(rest) if turn["role"] == "user"), None)
    if system and first is not None:
        rest[first] = {"role": "user", "content": "\n\n".join([*system, rest[first]["content"]])}
    return rest


def _adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer starts plain text with BOS."""
    return tokenizer.bos_token_id is not None and list(tokenizer(_PROBE_TEXT).input_ids)[:1] == [tokenizer.bos_token_id]
