"""Token ids into text that can be sent while it grows: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for bytes that are no character, or not yet one
_CONTEXT = 6  # ids in front of the new ones; a tokenizer may write a word's space only where a word stands before it
_BYTES = 4  # of the longest character
_LONGEST_CHARACTER = 8  # ids that may wait for the rest of a character, of which four bytes are the most


class TextStream:
    """Gives the text of ids as they come; what it gave so far is a beginning of the whole text.

    Args:
        decode: ids -> text.
        behind: ids that stand in front, whose text is not given.
    """

    def __init__(self, decode: Decode, behind: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(behind)[-_CONTEXT:]
        self._given = len(self._ids)  # of these the text was given, or is not asked for: they are context
        least = max(len(self._ids) - _BYTES + 1, 0)
        while self._given > least and decode(self._ids[: self._given]).endswith(UNFINISHED):
            self._given -= 1  # the first bytes of a character, which the answer completes and then shows

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that it completes, which may be none."""
        self._ids.append(token_id)
        return self._take(len(self._ids) - self._given >= _LONGEST_CHARACTER)

    def flush(self) -> str:
        """Return what was held back: the ids are over."""
        return self._take(True)

    def _take(self, unfinished_too: bool) -> str:
        known, text = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if len(text) <= len(known) or (text.endswith(UNFINISHED) and not unfinished_too):
            return ""
        del self._ids[: self._given]
        self._given = len(self._ids)
        return text[len(known) :]


class StopFinder:
    """Passes text through up to the first stop string, which is left out; holds back what may become one.

    Args:
        stops: the strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that may be shown now, and whether a stop string was met."""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return the length of the longest end of `text` that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
