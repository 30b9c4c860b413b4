"""Text that grows: whole characters, stop strings that cross tokens, log-probabilities in step with the text."""

from __future__ import annotations

import random

import pytest

from qrealign.serve.jobs import Answer
from qrealign.serve.sampling import Choice
from qrealign.serve.text import StopFinder, TextStream
from tests.helpers import tiny_tokenizer

TEXT = "naïve café, 日本語, 👩‍👩‍👧 and e\u0301: ßüñ 🎉 end"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def decode(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_a_character_comes_with_its_last_byte(tokenizer, decode):
    stream = TextStream(decode)
    parts = [stream.push(token) for token in ids_of(tokenizer, "é🎉")]
    assert parts == ["", "é", "", "", "", "🎉"] and stream.flush() == ""


def test_streamed_text_is_the_whole_text(tokenizer, decode):
    stream = TextStream(decode)
    parts = [stream.push(token) for token in ids_of(tokenizer, TEXT)]
    assert "".join(parts) + stream.flush() == TEXT
    assert all("\ufffd" not in part for part in parts)


def test_a_broken_character_at_the_end_is_shown_as_one(tokenizer, decode):
    stream = TextStream(decode)
    parts = [stream.push(token) for token in ids_of(tokenizer, "a🎉")[:3]]
    assert parts == ["a", "", ""] and stream.flush() == "\ufffd"


def test_garbage_does_not_wait_for_ever(tokenizer, decode):
    lead = ids_of(tokenizer, "🎉")[0]  # begins a character of four bytes, again and again
    stream = TextStream(decode)
    parts = [stream.push(lead) for _ in range(40)]
    assert sum(map(len, parts)) >= 32
    assert len(stream._ids) <= 16


def test_a_character_that_the_prompt_begins_is_completed(tokenizer, decode):
    ids = ids_of(tokenizer, "a 🎉 b")
    cut = next(index for index in range(len(ids)) if decode(ids[:index]).endswith("\ufffd"))
    stream = TextStream(decode, ids[:cut])
    assert "".join(map(stream.push, ids[cut:])) + stream.flush() == "🎉 b"


def test_a_space_in_front_of_the_first_word_is_kept_behind_a_prompt():
    words = {1: "Once", 2: "upon", 3: "a"}

    def decode(ids):  # as SentencePiece does it: no space in front of the first word
        return " ".join(words[token] for token in ids)

    assert [TextStream(decode, [1]).push(2), TextStream(decode).push(2)] == [" upon", "upon"]


def test_stop_strings_are_found_across_pieces_and_never_shown():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab\n#") for _ in range(40))
        stops = ["".join(rng.choice("ab\n#") for _ in range(rng.randint(2, 4))) for _ in range(3)]
        finder, shown, stopped, left = StopFinder(stops), "", False, text
        while left and not stopped:
            size = rng.randint(1, 3)
            piece, stopped = finder.push(left[:size])
            shown, left = shown + piece, left[size:]
        if not stopped:
            shown += finder.flush()
        places = [text.find(stop) for stop in stops if stop in text]
        assert shown == (text[: min(places)] if places else text)


def test_nothing_is_held_back_without_need():
    finder = StopFinder(["\n\n###"])
    assert finder.push("text\n") == ("text", False)
    assert finder.push("more") == ("\nmore", False)


def push_all(answer: Answer, ids: list[int]):
    pieces = []
    for token in ids:
        piece, stopped = answer.push(Choice(token_id=token, logprob=-1.0))
        pieces.append(piece)
        if stopped:
            return pieces, True
    pieces.append(answer.finish())
    return pieces, False


def test_tokens_of_a_stop_string_are_not_reported(tokenizer, decode):
    pieces, stopped = push_all(Answer(decode, ["END"]), ids_of(tokenizer, "ab END c"))
    assert stopped and "".join(piece.text for piece in pieces) == "ab "
    reported = [token.token_id for piece in pieces for token in piece.tokens]
    assert decode(reported) == "ab "


def test_tokens_are_reported_with_the_text_they_gave(tokenizer, decode):
    pieces, stopped = push_all(Answer(decode, ["ZZ"]), ids_of(tokenizer, "aé🎉Z"))
    assert not stopped and [len(piece.tokens) for piece in pieces] == [1, 0, 2, 0, 0, 0, 4, 0, 1]
    assert [token.offset for piece in pieces for token in piece.tokens] == [0, 1, 1, 2, 2, 2, 2, 3]
    assert pieces[-1].text == "Z"


def test_a_stop_string_in_what_is_left_at_the_end_counts(tokenizer, decode):
    answer = Answer(decode, ["\ufffd"])
    for token in ids_of(tokenizer, "a🎉")[:2]:
        answer.push(Choice(token_id=token))
    assert answer.finish().text == ""
