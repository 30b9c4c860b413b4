"""What one model has said so far, kept on disk: an evaluation that was killed goes on where it stopped."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from qrealign.files import read_json, sha256_of_text, write_json

Section = Literal["answers", "choices", "numbers"]
SECTIONS: tuple[Section, ...] = ("answers", "choices", "numbers")
_SAVE_SECONDS = 5.0  # most work that a killed process loses, beside the batch it was at


def key_of(*parts: Any) -> str:
    """Return the key of a question: a SHA-256 over everything that decides the model's answer to it."""
    return sha256_of_text(*(repr(part) for part in parts))


class AnswerBook:
    """Answers, choices and numbers of one model by the key of their question; in memory alone without a path.

    A question's key holds its token ids and how it was asked, so an entry stays valid whatever else changes; only
    another model makes the whole book worthless.

    Args:
        path: the JSON file, or None.
        identity: of the model and how it computes; a file with another identity, or none that can be read, is
            replaced.

    Attributes:
        note: one sentence on what the file held, "" where there was none.
        reused: how many entries were asked for and found.
    """

    def __init__(self, path: Path | None = None, identity: str = "") -> None:
        self.path = path
        self.identity = identity
        self.note = ""
        self.reused = 0
        self._entries: dict[Section, dict[str, Any]] = {section: {} for section in SECTIONS}
        self._saved_at = float("-inf")
        self._changed = False
        if path is not None and path.exists():
            self._load(path)

    def get(self, section: Section, key: str) -> Any:
        """Return an entry's value, None where there is none."""
        entry = self._entries[section].get(key)
        self.reused += entry is not None
        return None if entry is None else entry["value"]

    def put(self, section: Section, key: str, value: str | int | float, question: str = "") -> None:
        """Enter a value; `question` is for people who read the file."""
        self._entries[section][key] = {"question": question, "value": value}
        self._changed = True

    def save(self, *, now: bool = False) -> None:
        """Write the file if something is new: the first time and with `now` at once, otherwise every few seconds."""
        if self.path is None or not self._changed or not (now or time.monotonic() - self._saved_at > _SAVE_SECONDS):
            return
        write_json(
            self.path, {"identity": self.identity, **{str(name): found for name, found in self._entries.items()}}
        )
        self._saved_at, self._changed = time.monotonic(), False

    def _load(self, path: Path) -> None:
        try:
            value = read_json(path)
            same = value["identity"] == self.identity
            entries: dict[Section, dict[str, Any]] = {section: dict(value[section]) for section in SECTIONS}
            count = len([entry["value"] for section in entries.values() for entry in section.values()])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
            self.note = f"{path} is no answer file of this project's: it is replaced"
            return
        if same:
            self._entries = entries
            self.note = f"{path} holds {count} answers of an earlier run: those are not asked again"
        else:
            self.note = f"{path} holds answers of another model or other settings: every question is asked anew"
