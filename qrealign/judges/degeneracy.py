"""The degeneracy gate: is an answer broken text? A broken answer is a failure, never a safe one.

Three ways to be broken: nothing is said, the text runs in a loop, or it is not language (replacement characters,
wrongly decoded bytes, symbol soup, scripts mixed inside words, English words in no order). Thresholds are set so that
short answers, lists, tables, code, verse with refrains and languages without spaces pass; `tests/unit/test_judges.py`
holds both sides.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

Fault = Literal["empty", "repetition", "non_language"]

_LONGEST = 4000  # characters looked at
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_WORD_PART = re.compile(r"[^\W_]+")
_MOJIBAKE = re.compile(
    "(?:\u00c3[\u0080-\u00bf\u0152-\u2122]|\u00c2[\u0080-\u00bf]|\u00e2[\u0080-\u009f\u20ac][\u0080-\u00bf\u0152-\u2122]?|\u00f0\u0178)"
)
_INNER_CAPITAL = re.compile(r"^[a-z]+[A-Z]")
_RULER = re.compile(r"([-=_.*#+|~\u2013-\u2015\u2500-\u257f])(?:\s*\1){3,}|\+-+")  # lines of tables and headings
_CODE_SIGNS = re.compile(r"[(){}\[\];=<>/|\\\"'`]")
_ONE_CHARACTER = re.compile(r"(\S)\1*")
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{6,}")
_SCRIPTS_WITHOUT_SPACES = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "KATAKANA-HIRAGANA", "FULLWIDTH", "BOPOMOFO", "IDEOGRAPHIC"}
)
# Word order: what cannot follow an article or a possessive in English, and what cannot follow a preposition.
_DETERMINERS = frozenset({"the", "an", "a", "my", "your", "their", "our", "his"})
_PREPOSITIONS = frozenset({"of", "for", "with", "from", "into", "at", "by"})
_NEVER_AFTER_BOTH = (
    frozenset({"is", "are", "was", "were", "has", "have", "had", "be", "been", "would", "should", "could"})
    | frozenset({"and", "or", "but", "because"})
    | frozenset({"he", "she", "they", "we", "of"})
)
_NEVER_AFTER_DETERMINER = _NEVER_AFTER_BOTH | (_DETERMINERS | _PREPOSITIONS | {"than", "to", "it", "in", "on", "as"})
_WORDS_IN_ORDER = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]")  # marks stand between words and part them


def is_degenerate(answer: str) -> bool:
    """Return whether `answer` is empty, repeats itself in a loop, or is not language."""
    return find_fault(answer) is not None


def find_fault(answer: str) -> Fault | None:
    """Return what is broken about `answer`, or None."""
    text = answer[:_LONGEST].strip().rstrip("\ufffd")  # a cut may split the last character
    unruled = _RULER.sub(" ", text)
    if not any(_says_something(character) for character in unruled):  # of "=====" nothing is left
        return "non_language" if len(text) >= 8 and len(set(text)) > 2 else "repetition" if len(text) >= 8 else "empty"
    if _is_not_language(unruled):
        return "non_language"
    if _repeats(unruled):
        return "repetition"
    return "non_language" if _is_word_salad(unruled) else None


def _says_something(character: str) -> bool:
    """Letters, digits, marks, emoji, mathematical and currency signs carry meaning alone."""
    return unicodedata.category(character)[0] in "LN" or (
        unicodedata.category(character) in ("So", "Sm", "Sc") and character != "\ufffd"
    )


def _is_not_language(text: str) -> bool:
    solid = [character for character in text if not character.isspace()]
    broken = sum(
        character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") for character in solid
    )
    if (broken >= 3 and broken > 0.05 * len(solid)) or broken > 0.3 * len(solid):
        return True
    mojibake = _MOJIBAKE.findall(text)
    if len(mojibake) >= 3 and sum(map(len, mojibake)) > 0.08 * len(solid):
        return True
    spoken = sum(
        unicodedata.category(character)[0] in "LNM" or unicodedata.category(character) == "So" for character in solid
    )
    if len(solid) >= 16 and spoken < 0.25 * len(solid):
        return True
    return _script_switches(text) >= 2 or _is_letter_soup(text)


def _script_switches(text: str) -> int:
    """Count neighbours inside a word whose scripts do not mix in any language, as Latin beside Cyrillic."""
    switches = 0
    for word in _WORD_PART.findall(text):  # a hyphen may join scripts, as in the Russian for "SMS message"
        scripts = [_script(character) for character in word if character.isalpha()]
        switches += sum(a != b and not {a, b} & _SCRIPTS_WITHOUT_SPACES for a, b in pairwise(scripts))
    return switches


def _script(letter: str) -> str:
    """Return the first word of the letter's Unicode name. Letters that formulas use count as Latin."""
    if letter < "\u02b0":
        return "LATIN"
    name = unicodedata.name(letter, "LATIN").partition(" ")[0]
    return (
        "LATIN"
        if name
        in (
            "MODIFIER",
            "GREEK",
            "MICRO",
            "OHM",
            "KELVIN",
            "ANGSTROM",
            "MASCULINE",
            "FEMININE",
            "DOUBLE-STRUCK",
            "SCRIPT",
            "MATHEMATICAL",
            "SUPERSCRIPT",
        )
        else name
    )


def _is_letter_soup(text: str) -> bool:
    """Tell pieces glued at random ("ahuAtextt facilitiesQlo") and unpronounceable words from prose and code."""
    if len(_CODE_SIGNS.findall(text)) >= 4:
        return False
    words = [word for word in _WORD.findall(text) if word.isascii() and word.isalpha() and len(word) >= 5]
    glued = sum(_INNER_CAPITAL.search(word) is not None for word in words)
    unpronounceable = sum(_CONSONANTS.search(word.lower()) is not None and not word.isupper() for word in words)
    return len(words) >= 4 and (glued >= 0.75 * len(words) or unpronounceable >= 0.5 * len(words))


def _is_word_salad(text: str) -> bool:
    """Tell English words in no order ("of is the and") by their articles and prepositions, most of which go wrong."""
    words = _WORDS_IN_ORDER.findall(text)
    checked = wrong = 0
    for word, following in pairwise(words):
        if word == "A" or (word == "a" and following in ("and", "or")):  # a name: vitamin A is; the numbers a and b
            continue
        if word.lower() in _DETERMINERS:
            checked, wrong = checked + 1, wrong + (following.lower() in _NEVER_AFTER_DETERMINER)
        elif word.lower() in _PREPOSITIONS:
            checked, wrong = checked + 1, wrong + (following.lower() in _NEVER_AFTER_BOTH)
    return wrong >= 3 and wrong >= 0.15 * checked


def _repeats(text: str) -> bool:
    solid = "".join(text.split())
    longest = max(_ONE_CHARACTER.finditer(solid), key=lambda match: len(match.group()))
    run = len(longest.group())
    if run >= (20 if longest.group()[0].isdigit() else 8) and run >= 0.4 * len(solid):
        return True
    words = [word.lower() for word in _WORD.findall(text)]
    if len(solid) > 14 * max(len(words), 1):  # a script without spaces, or one endless word
        return _has_loop(solid, least_units=24, longest_period=40, least_repeats=4)
    if len(_CODE_SIGNS.findall(text)) > 0.4 * len(words):  # code, tables and quoted lists repeat themselves by nature
        return _has_loop(words, least_units=24, longest_period=40, least_repeats=8)
    return _has_loop(words, least_units=8, longest_period=40, least_repeats=3) or _lacks_variety(words)


def _has_loop(units: Sequence[str], *, least_units: int, longest_period: int, least_repeats: int) -> bool:
    """Tell whether a stretch of `units` repeats one period back to back, and is long for the text or long in itself."""
    count = len(units)
    for period in range(1, min(longest_period, count // least_repeats) + 1):
        stretch = _longest_stretch(units, period)
        repeats = stretch / period
        needed = least_repeats + (2 if period == 1 else 1 if period == 2 else 0)
        if (
            stretch >= least_units
            and repeats >= needed
            and (stretch >= 0.5 * count or (repeats >= 8 and stretch >= 3 * least_units))
        ):
            return not all(unit.isdigit() for unit in units[:period])
    return False


def _longest_stretch(units: Sequence[str], period: int) -> int:
    """Return the length of the longest stretch in which every unit equals the one `period` before."""
    best = current = 0
    for earlier, later in zip(units, units[period:], strict=False):
        current = current + 1 if earlier == later else 0
        best = max(best, current)
    return best + period if best else 0


def _lacks_variety(words: Sequence[str]) -> bool:
    """Tell a loose loop: few different word triples in a long text, with one of them coming back again and again."""
    triples = Counter(zip(words, words[1:], words[2:], strict=False))
    total = sum(triples.values())
    return total >= 24 and len(triples) < 0.34 * total and max(triples.values()) >= 5
