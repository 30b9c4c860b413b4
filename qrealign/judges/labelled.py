"""Answers with people's verdicts on them, read from a file or the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qrealign.data.readers import filter_rows, read_rows, split_spec
from qrealign.errors import DataError

AnswerLabel = Literal["harmful", "safe", "refusal"]

_PROMPT_FIELDS = ("prompt", "question", "instruction", "query")
_ANSWER_FIELDS = ("response", "answer", "output", "completion")
_LABELS: dict[str, AnswerLabel] = {
    **dict.fromkeys(("harmful", "unsafe", "malicious", "1", "1.0", "true"), "harmful"),
    **dict.fromkeys(("safe", "harmless", "benign", "0", "0.0", "false"), "safe"),
    **dict.fromkeys(("refusal", "refused"), "refusal"),
}


@dataclass(frozen=True, kw_only=True)
class LabelledAnswer:
    """An answer and what people say of it. `safe` is any answer that neither does harm nor is labelled a refusal."""

    prompt: str
    answer: str
    label: AnswerLabel
    source: str

    @property
    def family(self) -> str:
        """The first part of the source: `beavertails` of `beavertails/30k_test`."""
        return source_family(self.source)


def source_family(source: str) -> str:
    """Return the part of a source before its first `/` or `:`."""
    return source.replace(":", "/").partition("/")[0]


def read_labelled(spec: str) -> list[LabelledAnswer]:
    """Return the labelled answers of a file or Hub id, in file order.

    A row has a prompt (`prompt`, `question`, `instruction`), an answer (`response`, `answer`, `output`), and either a
    `label` (harmful or 1, safe or 0, refusal) or a truth value `is_safe`; `source` is optional.

    Args:
        spec: path or Hub id, with an optional filter `?field=value,value`.

    Raises:
        DataError: the file cannot be read, or a row lacks one of these or has another label.
    """
    location, conditions = split_spec(spec)
    rows = filter_rows(read_rows(location), conditions, location)
    return [_labelled(row, location, number) for number, row in enumerate(rows, 1)]


def read_answers(spec: str) -> list[str]:
    """Return the answers of a file or Hub id, labelled or not.

    Raises:
        DataError: the file cannot be read, or a row has no answer.
    """
    location, conditions = split_spec(spec)
    rows = filter_rows(read_rows(location), conditions, location)
    return [_text(_lower(row), _ANSWER_FIELDS, location, number) for number, row in enumerate(rows, 1)]


def leave_out(rows: Iterable[LabelledAnswer], excluded: Iterable[str]) -> list[LabelledAnswer]:
    """Return the rows without those of any `SOURCE:LABEL` of `excluded`, where a source also stands for its parts.

    Raises:
        DataError: one of them does not have this form, or no row is of it.
    """
    rows = list(rows)
    sources = {(source, row.label) for row in rows for source in (row.source, row.family)}
    pairs = set()
    for text in excluded:
        source, colon, label = text.rpartition(":")
        if not colon or label not in set(_LABELS.values()):
            raise DataError(f"what is left out is written SOURCE:LABEL with harmful, safe or refusal, got {text!r}")
        if (source, label) not in sources:
            there = ", ".join(sorted(":".join(pair) for pair in sources)[:12]) or "none"
            raise DataError(f"there is no {text} to leave out: the sources with their labels are {there}")
        pairs.add((source, label))
    return [row for row in rows if not {(row.source, row.label), (row.family, row.label)} & pairs]


def _labelled(row: Mapping[str, Any], location: str, number: int) -> LabelledAnswer:
    fields = _lower(row)
    return LabelledAnswer(
        prompt=_text(fields, _PROMPT_FIELDS, location, number),
        answer=_text(fields, _ANSWER_FIELDS, location, number),
        label=_label(fields, location, number),
        source=str(fields.get("source") or "unnamed"),
    )


def _lower(row: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name).casefold(): value for name, value in row.items()}


def _text(fields: Mapping[str, Any], names: tuple[str, ...], location: str, number: int) -> str:
    for name in names:
        if isinstance(fields.get(name), str):
            return str(fields[name])
    raise DataError(
        f"row {number} of {location} has none of the fields {', '.join(names)}; its fields are {', '.join(fields)}"
    )


def _label(fields: Mapping[str, Any], location: str, number: int) -> AnswerLabel:
    if "label" not in fields and isinstance(fields.get("is_safe"), bool):
        return "safe" if fields["is_safe"] else "harmful"
    word = str(fields.get("label")).strip().casefold()
    if word not in _LABELS:
        raise DataError(
            f"row {number} of {location} has the label {fields.get('label')!r}: use harmful, safe or refusal "
            "(or 1 and 0, or a truth value is_safe)"
        )
    return _LABELS[word]
