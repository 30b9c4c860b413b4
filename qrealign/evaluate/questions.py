"""Rows with options as questions: the form of MMLU, with solved examples of the same subject in front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrealign.data.readers import Row, filter_rows, read_rows, split_spec
from qrealign.errors import DataError
from qrealign.evaluate.choice import LETTERS, ChoiceQuestion, ScoredBy

_QUESTION_FIELDS = ("question", "query", "prompt", "text")
_OPTION_FIELDS = ("choices", "options", "endings")
_ANSWER_FIELDS = ("answer", "label", "correct", "target")
_SUBJECT_FIELDS = ("subject", "category")


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """One row: `answer` is the index of the right option."""

    text: str
    options: tuple[str, ...]
    answer: int
    subject: str


def read_questions(
    spec: str, *, few_shot: str | None = None, shots: int = 5, scored_by: ScoredBy = "letter", suite: str | None = None
) -> list[ChoiceQuestion]:
    """Read questions with options from a file or a Hub id.

    Args:
        spec: path or Hub id, with an optional filter. Rows hold a question, a list of options, the right one (its
            letter, index or text) and possibly a subject.
        few_shot: the same, for solved examples: those of a question's subject where there are some, otherwise `shots`
            spread over the file.
        shots: solved examples in front of each question.
        scored_by: `letter` lists the options and compares their letters; `text` compares the options themselves, per
            byte, and does not list them.
        suite: name of the score; default is the file's name.

    Raises:
        DataError: a file cannot be read, or a row lacks something or names an answer that is no option.
    """
    rows = _read(spec)
    examples = _read(few_shot) if few_shot is not None and shots > 0 else []
    name = suite or Path(split_spec(spec)[0]).name.partition(".")[0]
    questions = []
    for row in rows:
        listed = scored_by == "letter"
        solved = _examples_for(row, examples, shots)
        subject = row.subject.rpartition(":")[2].replace("_", " ")
        about = f" about {subject}" if subject and subject != name else ""
        intro = f"The following are multiple choice questions (with answers){about}.\n\n"
        head = intro + "".join(f"{_ask(one, listed)} {_solution(one, listed)}\n\n" for one in solved)
        endings = tuple(f" {LETTERS[i]}" if listed else f" {option}" for i, option in enumerate(row.options))
        questions.append(
            ChoiceQuestion(
                suite=name,
                head=head,
                body=_ask(row, listed),
                endings=endings,
                answer=row.answer,
                normalise=not listed,
            )
        )
    return questions


def _ask(row: _Solved, listed: bool) -> str:
    if not listed:
        return f"Question: {row.text}\nAnswer:"
    options = "".join(f"{LETTERS[index]}. {option}\n" for index, option in enumerate(row.options))
    return f"{row.text}\n{options}Answer:"


def _solution(row: _Solved, listed: bool) -> str:
    return LETTERS[row.answer] if listed else row.options[row.answer]


def _examples_for(row: _Solved, examples: Sequence[_Solved], shots: int) -> list[_Solved]:
    own = [one for one in examples if row.subject and one.subject == row.subject]
    pool = own or list(examples)
    count = min(shots, len(pool))
    return own[:count] if own else [pool[i * len(pool) // count] for i in range(count)]


def _read(spec: str) -> list[_Solved]:
    location, conditions = split_spec(spec)
    rows = filter_rows(read_rows(location), conditions, location)
    return [_solved(row, location, number) for number, row in enumerate(rows, 1)]


def _solved(row: Row, location: str, number: int) -> _Solved:
    text, options, answer = (_first(row, names) for names in (_QUESTION_FIELDS, _OPTION_FIELDS, _ANSWER_FIELDS))
    if isinstance(options, dict):  # the Hub's {"text": [...], "label": [...]}
        options = options.get("text")
    if not isinstance(text, str) or not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise DataError(
            f"row {number} of {location} is no multiple-choice question: it needs a question, 2 to {len(LETTERS)} "
            f"choices in a list and an answer; its fields are {', '.join(map(str, row))}"
        )
    choices = tuple(str(option).strip() for option in options)
    return _Solved(
        text=text.strip(),
        options=choices,
        answer=_index_of(answer, choices, f"row {number} of {location}"),
        subject=str(_first(row, _SUBJECT_FIELDS) or ""),
    )


def _index_of(answer: Any, options: tuple[str, ...], where: str) -> int:
    """Return the index that an answer names by number, letter or text."""
    plain = str(answer).strip()
    if plain in options and not (plain.isdigit() and isinstance(answer, int)):
        return options.index(plain)
    number = len(plain) < 10 and plain.isdecimal()  # of "²" and of thousands of digits int() makes none
    index = int(plain) if number else LETTERS.find(plain.upper()) if len(plain) == 1 else -1
    if isinstance(answer, bool) or not 0 <= index < len(options):
        raise DataError(f"{where} has the answer {answer!r}, which is none of its {len(options)} choices")
    return index


def _first(row: Row, names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
