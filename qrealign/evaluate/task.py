"""Did the model solve the task: its answer opens with the expected label, or ends in the expected number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

_FREE_ANSWER_TOKENS = 256
_MOST_LABELS = 50
_LONGEST_LABEL = 40  # characters
_NUMBER = r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+"
_MARKED_NUMBER = re.compile(
    rf"(?:####|\bfinal answer\b[^\d\n]{{0,20}}?|\banswer(?: is|:)[^\d\n]{{0,12}}?)\s*({_NUMBER})", re.IGNORECASE
)
_ANY_NUMBER = re.compile(_NUMBER)
_LEAD_IN = re.compile(r"^(?:(?:the )?(?:answer|label|sentiment|category|topic|class|output|response)(?: is|:)\s*)+")


def is_correct(answer: str, expected: str) -> bool:
    """Return whether `answer` gives `expected`.

    An expected number, or a worked solution that ends in `#### number`, is compared with the answer's final number;
    any other expected text has to open the answer as whole words, whatever its case, quotes and markup.
    """
    number = _expected_number(expected)
    if number is not None:
        return _final_number(answer) == number
    label = _plain(expected)
    return bool(label) and re.match(rf"{re.escape(label)}(?!\w)", _LEAD_IN.sub("", _plain(answer))) is not None


def needed_tokens(expected: Sequence[str], longest_label_tokens: int) -> int:
    """Return how many tokens an answer needs: a few for a closed set of labels, many for free answers.

    Args:
        expected: the expected answers of the task.
        longest_label_tokens: tokens of the longest of them.
    """
    distinct = set(expected)
    closed = len(distinct) <= _MOST_LABELS and all(
        len(label) <= _LONGEST_LABEL and _expected_number(label) is None for label in distinct
    )
    return max(4, longest_label_tokens + 1) if closed else _FREE_ANSWER_TOKENS


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[*_`\"'\u201c\u201d\u2018\u2019#>\[\](){}]", "", text)).strip().lower()


def _expected_number(expected: str) -> Decimal | None:
    """Return the number that is expected, or None where words are."""
    if "####" in expected:
        return _as_number(expected.rpartition("####")[2])
    return _as_number(expected) if _ANY_NUMBER.fullmatch(expected.strip()) else None


def _final_number(answer: str) -> Decimal | None:
    """Return the number that the answer marks as its result, or the last one in it."""
    marked = _MARKED_NUMBER.findall(answer)
    found = marked or _ANY_NUMBER.findall(answer)
    return _as_number(found[-1]) if found else None


def _as_number(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip().replace(",", "").replace("$", "")).normalize()
    except InvalidOperation:
        return None
