"""What teachers leave: where a late refusal stands, what weighs in an answer, windows of running text."""

import dataclasses

import pytest
import torch

from qrealign.calibrate.methods import DECISION_TOKENS, method_settings
from qrealign.calibrate.teachers import TeacherCache, teach_behaviour, teach_recovery, teach_refusals, teach_text
from qrealign.data.encode import ChatEncoder
from qrealign.data.prompts import Prompt
from qrealign.models.source import open_model
from tests.helpers import tiny_checkpoint, tiny_tokenizer

PROMPTS = [Prompt(text=f"prompt number {i} of some length" + "!" * i) for i in range(8)]
LATE = {"begun_tokens": (1, 4), "batch_size": 3, "progress": None}


@pytest.fixture(scope="module")
def encoder():
    return ChatEncoder(tiny_tokenizer(), max_length=96)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [open_model(str(tiny_checkpoint(folder / str(i), seed=i))).load_model("cpu", torch.float32) for i in (1, 2)]


@pytest.fixture
def refusals(models, encoder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("qrealign.calibrate.teachers.is_refusal", lambda _: True)
        return teach_refusals(models[0], encoder, PROMPTS, answer_tokens=8, batch_size=3, progress=None)


def test_a_late_refusal_follows_the_begun_answer_and_keeps_its_target(models, encoder, refusals):
    late = teach_recovery(models[1], encoder, refusals, share=0.5, seed=3, **LATE)
    assert len(late) == 4
    for sample in late:
        start = next(
            len(head)
            for head in (encoder.encode(p.text) for p in PROMPTS)
            if sample.input_ids.tolist()[: len(head)] == head
        )
        first = next(r for r in refusals if torch.equal(r.input_ids[:start], sample.input_ids[:start]))
        begun = int(sample.positions[0]) + 1 - start
        assert 1 <= begun <= 4
        assert torch.equal(sample.input_ids[start + begun :], first.input_ids[start:])
        assert torch.equal(sample.hidden, first.hidden) and torch.equal(sample.weights, first.weights)


def test_no_refusal_follows_where_the_model_begins_to_refuse(models, encoder, refusals, monkeypatch):
    verdicts = iter([True, False, True, False])
    monkeypatch.setattr("qrealign.calibrate.teachers.is_refusal", lambda _: next(verdicts))
    refused = teach_recovery(models[1], encoder, refusals, share=0.5, seed=3, **LATE)
    monkeypatch.setattr("qrealign.calibrate.teachers.is_refusal", lambda _: False)
    every = teach_recovery(models[1], encoder, refusals, share=0.5, seed=3, **LATE)
    assert [s.input_ids.tolist() for s in refused] == [s.input_ids.tolist() for s in every[1::2]]


def test_late_refusals_are_drawn_by_the_seed_and_can_be_stored(models, encoder, refusals, tmp_path):
    def ids(seed):
        return [
            s.input_ids.tolist() for s in teach_recovery(models[1], encoder, refusals, share=1.0, seed=seed, **LATE)
        ]

    assert ids(1) == ids(1) != ids(2)
    assert teach_recovery(models[1], encoder, refusals, share=0.0, seed=1, **LATE) == []
    late = teach_recovery(models[1], encoder, refusals, share=1.0, seed=1, **LATE)
    TeacherCache(samples=[*refusals, *late]).save(tmp_path / "cache.safetensors")
    assert len(TeacherCache.load(tmp_path / "cache.safetensors").samples) == 16


def test_the_deciding_tokens_weigh_what_was_asked(models, encoder):
    def weights(**changes):
        samples = teach_behaviour(
            models[0], encoder, PROMPTS[:1], answer_tokens=12, batch_size=1, progress=None, **changes
        )
        return samples[0].weights

    start = len(encoder.encode(PROMPTS[0].text)) - 1
    even, deciding = weights(), weights(decision_share=1.0)
    count = min(DECISION_TOKENS, len(even) - start)
    assert float(deciding[start : start + count].sum()) == pytest.approx(1.0)
    assert float(deciding[start]) == pytest.approx(0.1 + 0.9 / count) and float(deciding[:start].sum()) == 0
    assert torch.allclose(weights(decision_share=0.5), 0.5 * even + 0.5 * deciding)
    assert torch.allclose(weights(weight=0.25), 0.25 * even)


def test_a_task_prompt_answered_with_a_label_is_taught_its_own(models, encoder, monkeypatch):
    texts = ["yes", "Yes", "no, because of much", "no"]  # what the fine-tuned model says
    expected = ["yes", "no", "no", None]
    prompts = [Prompt(text=f"task {index}", answer=answer) for index, answer in enumerate(expected)]
    answers = [encoder.answer_ids(text) for text in texts]
    monkeypatch.setattr("qrealign.calibrate.teachers._answers", lambda *_: [list(answer) for answer in answers])
    options = {"answer_tokens": 12, "batch_size": 2, "progress": None, "decision_share": 0.5}
    own = teach_behaviour(models[0], encoder, prompts, **options)
    taught = teach_behaviour(models[0], encoder, prompts, label_share=0.25, **options)
    assert all(sample.answer_weights is None for sample in own)
    for index in (2, 3):  # its own words, and no label to learn
        assert torch.equal(taught[index].input_ids, own[index].input_ids) and taught[index].answer_weights is None
    for sample, prompt in zip(taught[:2], prompts[:2], strict=True):
        head, label = encoder.encode(prompt.text), encoder.answer_ids("no" if prompt.answer == "no" else "Yes")
        assert sample.input_ids.tolist() == head + label  # as the model writes it, where it does
        chooses = (sample.positions >= len(head) - 1) & (sample.positions < len(head) + len(label) - 1)
        assert torch.allclose(sample.answer_weights, 0.25 * (sample.weights + sample.answer_weights) * chooses)
        assert float((sample.weights + sample.answer_weights).sum()) == pytest.approx(1.0)


def test_a_stored_sample_keeps_its_label(models, encoder, tmp_path):
    prompts = [Prompt(text="task", answer="x"), PROMPTS[0]]
    samples = teach_behaviour(models[0], encoder, prompts, answer_tokens=4, batch_size=2, progress=None)
    samples[0] = dataclasses.replace(samples[0], answer_weights=torch.rand(len(samples[0].positions)))
    TeacherCache(samples=samples).save(tmp_path / "cache.safetensors")
    labelled, plain = TeacherCache.load(tmp_path / "cache.safetensors").samples
    assert torch.equal(labelled.answer_weights, samples[0].answer_weights) and plain.answer_weights is None


def test_running_text_weighs_the_same_everywhere(models, encoder):
    (sample,) = teach_text(models[0], encoder, [[5, 6, 7, 8]], weight=2.0, batch_size=1)
    assert sample.positions.tolist() == [0, 1, 2, 3] and torch.allclose(sample.weights, torch.full((4,), 0.5))


def test_four_bits_get_a_recipe_of_their_own():
    fine, coarse = (method_settings("realign", activation_bits=bits) for bits in (8, 4))
    assert coarse.edit_rank > fine.edit_rank and coarse.transform_learning_rate and not fine.transform_learning_rate
    assert method_settings("rtn", activation_bits=4) == method_settings("rtn")
    assert method_settings("realign", activation_bits=4, edit_rank=3).edit_rank == 3
    weights = method_settings("realign", weight_bits=4)
    assert weights.benign_weight > fine.benign_weight and weights.edit_rank == fine.edit_rank
    assert method_settings("realign", weight_bits=4, activation_bits=4) == coarse
