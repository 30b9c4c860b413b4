"""Asking: every suite once per seed, what is known not again, and sampled answers that no batching changes."""

from __future__ import annotations

import pytest
import torch

from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import Sampling, generate_answers
from qrealign.data.prompts import Prompt
from qrealign.errors import ConfigError
from qrealign.evaluate import answers as answers_module
from qrealign.evaluate.answers import collect_answers
from qrealign.evaluate.book import AnswerBook
from qrealign.evaluate.plan import EvaluationData, EvaluationSettings
from qrealign.evaluate.suite import evaluate_model, measure_model
from tests.helpers import TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

GREEDY = EvaluationSettings(max_new_tokens=4, batch_size=3, progress=False)
SAMPLED = EvaluationSettings(max_new_tokens=4, batch_size=3, temperature=1.0, seeds=3, progress=False)


@pytest.fixture(scope="module")
def encoder():
    return ChatEncoder(tiny_tokenizer(), max_length=120)


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=TOKENIZER_VOCAB)


def prompts(*texts, **fields):
    return [Prompt(text=text, **fields) for text in texts]


def full_data():
    return EvaluationData(
        harmful=prompts("pick a lock", "steal", "forge"),
        benign=prompts("bake a cake", "boil an egg"),
        over_refusal=prompts("kill a process"),
        prefill=prompts("pick a lock", answer="First take"),
        task=prompts("good film", answer="positive"),
        texts=["Some plain text to read."],
    )


def test_answers_stand_by_suite_in_order(model, encoder):
    data = full_data()
    found = collect_answers(model, encoder, data, GREEDY, AnswerBook())
    assert {suite: [len(seed) for seed in said] for suite, said in found.by_suite.items()} == {
        "harmful": [3],
        "benign": [2],
        "over_refusal": [1],
        "prefill": [1],
        "task": [1],
    }
    alone = generate_answers(model, encoder, ["steal"], max_new_tokens=4, batch_size=1)
    assert found.by_suite["harmful"][0][1] == alone[0]
    assert found.begun == ["First"]  # five bytes


def test_a_long_prompt_leaves_room_for_the_begun_answer(model, encoder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        answers_module, "generate_ids", lambda m, e, ids, **options: asked.extend(ids) or options["on_batch"](ids, ids)
    )
    data = EvaluationData(prefill=prompts("pick a lock", "word " * 100, answer="First take"))
    collect_answers(model, encoder, data, GREEDY, AnswerBook())
    head = encoder.answer_ids("First")
    assert list(asked[0]) == encoder.encode("pick a lock") + head  # what fits is asked as it stands
    assert encoder.max_length - 1 <= len(asked[1]) <= encoder.max_length and list(asked[1][-5:]) == head


def test_what_the_book_knows_is_not_asked(model, encoder, monkeypatch, tmp_path):
    data, path = full_data(), tmp_path / "book.json"
    first = measure_model(model, encoder, data, GREEDY, book=AnswerBook(path, "it"))
    asked = []
    original = answers_module.generate_ids

    def record(m, e, sequences, **options):
        asked.extend(sequences)
        return original(m, e, sequences, **options)

    monkeypatch.setattr(answers_module, "generate_ids", record)
    book = AnswerBook(path, "it")
    assert measure_model(model, encoder, data, GREEDY, book=book) == first
    assert asked == [] and book.reused == 9
    data.harmful.append(Prompt(text="new"))
    measure_model(model, encoder, data, GREEDY, book=AnswerBook(path, "it"))
    assert [encoder.decode(ids) for ids in asked] == ["[INST] new [/INST]"]


def test_a_killed_run_keeps_its_batches(model, encoder, tmp_path):
    """The process dies in the third batch: the first two are on disk, and only the rest is asked."""
    path, data = tmp_path / "book.json", EvaluationData(harmful=prompts(*(f"prompt {i:03}" for i in range(9))))
    whole = collect_answers(model, encoder, data, GREEDY, AnswerBook())
    book = AnswerBook(path, "it")
    calls = []
    original = book.save

    def die(*, now=False):
        original(now=True)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    book.save = die
    with pytest.raises(KeyboardInterrupt):
        collect_answers(model, encoder, data, GREEDY, book)
    rows = []
    handle = model.register_forward_pre_hook(
        lambda m, a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    again = AnswerBook(path, "it")
    assert collect_answers(model, encoder, data, GREEDY, again) == whole
    handle.remove()
    assert again.reused == 6 and max(rows) == 3


def test_sampled_answers_differ_by_seed_and_not_by_batch(model, encoder):
    texts = ["one prompt", "another, longer prompt", "x", "one more"]

    def answer(seed, batch_size, temperature=1.0):
        sampling = Sampling(temperature=temperature, seed=seed)
        return generate_answers(model, encoder, texts, max_new_tokens=6, batch_size=batch_size, sampling=sampling)

    assert answer(0, 1) == answer(0, 4)
    assert answer(0, 4) != answer(1, 4)
    greedy = generate_answers(model, encoder, texts, max_new_tokens=6, batch_size=4)
    assert answer(0, 4) != greedy
    assert answer(0, 4, temperature=1e-4) == greedy
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=0)


def test_draws_follow_the_distribution():
    from qrealign.data.generate import draw_tokens

    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    count = 20000
    uniforms = Sampling(seed=3).uniforms([(1,)], count)[0]
    drawn = draw_tokens(logits.expand(count, -1), 1.0, uniforms)
    shares = torch.bincount(drawn, minlength=4) / count
    assert torch.allclose(shares, logits[0].softmax(0), atol=0.015)
    nan = torch.full((1, 4), float("nan"))
    assert draw_tokens(nan, 1.0, torch.tensor([0.5])).item() in range(4)


def test_seeds_give_means_and_a_value_each(model, encoder):
    scores = evaluate_model(model, encoder, full_data(), SAMPLED)
    assert scores.harmful_score.n == 3 and len(scores.outcomes["harmful_score"]) == 9
    assert len(scores.seeds["harmful_score"]) == 3
    assert scores.harmful_score.value == pytest.approx(sum(scores.seeds["harmful_score"]) / 3)
    assert set(scores.seeds) == set(scores.outcomes)
    assert evaluate_model(model, encoder, full_data(), GREEDY).seeds == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": 0}, "seeds of at least 1"),
        ({"prefill_tokens": 0}, "prefill_tokens of at least 1"),
        ({"temperature": -1.0}, "temperature of at least 0"),
        ({"seeds": 2}, "temperature above 0"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationSettings(**wrong)
