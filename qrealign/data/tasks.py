"""Tasks that are scored by their answers: a row of a known data set becomes an instruction and the expected answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Task:
    """How one data set is asked: `instruction` has one `{text}`; `classes` names the answers of integer labels."""

    name: str
    instruction: str
    text_fields: tuple[str, ...]
    answer_field: str
    classes: tuple[str, ...] = ()

    def build(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Return prompt and answer, None for one that the row does not hold."""
        text = next((row[field] for field in self.text_fields if isinstance(row.get(field), str)), None)
        prompt = None if text is None else self.instruction.format(text=text.strip())
        return prompt, self._answer(row.get(self.answer_field))

    def _answer(self, value: Any) -> str | None:
        if isinstance(value, bool) or value is None:
            return None
        text = str(value).strip()
        if self.classes:
            # int() takes no "²", and no number of thousands of digits
            if text.isdecimal() and len(text) < 10 and int(text) < len(self.classes):
                return self.classes[int(text)]
            return next((name for name in self.classes if name.casefold() == text.casefold()), None)
        return final_number(text)


def final_number(text: str) -> str | None:
    """Return the number that an answer ends in, without thousands separators: `so 1,200 eggs.` gives `1200`.

    Where the mark `####` is there, the first number after it counts.
    """
    _, mark, rest = text.rpartition("####")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", rest)
    if not numbers:
        return None
    number = (numbers[0] if mark else numbers[-1]).replace(",", "")
    return re.sub(r"\.0+$", "", number)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            text_fields=("text", "sentence"),
            answer_field="label",
            classes=("negative", "positive"),
            instruction="Analyze the sentiment of the input, and respond only positive or negative.\nInput: {text}",
        ),
        Task(
            name="agnews",
            text_fields=("text",),
            answer_field="label",
            classes=("World", "Sports", "Business", "Sci/Tech"),
            instruction="Classify the topic of the input, and respond only World, Sports, Business or Sci/Tech.\n"
            "Input: {text}",
        ),
        Task(
            name="gsm8k",
            text_fields=("question",),
            answer_field="answer",
            instruction="Solve the problem step by step, and end with the line #### followed by the number.\n"
            "Problem: {text}",
        ),
    )
}


def find_task(*hints: str) -> Task | None:
    """Return the task that one of `hints` (a source, a file name, a Hub id) names; only letters and digits count."""
    for hint in hints:
        plain = re.sub(r"[^a-z0-9]", "", hint.casefold())
        for name, task in TASKS.items():
            if name in plain:
                return task
    return None


def without_instruction(text: str) -> str:
    """Return a task's prompt without the instruction that all its prompts share, any other text as it is."""
    for task in TASKS.values():
        head, _, _ = task.instruction.partition("{text}")
        if text.startswith(head):
            return text[len(head) :]
    return text
