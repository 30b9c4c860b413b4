"""Prompts by role: what each row of a data file means, which rows a role keeps, and where two sets overlap."""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from qrealign.data.readers import Row, filter_rows, read_rows, split_spec
from qrealign.data.tasks import find_task, without_instruction
from qrealign.errors import DataError

logger = logging.getLogger(__name__)

Role = Literal["malicious", "benign", "task", "over_refusal", "prefill", "text"]

_TEXT_FIELDS = (
    "messages",
    "conversations",
    "prompt",
    "instruction",
    "question",
    "goal",
    "behavior",
    "forbidden_prompt",
    "query",
    "text",
    "sentence",
)
_CORPUS_FIELDS = ("text", "content", "document", "article", "prompt")
_ANSWER_FIELDS = ("answer", "response", "output", "completion", "target")
_BEGINNING_FIELDS = ("prefix", *_ANSWER_FIELDS)
_LABEL_FIELDS = ("label", "malicious", "harmful", "is_harmful")
_BENIGN_LABELS = frozenset({"0", "0.0", "false", "benign", "safe", "harmless"})
# A refused prompt is a harmful one: in prompt-answer pairs the label describes the answer.
_MALICIOUS_LABELS = frozenset({"1", "1.0", "true", "malicious", "harmful", "unsafe", "refusal", "toxic"})
_MIN_CONTAINED_WORDS = 5
_WORD = re.compile(r"[^\W_]+")
_SYMBOL = re.compile(
    r"(?=[\W_])(?:"
    r"(?:(?<=[\d)])|(?<=\b[^\W_]))\s*(?P<operator>[-+*/%^=<>]+)\s*(?=-?[\d(]|[^\W_]\b)"
    r"|(?<![\w)])(?P<sign>-)(?=\d)"
    r"|(?<=[^\W_])(?P<ending>[+#%]+)(?!\w)"
    r"|[^\w\s]|_)"
)
_MEANINGFUL = ("Mn", "Mc", "Sm")  # Unicode categories: the marks of letters, mathematical symbols


class Label(IntEnum):
    """Class of a prompt."""

    BENIGN = 0
    MALICIOUS = 1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt as a user would type it.

    `answer` is the expected answer of a task, a benign row's response, or the answer that a prefill attack begins with.
    """

    text: str
    label: Label | None = None
    source: str = ""
    category: str = ""
    answer: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """A training prompt that has the words of an evaluation prompt (`exact`) or holds all of it (`contained`)."""

    training: str
    evaluation: str
    kind: Literal["exact", "contained"]


PromptT = TypeVar("PromptT", Prompt, str)


def read_prompts(spec: str, *, role: Role) -> list[Prompt]:
    """Read the prompts that `role` needs from a file or a Hub id, without repetitions and in file order.

    `malicious` and `benign` keep the rows of that class, or all rows where the file has no label; `over_refusal` keeps
    the safe rows; `task` turns rows into instructions with answers (see `tasks.py`); `prefill` keeps the rows whose own
    label is a harmful one, with the harmful answer where they have it; `text` keeps running text. A prompt that some
    row of the file labels malicious is malicious in all its rows: pairs label the answer.

    Args:
        spec: path or Hub id, with an optional filter `?field=value,value&field2=value`.
        role: what the prompts are for.

    Raises:
        DataError: the file cannot be read, has no usable field, or has no row for this role.
    """
    if role not in get_args(Role):
        raise DataError(f"unknown role {role!r} for {spec}: use one of {', '.join(get_args(Role))}")
    location, conditions = split_spec(spec)
    all_rows = read_rows(location, paragraphs=role == "text")
    rows = filter_rows(all_rows, conditions, location)
    if role == "task":
        prompts = _task_prompts(rows, location)
    elif role == "prefill":
        prompts = _prefill_prompts(rows, location)
    elif role == "text":
        prompts = [
            _prompt(row, text, None) for row, text in zip(rows, _texts(rows, _CORPUS_FIELDS, location), strict=True)
        ]
    else:
        prompts = _labelled_prompts(rows, all_rows, role, location)
    return _drop_useless(prompts, location, keep_repeated=role == "text")


def _drop_useless(prompts: list[Prompt], location: str, *, keep_repeated: bool) -> list[Prompt]:
    """Drop empty prompts, saying how many, and repetitions."""
    filled = [prompt for prompt in prompts if prompt.text.strip()]
    if not filled:
        raise DataError(f"{location} has no usable prompt: all {len(prompts)} are empty")
    if len(filled) < len(prompts):
        logger.warning("dropped %d empty prompts of %s", len(prompts) - len(filled), location)
    return filled if keep_repeated else deduplicate(filled)


def _labelled_prompts(rows: list[Row], all_rows: list[Row], role: Role, location: str) -> list[Prompt]:
    field = next((name for name in _LABEL_FIELDS if any(_get(row, name) is not None for row in all_rows)), None)
    texts = _texts(rows, _TEXT_FIELDS, location)
    wanted = Label.MALICIOUS if role == "malicious" else Label.BENIGN
    if field is None:
        return [_prompt(row, text, wanted) for row, text in zip(rows, texts, strict=True)]
    malicious = {
        normalise(text)
        for row, text in zip(all_rows, _texts(all_rows, _TEXT_FIELDS, location), strict=True)
        if _label_of(row, field, location) is Label.MALICIOUS
    }
    labels = [Label.MALICIOUS if normalise(text) in malicious else Label.BENIGN for text in texts]
    kept = [_prompt(row, text, label) for row, text, label in zip(rows, texts, labels, strict=True) if label is wanted]
    if not kept:
        found = Counter(label.name.lower() for label in labels)
        counts = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
        raise DataError(
            f"{location} has no {wanted.name.lower()} prompt by its field {field!r} (rows: {counts}): "
            f"give a file with {wanted.name.lower()} rows, or one without labels"
        )
    return kept


def _prefill_prompts(rows: list[Row], location: str) -> list[Prompt]:
    """Return malicious prompts with the answer that an attacker begins for the model; a refusal would begin nothing."""
    field = next((name for name in _LABEL_FIELDS if any(_get(row, name) is not None for row in rows)), None)
    kept = [
        (row, text)
        for row, text in zip(rows, _texts(rows, _TEXT_FIELDS, location), strict=True)
        if field is None
        or (
            _label_of(row, field, location) is Label.MALICIOUS and str(_get(row, field)).strip().casefold() != "refusal"
        )
    ]
    if not kept:
        raise DataError(
            f"{location} has no row for a prefill attack: give rows labelled harmful, or rows without label"
        )
    return [_prompt(row, text, Label.MALICIOUS, _beginning_of(row)) for row, text in kept]


def _beginning_of(row: Row) -> str | None:
    """Return the text that the answer begins with: a field of its own, or the assistant's turn."""
    value = _first(row, _BEGINNING_FIELDS)
    text = value if isinstance(value, str) else _answer_of(row)
    return text if text and text.strip() else None


def _label_of(row: Row, field: str, location: str) -> Label:
    value = _get(row, field)
    text = str(value).strip().casefold()
    if text in _BENIGN_LABELS:
        return Label.BENIGN
    if text in _MALICIOUS_LABELS:
        return Label.MALICIOUS
    raise DataError(
        f"{location} has the label {value!r} in its field {field!r}: use 0 or 1, benign or malicious, safe or unsafe"
    )


def _task_prompts(rows: list[Row], location: str) -> list[Prompt]:
    texts = _texts(rows, _TEXT_FIELDS, location)
    name = Path(location).name if Path(location).exists() else location
    prompts = []
    for row, plain_text in zip(rows, texts, strict=True):
        task = find_task(str(_get(row, "source") or ""), name)
        text, answer = (plain_text, _first(row, (*_ANSWER_FIELDS, "label"))) if task is None else task.build(row)
        if text is None or answer in (None, ""):
            raise DataError(
                f"{location} is no task that can be scored: its rows need a question and an answer, found the fields "
                f"{', '.join(map(str, row))}"
            )
        prompt = _prompt(row, text, Label.BENIGN, str(answer))
        prompts.append(replace(prompt, source=task.name) if task and not prompt.source else prompt)
    return prompts


def _prompt(row: Row, text: str, label: Label | None, answer: str | None = None) -> Prompt:
    if answer is None and label is Label.BENIGN:
        answer = _answer_of(row)
    category = _get(row, "category") or _get(row, "subject") or ""
    split = _get(row, "split")
    return Prompt(
        text=text.strip(),
        label=label,
        source=str(_get(row, "source") or ""),
        category=str(category),
        answer=answer,
        split=None if split is None else str(split),
    )


def _get(row: Row, name: str) -> Any:
    """Return a field by its name, whatever its case."""
    if name in row:
        return row[name]
    return next((value for key, value in row.items() if str(key).casefold() == name), None)


def _first(row: Row, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := _get(row, name)) is not None), None)


def _texts(rows: list[Row], fields: Sequence[str], location: str) -> list[str]:
    """Return the text of each row, empty where a row has none; some row must have one."""
    texts = [_text_of(row, fields) for row in rows]
    if all(text is None for text in texts):
        found = ", ".join(map(str, rows[0])) or "none"
        raise DataError(
            f"{location} has no field that holds a prompt: name it one of {', '.join(fields)}; its fields are {found}"
        )
    return [text or "" for text in texts]


def _text_of(row: Row, names: Sequence[str]) -> str | None:
    for name in names:
        value = _get(row, name)
        if isinstance(value, list):
            value = _turn(value, ("user", "human"))
        if isinstance(value, str):
            extra = _get(row, "input") if name == "instruction" else None
            return f"{value}\n{extra}" if extra else value
    return None


def _answer_of(row: Row) -> str | None:
    messages = next(
        (value for name in ("messages", "conversations") if isinstance(value := _get(row, name), list)), None
    )
    if messages is not None:
        return _turn(messages, ("assistant", "gpt"))
    answer = _first(row, _ANSWER_FIELDS)
    return answer if isinstance(answer, str) else None


def _turn(messages: list[Any], roles: tuple[str, ...]) -> str | None:
    """Return the first message of one of `roles`; both `role`/`content` and `from`/`value` are understood."""
    for message in messages:
        if isinstance(message, dict) and (message.get("role") or message.get("from")) in roles:
            return str(message.get("content") or message.get("value") or "")
    return None


def normalise(text: str) -> str:
    """Return what two prompts are compared by: lower-case words, one space between, and symbols that carry meaning.

    Those are operators between numbers or single letters ("12 - 7"), the sign of a number, what ends a word ("C++",
    "C#", "50%"), vowel signs and the mathematical symbols beyond ASCII. Other symbols, as those of Markdown, are
    typography. A text without any word is returned as it is, so that unlike symbols stay unlike.
    """
    if not _WORD.search(text):
        return text.strip()
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    return " ".join(_SYMBOL.sub(_meaning, plain).split())


def _meaning(symbol: re.Match[str]) -> str:
    """Return what stays of a symbol in the key of a prompt."""
    if symbol.lastgroup:
        return symbol[symbol.lastgroup]
    mark = symbol[0]
    styles_emoji = "\ufe00" <= mark <= "\ufe0f"
    return mark if mark > "\x7f" and unicodedata.category(mark) in _MEANINGFUL and not styles_emoji else " "


def _words_alone(text: str) -> str:
    """Return the letters and digits of `normalise`; every sample was drawn by this key, so it must not change."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) if words else text.strip()


def deduplicate(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts without later ones of the same words."""
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(normalise(prompt.text), prompt)
    return list(unique.values())


def _rank(prompt: Prompt | str, seed: int) -> bytes:
    """Return a pseudo-random key that depends on the words and the seed only."""
    return hashlib.sha256(f"{seed}\0{_words_alone(_plain(prompt))}".encode()).digest()


def split_by_hash(prompts: Sequence[PromptT], share: float, seed: int) -> tuple[list[PromptT], list[PromptT]]:
    """Split into about `share` and the rest; only a prompt's words and `seed` decide, so equal prompts never part."""
    first: list[PromptT] = []
    second: list[PromptT] = []
    for prompt in prompts:
        fraction = int.from_bytes(_rank(prompt, seed)[:8], "big") / 2**64
        (first if fraction < share else second).append(prompt)
    return first, second


def sample(prompts: Sequence[PromptT], n: int, seed: int) -> list[PromptT]:
    """Return `n` prompts in an order that depends on their words and `seed` only.

    Raises:
        DataError: there are fewer than `n`.
    """
    if len(prompts) < n:
        raise DataError(f"{n} prompts are needed and only {len(prompts)} are there")
    return sorted(prompts, key=lambda prompt: _rank(prompt, seed))[:n]


def find_overlap(training: Sequence[Prompt | str], evaluation: Sequence[Prompt | str]) -> list[Overlap]:
    """Return, for each training prompt that gives away an evaluation prompt, the first one that it gives away.

    It does if its words are the same, or if it contains an evaluation prompt of five words or more; the instruction
    of a known task does not count. The other way round is no overlap: a short question inside a longer evaluation
    prompt is a different prompt.
    """
    words_of = {_words(prompt): _plain(prompt) for prompt in reversed(evaluation)}
    by_start: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for words in words_of:
        if len(words) >= _MIN_CONTAINED_WORDS:
            by_start.setdefault(words[:_MIN_CONTAINED_WORDS], []).append(words)
    overlaps = []
    for prompt in training:
        words = _words(prompt)
        found = words if words in words_of else _contained(words, by_start)
        if found is not None:
            kind: Literal["exact", "contained"] = "exact" if found == words else "contained"
            overlaps.append(Overlap(training=_plain(prompt), evaluation=words_of[found], kind=kind))
    return overlaps


def _plain(prompt: Prompt | str) -> str:
    return prompt if isinstance(prompt, str) else prompt.text


def _words(prompt: Prompt | str) -> tuple[str, ...]:
    return tuple(normalise(without_instruction(_plain(prompt))).split())


def _contained(
    words: tuple[str, ...], by_start: dict[tuple[str, ...], list[tuple[str, ...]]]
) -> tuple[str, ...] | None:
    """Return a prompt of `by_start` (keyed by its first five words) that stands inside `words`."""
    for start in range(len(words) - _MIN_CONTAINED_WORDS + 1):
        for candidate in by_start.get(words[start : start + _MIN_CONTAINED_WORDS], ()):
            if words[start : start + len(candidate)] == candidate:
                return candidate
    return None
