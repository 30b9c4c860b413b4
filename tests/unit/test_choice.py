"""Multiple choice: the likelihoods are those of whole, unpadded sequences, however they are shared and batched."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qrealign.data.encode import ChatEncoder
from qrealign.errors import DataError, ModelError
from qrealign.evaluate import choice
from qrealign.evaluate.book import AnswerBook
from qrealign.evaluate.choice import ChoiceQuestion, choose_options
from tests.helpers import TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

HEAD = "Questions with answers.\n\nWhat? A\n\n"


@pytest.fixture(scope="module")
def encoder():
    return ChatEncoder(tiny_tokenizer(), max_length=120)


def question(body, endings, *, head=HEAD, answer=0, normalise=False):
    return ChoiceQuestion(suite="s", head=head, body=body, endings=tuple(endings), answer=answer, normalise=normalise)


QUESTIONS = [
    question("Which?\nAnswer:", [" A", " B", " C"]),
    question("How long is a rather long question?\nAnswer:", [" short", " something longer", " it", " x"]),
    question("Why?\nAnswer:", [" because it is so", " no"], normalise=True),
    question("Another head?", [" yes", " no"], head="Other.\n"),
    question("No head at all?", [" yes", " no"], head=""),
]


def reference(model, encoder, asked):
    """The log-likelihood of each ending behind the whole text, one unpadded sequence at a time."""
    ids = encoder.tokenizer(asked.head + asked.body).input_ids
    values = []
    for ending in asked.endings:
        whole = encoder.tokenizer(asked.head + asked.body + ending).input_ids
        with torch.no_grad():
            likely = functional.log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)
        value = sum(float(likely[i - 1, whole[i]]) for i in range(len(ids), len(whole)))
        values.append(value / (len(ending.strip()) if asked.normalise else 1))
    return values


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "opt", "mixtral"])
def test_sums_are_those_of_whole_sequences(model_type, encoder, monkeypatch):
    model = tiny_model(model_type, vocab_size=TOKENIZER_VOCAB)
    seen = {}
    original = choice._best

    def record(values, asked):
        seen[asked.body] = values
        return original(values, asked)

    monkeypatch.setattr(choice, "_best", record)
    for batch_size in (1, 8):
        chosen = choose_options(model, encoder, QUESTIONS, AnswerBook(), batch_size=batch_size)
        for asked, index in zip(QUESTIONS, chosen, strict=True):
            expected = reference(model, encoder, asked)
            lengths = [len(ending.strip()) if asked.normalise else 1 for ending in asked.endings]
            ours = [value / length for value, length in zip(seen[asked.body], lengths, strict=True)]
            assert ours == pytest.approx(expected, abs=1e-4)
            assert index == max(range(len(expected)), key=expected.__getitem__)


def test_the_common_beginning_runs_once_a_batch(encoder):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    fed = []
    model.register_forward_pre_hook(lambda m, a, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True)
    questions = [question(f"{letter}?", [" A", " B"]) for letter in "abcdef"]
    choose_options(model, encoder, questions, AnswerBook(), batch_size=6)
    whole = len(encoder.tokenizer(HEAD + "a?").input_ids)
    assert sum(fed) < 3 * whole < 6 * whole


def test_letters_of_one_token_need_one_pass(encoder):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    passes = []
    model.register_forward_pre_hook(lambda *arguments: passes.append(1))
    choose_options(model, encoder, [question("Q?", ["A", "B"], head="")], AnswerBook(), batch_size=4)
    assert len(passes) == 1


def test_long_options_win_only_without_normalisation(encoder):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    model.lm_head.weight.data.zero_()  # every token is equally likely
    endings = [" four", " a much longer option"]
    plain = choose_options(model, encoder, [question("Q?", endings[::-1])], AnswerBook(), batch_size=1)
    per_byte = choose_options(
        model, encoder, [question("Q?", ["four", "a much longer"], normalise=True)], AnswerBook(), batch_size=1
    )
    assert plain == [1]  # the shorter one
    assert per_byte == [0]  # equal per byte: the first


def test_too_long_questions_lose_their_beginning(encoder):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB, max_position_embeddings=40)
    lengths = []
    model.register_forward_pre_hook(
        lambda m, a, kwargs: lengths.append(kwargs["attention_mask"].shape[1]), with_kwargs=True
    )
    long = [question("The end of the question?", [" A", " B"], head="many examples " * 20)]
    assert choose_options(model, encoder, long, AnswerBook(), batch_size=4) in ([0], [1])
    assert max(lengths) <= 40


def test_an_option_too_long_for_the_model_is_refused(encoder):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB, max_position_embeddings=40)
    with pytest.raises(DataError, match=r"question 'Why.*and the model knows 40 positions: shorten it"):
        choose_options(model, encoder, [question("Why?", [" no", " so" * 60])], AnswerBook(), batch_size=4)


def test_known_choices_are_not_asked_again(encoder):
    model, book = tiny_model(vocab_size=TOKENIZER_VOCAB), AnswerBook()
    first = choose_options(model, encoder, QUESTIONS, book, batch_size=4)
    model.register_forward_pre_hook(lambda *arguments: pytest.fail("asked again"))
    assert choose_options(model, encoder, QUESTIONS, book, batch_size=4) == first
    assert book.reused == len(QUESTIONS)


def test_a_cache_that_cannot_be_copied_is_refused(encoder):
    class Bare:
        pass

    items = [choice._Item(position=0, shared=(), body=(1, 2), tails=((3, 4), (5,)))]
    with pytest.raises(ModelError, match="by their letter"):
        choice._score_rest(tiny_model(), encoder, items, Bare(), torch.ones(1, 2), torch.tensor([1]))
