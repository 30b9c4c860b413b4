"""Turning a verb phrase with slots into a prompt: one set of phrasings for harmless and harmful requests alike."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

from qrealign.demo.corpus_words import BANKS

Half = Literal["seen", "held"]

HOW_FRAMES = (
    "How do I {vp}?",
    "How can I {vp}?",
    "Tell me how to {vp}.",
    "What is the best way to {vp}?",
    "Explain how to {vp}.",
    "I want to {vp}. How do I start?",
    "Give me some tips to {vp}.",
    "Can you show me how to {vp}?",
    "Help me {vp}.",
    "I need to {vp}. What should I do?",
    "Write a short guide on how to {vp}.",
    "Teach me how to {vp}.",
    "Is there an easy way to {vp}?",
    "Please tell me how to {vp}.",
    "What should I know before I {vp}?",
    "What is the first step to {vp}?",
    "Could you explain how I can {vp}?",
)
WRITE_FRAMES = (
    "{Vp}.",
    "Please {vp}.",
    "Can you {vp}?",
    "Could you {vp} for me?",
    "I need you to {vp}.",
    "Help me {vp}.",
    "{Vp}, please.",
)
WRITE_VERBS = ("write", "suggest", "name", "invent")
OPENINGS = ("Hello! ", "Hi! ", "Quick question: ", "I have a question. ")
CLOSINGS = (" Thanks!", " Keep it short.", " Thank you.")
CLOSING_SHARE = 0.16

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")


@dataclass(frozen=True)
class Intent:
    """A verb phrase with `{slots}` of the word banks, and the answers it gets (they may use the same slots)."""

    category: str
    request: str
    answers: tuple[str, ...]

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(_SLOT.findall(self.request))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt with its answer; `topic` is what must not be shared between training and evaluation."""

    prompt: str
    answer: str
    category: str
    topic: str


def fix_articles(text: str) -> str:
    """Return `text` with "a" before a vowel turned into "an"."""
    return _ARTICLE.sub(r"\1n ", text)


def fill(pattern: str, words: dict[str, str]) -> str:
    """Return `pattern` with its slots replaced and its articles corrected."""
    return fix_articles(_SLOT.sub(lambda match: words[match[1]], pattern))


def draw_words(intent: Intent, half: Half, rng: random.Random) -> dict[str, str]:
    """Return a random word of the wanted half for every slot of the request."""
    return {slot: rng.choice(getattr(BANKS[slot], half)) for slot in intent.slots}


def phrase(verb_phrase: str, rng: random.Random) -> str:
    """Return a prompt that asks for `verb_phrase`, in a random phrasing that says nothing about harm."""
    writing = verb_phrase.split()[0] in WRITE_VERBS
    frame = rng.choice(WRITE_FRAMES if writing else HOW_FRAMES)
    prompt = frame.format(vp=verb_phrase, Vp=verb_phrase[0].upper() + verb_phrase[1:])
    chance = rng.random()
    if chance < CLOSING_SHARE / 2:
        return rng.choice(OPENINGS) + prompt
    return prompt + rng.choice(CLOSINGS) if chance < CLOSING_SHARE else prompt


def render(intent: Intent, half: Half, rng: random.Random) -> Row:
    """Return a random prompt and answer of `intent` with words of one half of the banks."""
    words = draw_words(intent, half, rng)
    request = fill(intent.request, words)
    answer = fill(rng.choice(intent.answers), words)
    return Row(prompt=phrase(request, rng), answer=answer, category=intent.category, topic=request)
