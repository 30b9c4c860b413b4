"""The book of answers: what was said is found again, what another model said is not."""

from __future__ import annotations

import json

import pytest

from qrealign.evaluate import book as book_module
from qrealign.evaluate.book import AnswerBook, key_of


def test_entries_survive_the_process(tmp_path):
    path = tmp_path / "answers" / "model.json"
    book = AnswerBook(path, "one")
    assert book.note == "" and book.get("answers", "k") is None
    book.put("answers", "k", "yes", "a question")
    book.put("numbers", "n", 2.5)
    book.save(now=True)
    again = AnswerBook(path, "one")
    assert (again.get("answers", "k"), again.get("numbers", "n"), again.get("choices", "k")) == ("yes", 2.5, None)
    assert again.reused == 2 and "2 answers of an earlier run" in again.note
    assert json.loads(path.read_text())["answers"]["k"] == {"question": "a question", "value": "yes"}


def test_another_model_starts_anew_and_says_so(tmp_path):
    path = tmp_path / "a.json"
    book = AnswerBook(path, "one")
    book.put("answers", "k", "yes")
    book.save(now=True)
    other = AnswerBook(path, "two")
    assert other.get("answers", "k") is None and "asked anew" in other.note


BARE = '{"identity": "one", "answers": {"k": {}}, "choices": {}, "numbers": {}}'  # an entry without its value


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"identity": "one", "answers": {}}', "\ud800", BARE])
def test_a_file_of_something_else_is_replaced(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    book = AnswerBook(path, "one")
    assert "is replaced" in book.note
    book.put("choices", "k", 1)
    book.save(now=True)
    assert AnswerBook(path, "one").get("choices", "k") == 1


def test_saving_waits_a_little_and_skips_what_is_saved(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(book_module.time, "monotonic", lambda: now[0])
    path = tmp_path / "a.json"
    book = AnswerBook(path, "one")
    book.put("answers", "first", "yes")
    book.save()
    path.unlink()
    book.put("answers", "k", "yes")
    book.save()
    assert not path.exists()
    now[0] = 6.0
    book.save()
    assert path.exists()
    path.unlink()
    book.save(now=True)
    assert not path.exists()  # nothing new


def test_a_book_without_a_file_writes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    book = AnswerBook()
    book.put("answers", "k", "yes")
    book.save(now=True)
    assert book.get("answers", "k") == "yes" and not list(tmp_path.iterdir())


def test_keys_tell_boundaries_apart():
    assert key_of((1, 2), 3) == key_of((1, 2), 3)
    assert len({key_of((1, 2), 3), key_of((1,), 23), key_of("12", 3), key_of((1, 2), "3")}) == 4
