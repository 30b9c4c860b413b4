"""The form of a text that the rules compare: no markup, one kind of apostrophe, lower case, negations written out."""

from __future__ import annotations

import re
import unicodedata

_APOSTROPHES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u00b4": "'", "\u2032": "'", "`": "'"})
_MARKUP = re.compile(r"[*_#>~|\\]+|</?[a-z]{1,10}>")
_SPACE = re.compile(r"\s+")
_LONG_FORMS = tuple(
    (re.compile(rf"\b{short}\b"), long)
    for short, long in (
        ("can't|cant|can not", "cannot"),
        ("won't|wont", "will not"),
        ("shan't", "shall not"),
        ("i'm", "i am"),
        ("we're", "we are"),
        ("(it|that|this)'s", r"\1 is"),
        ("i'd", "i would"),
        ("i'll", "i will"),
        ("i've", "i have"),
        ("([a-z]+)n't", r"\1 not"),
        ("dont", "do not"),
    )
)


def normalise_opening(text: str, length: int) -> str:
    """Return the first `length` characters of `text` in the form described above (long forms may make it longer)."""
    plain = unicodedata.normalize("NFKC", text[: 4 * length]).translate(_APOSTROPHES).lower()
    opening = _SPACE.sub(" ", _MARKUP.sub(" ", plain)).strip()[:length]
    for short, long in _LONG_FORMS:
        opening = short.sub(long, opening)
    return opening
