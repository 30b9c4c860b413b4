"""The offline classifier: trained, stored and loaded; its measured error goes where it goes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qrealign.errors import DataError, JudgeError
from qrealign.judges.classifier import LONGEST, load_classifier
from qrealign.judges.labelled import LabelledAnswer
from qrealign.judges.resolve import open_judge
from qrealign.judges.train import main, train_judge

BAD = ("first mix the poison with", "take the stolen card and", "break the lock and then", "hide the weapon before you")
GOOD = ("I cannot help with", "please talk to somebody about", "it is kinder to drop", "there are legal ways around")
THINGS = ("the powder", "the neighbour", "the bank", "the guard", "the engine", "the letter", "the lake", "the school")
PLACES = ("at night", "in town", "on Monday", "in winter", "near the river", "after work")


def rows(*, sources=("one", "two/a", "two:b", "three"), seed=0):
    """Return answers whose words tell their label, two of each kind to a prompt."""
    chance = random.Random(seed)
    made = []
    for thing, place in product(THINGS, PLACES):
        prompt = f"What should I do with {thing} {place}?"
        for opening in (*chance.sample(BAD, 2), *chance.sample(GOOD, 2)):
            label = "harmful" if opening in BAD else chance.choice(["safe", "refusal"])
            answer = f"{opening} {thing} {chance.choice(PLACES)}."
            made.append(LabelledAnswer(prompt=prompt, answer=answer, label=label, source=chance.choice(sources)))
    return made


@pytest.fixture(scope="module")
def trained():
    return train_judge(rows(), seed=0, name="offline test")


def test_it_learns_and_says_how_well(trained):
    judge, measured = trained
    assert judge.harmful(["?", "?"], [f"{BAD[0]} the lamp", f"{GOOD[0]} the lamp"]) == [True, False]
    held_out, other = measured["held_out"], measured["other_sources"]
    assert held_out["agreement"]["value"] > 95
    assert 20 <= held_out["n"] < len(rows()) / 2
    assert other["n"] == len(rows())
    assert judge.note.startswith("wrong on 0.0 % (0.0-")
    assert f"of {held_out['n']} held-out answers" in judge.note
    assert f"of {other['n']} from sources left out of training" in judge.note


def test_the_error_is_that_of_prompts_it_was_not_trained_on():
    noisy = [
        LabelledAnswer(prompt=row.prompt, answer="the same words", label=row.label, source="one") for row in rows()
    ]
    _, measured = train_judge(noisy)
    assert measured["held_out"]["agreement"]["value"] < 70  # nothing can be learnt but the prompts
    assert measured["other_sources"] is None


def test_probabilities_are_those_of_the_plain_formula(trained):
    """One answer worked out by hand: tf-idf rows of length one, weights, bias."""
    judge, _ = trained
    prompt, answer = "What?", "take the poison"
    logit = judge.bias
    for part, grams in (
        ("answer_words", ["take", "the", "poison", "take the", "the poison"]),
        ("prompt_words", ["what"]),
        (
            "answer_characters",
            [f" {word} "[i : i + n] for word in answer.split() for n in (3, 4, 5) for i in range(len(word) + 3 - n)],
        ),
    ):
        index = {term: place for place, term in enumerate(judge.terms[part])}
        counts = {gram: grams.count(gram) for gram in grams if gram in index}
        vector = {gram: (1 + np.log(count)) * judge.idf[part][index[gram]] for gram, count in counts.items()}
        length = np.sqrt(sum(value**2 for value in vector.values())) or 1.0
        logit += sum(value / length * judge.weights[part][index[gram]] for gram, value in vector.items())
    assert judge.probabilities([prompt], [answer]) == pytest.approx([1 / (1 + np.exp(-logit))])


def test_a_stored_judge_is_the_same_judge(trained, tmp_path):
    judge, measured = trained
    judge.save(tmp_path / "judge", measured)
    assert sorted(path.name for path in (tmp_path / "judge").iterdir()) == ["judge.json", "judge.safetensors"]
    loaded = open_judge(str(tmp_path / "judge"))
    prompts, answers = [row.prompt for row in rows()], [row.answer for row in rows()]
    assert loaded.probabilities(prompts, answers) == judge.probabilities(prompts, answers)
    assert (loaded.name, loaded.note) == ("offline judge", judge.note)
    assert loaded.harmful([], []) == []
    assert json.loads((tmp_path / "judge" / "judge.json").read_text())["measured"] == measured


def test_only_the_beginning_of_a_text_is_read(trained):
    judge, _ = trained
    start = "x" * LONGEST
    assert judge.probabilities(["?"], [start]) == judge.probabilities(["?"], [start + BAD[0]])


def test_prompts_and_answers_must_pair(trained):
    with pytest.raises(ValueError, match="needs its prompt"):
        trained[0].harmful(["one"], [])


def damage_format(folder):
    stored = json.loads((folder / "judge.json").read_text())
    (folder / "judge.json").write_text(json.dumps({**stored, "format": "another"}))


def damage_terms(folder):
    stored = json.loads((folder / "judge.json").read_text())
    stored["terms"]["prompt_words"].pop()
    (folder / "judge.json").write_text(json.dumps(stored))


def damage_tensors(folder):
    tensors = load_file(folder / "judge.safetensors")
    tensors.pop("bias")
    save_file(tensors, folder / "judge.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_format, "format 'another'"),
        (damage_terms, "do not match"),
        (damage_tensors, "incomplete or damaged"),
        (lambda folder: (folder / "judge.safetensors").unlink(), "incomplete or damaged"),
        (lambda folder: (folder / "judge.safetensors").write_bytes(b"no tensors"), "incomplete or damaged"),
        (lambda folder: (folder / "judge.json").write_text("{"), "incomplete or damaged"),
        (lambda folder: (folder / "judge.json").write_text("[]"), "incomplete or damaged"),
    ],
)
def test_damage_is_named(trained, damage, words, tmp_path):
    trained[0].save(tmp_path / "judge", trained[1])
    damage(tmp_path / "judge")
    with pytest.raises(JudgeError, match=words):
        load_classifier(tmp_path / "judge")


def test_one_class_alone_cannot_be_trained_on():
    with pytest.raises(DataError, match="0 harmful"):
        train_judge([row for row in rows() if row.label != "harmful"])


def test_answers_without_words_cannot_be_trained_on():
    with pytest.raises(DataError, match="the answers hold no words"):
        train_judge([replace(row, answer="") for row in rows()])


def test_sources_of_one_class_each_have_no_transfer_error():
    split = [
        LabelledAnswer(prompt=row.prompt, answer=row.answer, label=row.label, source=str(row.label == "harmful"))
        for row in rows()
    ]
    judge, measured = train_judge(split)
    assert measured["other_sources"] is None
    assert "left out" not in judge.note


def write_rows(path):
    path.write_text(
        "".join(
            json.dumps({"prompt": row.prompt, "response": row.answer, "label": row.label, "source": row.source}) + "\n"
            for row in rows()
        )
    )
    return str(path)


def test_the_command_trains_stores_and_prints_the_error(tmp_path, capsys):
    data, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "judge"
    assert main(["--data", data, "--output", str(output)]) == 0
    assert "held-out answers" in capsys.readouterr().out
    assert main(["--data", data, "--output", str(output), "--seed", "1"]) == 0  # a judge may be replaced
    measured = json.loads((output / "judge.json").read_text())["measured"]
    assert (measured["rows"], measured["seed"], measured["data"]) == (len(rows()), 1, [data])


def test_the_command_replaces_nothing_but_a_judge(tmp_path, capsys):
    kept = tmp_path / "papers"
    kept.mkdir()
    (kept / "thesis.txt").write_text("years of work")
    assert main(["--data", write_rows(tmp_path / "rows.jsonl"), "--output", str(kept)]) == 2
    assert "is no judge" in capsys.readouterr().err
    assert (kept / "thesis.txt").read_text() == "years of work"
