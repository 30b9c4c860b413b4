"""Rows with options as questions: answers in every form, examples of the same subject, and what is refused."""

from __future__ import annotations

import json

import pytest

from qrealign.errors import DataError
from qrealign.evaluate.questions import read_questions

ROW = {"question": "What is 1 + 1?", "choices": ["1", "2", "3"], "answer": "B", "subject": "easy_maths"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_form_of_mmlu(tmp_path):
    (asked,) = read_questions(write(tmp_path / "sums.jsonl", ROW))
    assert asked.suite == "sums"
    assert asked.head == "The following are multiple choice questions (with answers) about easy maths.\n\n"
    assert asked.body == "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nAnswer:"
    assert (asked.endings, asked.answer, asked.normalise) == ((" A", " B", " C"), 1, False)


def test_options_by_text_are_not_listed(tmp_path):
    (asked,) = read_questions(write(tmp_path / "a.jsonl", ROW), scored_by="text", suite="named")
    assert (asked.suite, asked.body) == ("named", "Question: What is 1 + 1?\nAnswer:")
    assert (asked.endings, asked.normalise) == ((" 1", " 2", " 3"), True)


@pytest.mark.parametrize("answer", ["B", "b", 1, "1", "two"])
def test_answers_by_letter_index_or_text(tmp_path, answer):
    row = {**ROW, "choices": ["one", "two", "three"], "answer": answer}
    assert read_questions(write(tmp_path / "a.jsonl", row))[0].answer == 1


def test_a_number_that_is_an_option_is_that_option_when_written_as_text(tmp_path):
    row = {**ROW, "choices": ["4", "2", "0"], "answer": "2"}
    assert read_questions(write(tmp_path / "a.jsonl", row))[0].answer == 1
    assert read_questions(write(tmp_path / "b.jsonl", {**row, "answer": 2}))[0].answer == 2


def test_examples_are_of_the_subject_or_spread(tmp_path):
    shots = [
        {"question": f"example {i}", "choices": ["yes", "no"], "answer": "A", "subject": subject}
        for i, subject in enumerate(["other", "easy_maths", "other", "easy_maths", "other", "other"])
    ]
    few = write(tmp_path / "few.jsonl", *shots)
    data = write(tmp_path / "a.jsonl", ROW, {**ROW, "question": "Unknown?", "subject": "unknown"})
    own, spread = read_questions(data, few_shot=few, shots=1)
    assert "example 1\nA. yes\nB. no\nAnswer: A\n\n" in own.head and "example 3" not in own.head
    own, spread = read_questions(data, few_shot=few, shots=3)
    assert [i for i in range(6) if f"example {i}" in own.head] == [1, 3]
    assert [i for i in range(6) if f"example {i}" in spread.head] == [0, 2, 4]
    assert "example" not in read_questions(data, few_shot=few, shots=0)[0].head
    assert "Answer: yes" in read_questions(data, few_shot=few, shots=1, scored_by="text")[0].head


def test_the_hubs_nested_options(tmp_path):
    row = {"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "B"}
    assert read_questions(write(tmp_path / "a.jsonl", row))[0].answer == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": None}, "no multiple-choice"),
        ({"choices": ["one"]}, "no multiple-choice"),
        ({"question": None}, "no multiple-choice"),
        ({"answer": "E"}, "none of its 3 choices"),
        ({"answer": 3}, "none of its 3 choices"),
        ({"answer": True}, "none of its 3 choices"),
        ({"answer": None}, "none of its 3 choices"),
        ({"answer": "\u00b2"}, "none of its 3 choices"),
        ({"answer": "1" * 5000}, "none of its 3 choices"),
    ],
)
def test_unusable_rows_are_named(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as error:
        read_questions(write(tmp_path / "a.jsonl", ROW, {**ROW, **change}))
    assert "row 2 of" in str(error.value)
