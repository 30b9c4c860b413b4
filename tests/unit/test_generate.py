"""Greedy generation: the same tokens as Hugging Face's own loop, at any batch size; memory and stop tokens."""

from __future__ import annotations

import logging

import pytest
import torch

from qrealign.data import generate
from qrealign.data.batching import by_length, is_out_of_memory, run_in_batches
from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import (
    find_device,
    find_stop_ids,
    generate_answers,
    generate_ids,
)
from qrealign.errors import DeviceError
from tests.helpers import MODEL_TYPES, TOKENIZER_VOCAB, tiny_model, tiny_tokenizer

PROMPTS = [
    "hi",
    "tell me about the weather in the north of the country",
    "a b c",
    "what is this, and why?",
    "x" * 40,
    "hi",
    "other",
    "last one",
]
STOP_IDS = [2, *range(40, 70)]  # many, so that rows finish at different steps
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def encoder():
    return ChatEncoder(tiny_tokenizer(), max_length=120)


def stopping_model(model_type="llama", **overrides):
    model = tiny_model(model_type, vocab_size=TOKENIZER_VOCAB, **overrides)
    model.generation_config.eos_token_id = STOP_IDS
    return model


def reference(model, sequence):
    """What Hugging Face generates for one unpadded prompt, up to the stop token."""
    ids = torch.tensor([sequence])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    new = out[0, len(sequence) :].tolist()
    stop = next((i for i, token in enumerate(new) if token in STOP_IDS), len(new))
    return new[:stop]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_tokens_are_those_of_hugging_face_at_any_batch_size(model_type, encoder):
    model = stopping_model(model_type)
    sequences = encoder.encode_many(PROMPTS)
    expected = [reference(model, sequence) for sequence in sequences]
    for batch_size in (1, 3, 64):
        assert generate_ids(model, encoder, sequences, max_new_tokens=NEW_TOKENS, batch_size=batch_size) == expected


def test_answers_are_text_in_order_and_equal_prompts_are_asked_once(encoder, monkeypatch):
    model = stopping_model()
    asked = []
    original = generate._continue_batch
    monkeypatch.setattr(
        generate, "_continue_batch", lambda m, e, batch, *rest: asked.extend(batch) or original(m, e, batch, *rest)
    )
    answers = generate_answers(model, encoder, PROMPTS, max_new_tokens=4, batch_size=4)
    assert len(asked) == len(PROMPTS) - 1
    assert answers[0] == answers[5]
    assert [
        generate_answers(model, encoder, [prompt], max_new_tokens=4, batch_size=4)[0] for prompt in PROMPTS
    ] == answers
    assert all("</s>" not in answer for answer in answers)


def test_no_prompt_gives_no_answer(encoder):
    assert generate_answers(stopping_model(), encoder, [], max_new_tokens=4, batch_size=4) == []


def test_finished_rows_leave_the_batch(encoder):
    model = stopping_model()
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generate_ids(model, encoder, encoder.encode_many(PROMPTS), max_new_tokens=NEW_TOKENS, batch_size=8)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0]


def test_progress_goes_to_standard_error_or_nowhere(encoder, capsys):
    model = stopping_model()
    generate_answers(model, encoder, ["hi"], max_new_tokens=2, batch_size=1, progress="aligned: answers")
    captured = capsys.readouterr()
    assert "aligned: answers" in captured.err
    assert captured.out == ""
    generate_answers(model, encoder, ["hi"], max_new_tokens=2, batch_size=1, progress=None)
    assert capsys.readouterr().err == ""


def fail_above(model, rows, error):
    """Make `model` raise `error` on batches of more than `rows`."""

    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) > rows:
            raise error

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_batch_and_says_so(encoder, caplog, error):
    expected = generate_answers(stopping_model(), encoder, PROMPTS, max_new_tokens=4, batch_size=8)
    with caplog.at_level(logging.WARNING):
        answers = generate_answers(
            fail_above(stopping_model(), 2, error), encoder, PROMPTS, max_new_tokens=4, batch_size=8
        )
    assert answers == expected
    assert "batches of 2" in caplog.text
    assert "batches of 1" in caplog.text


def test_out_of_memory_at_one_prompt_is_a_device_error(encoder):
    model = fail_above(stopping_model(), 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(DeviceError, match="single prompt"):
        generate_answers(model, encoder, PROMPTS, max_new_tokens=4, batch_size=8)


def test_other_errors_are_not_taken_for_memory(encoder):
    with pytest.raises(RuntimeError, match="shapes"):
        generate_answers(
            fail_above(stopping_model(), 0, RuntimeError("shapes differ")),
            encoder,
            ["hi"],
            max_new_tokens=4,
            batch_size=8,
        )
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(MemoryError())


def test_batches_come_in_order():
    assert list(run_in_batches(sum, [1, 2, 3, 4, 5], 2)) == [([1, 2], 3), ([3, 4], 7), ([5], 5)]


def test_stop_ids_come_from_configuration_and_tokenizer(encoder):
    model = stopping_model()
    assert find_stop_ids(model, encoder) == frozenset(STOP_IDS)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert find_stop_ids(model, encoder) == {encoder.tokenizer.eos_token_id}


def test_device_is_that_of_what_is_loaded():
    model = tiny_model()
    assert find_device(model) == torch.device("cpu")
    assert find_device(model.to("meta")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("overhead", "most", "groups"),
    [
        (0, None, [[5, 5], [9], [100]]),
        (9, None, [[5, 5, 9], [100]]),
        (400, None, [[5, 5, 9, 100]]),
        (400, 3, [[5, 5, 9], [100]]),
        (400, 1, [[5], [5], [9], [100]]),
    ],
)
def test_groups_of_like_lengths_cost_least(overhead, most, groups):
    assert by_length([100, 5, 9, 5], [100, 5, 9, 5], overhead, most) == groups


def test_a_cpu_does_not_pad_short_prompts_to_a_long_one(encoder):
    model, widths = stopping_model(), []
    model.register_forward_pre_hook(lambda _, __, given: widths.append(given["input_ids"].shape), with_kwargs=True)
    sequences = [encoder.encode("hi"), encoder.encode("ho"), encoder.encode("so long " * 40)]
    generate_ids(model, encoder, sequences, max_new_tokens=1, batch_size=8)
    assert [tuple(shape) for shape in widths] == [(1, len(sequences[2])), (2, len(sequences[0]))]
