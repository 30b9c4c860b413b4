"""The recorded pass: batches of one shape give the losses and gradients of batches as they come."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qrealign.calibrate.endtoend import EndToEndCalibrator
from qrealign.calibrate.objectives import BehaviourObjective, Room
from qrealign.calibrate.readout import causal_mask, final_hidden
from qrealign.calibrate.recorded import RecordedPass
from qrealign.calibrate.teachers import TeacherCache
from tests.helpers import MODEL_TYPES, TOKENIZER_VOCAB, tiny_model
from tests.unit.test_endtoend import SETTINGS, cache_of, student


def objective():
    aligned, finetuned = (tiny_model("llama", seed=seed, vocab_size=TOKENIZER_VOCAB) for seed in (2, 1))
    cache = TeacherCache(samples=cache_of(aligned, finetuned).samples, head_weight=aligned.lm_head.weight.detach())
    return BehaviourObjective(cache, SETTINGS, pad_id=0, device=torch.device("cpu"))


def test_a_room_holds_the_largest_of_all_batches():
    it = objective()
    samples = it.samples  # six malicious ones, then six benign ones, of 10 to 15 tokens and 4 positions each
    assert it.room([samples[:1], samples[4:8]]) == Room(length=16, positions={"malicious": 8, "benign": 8})
    assert it.room([samples[7:9]]) == Room(length=16, positions={"benign": 8})
    long = dataclasses.replace(samples[0], input_ids=torch.arange(3, 103))
    assert it.room([[long, *samples[1:4]]], may_pack=True) == Room(length=136, positions={"malicious": 16}, packed=True)
    assert not it.room([[long, long]], may_pack=True).packed and not it.room([[long, *samples[1:4]]]).packed


def labelled(it):
    """Return the objective with labels to learn in two benign samples."""
    for index in (7, 9):
        weights = torch.tensor([0.0, 0.5, 0.25, 0.0])
        it.samples[index] = dataclasses.replace(it.samples[index], answer_weights=weights)
    return it


def test_labels_are_learned_by_cross_entropy_at_their_own_tokens():
    it, (model, _) = labelled(objective()), student()
    samples = [it.samples[index] for index in (2, 7, 8)]
    losses = it.losses(model, samples, it.count(samples))
    row, at = samples[1].input_ids, samples[1].positions
    logits = model(row[None]).logits[0, at].log_softmax(-1)
    surprise = -logits[torch.arange(4), row[at + 1]]
    wanted = SETTINGS.benign_weight * float((surprise * samples[1].answer_weights).sum()) / 2  # two benign samples
    assert float(losses["answer"].detach()) == pytest.approx(wanted, rel=1e-4)
    assert it.room([it.samples[6:10]]).positions == {"benign": 16, "answer": 4}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chosen", [[0, 1, 6, 7], [2, 8], [3, 4], [9]], ids=["both", "pair", "malicious", "benign"])
def test_losses_and_gradients_are_those_of_a_batch_as_it_comes(chosen, packed, monkeypatch):
    monkeypatch.setattr("qrealign.calibrate.objectives.PACKED_SHARE", 9.0 if packed else 0.0)
    it = labelled(objective())
    model, trainable = student()
    for name, value in trainable.named.items():
        if name.endswith("left"):
            torch.nn.init.normal_(value, std=0.02)
    samples = [it.samples[index] for index in chosen]
    counts = it.count(samples)
    expected = it.losses(model, samples, counts)
    sum(expected.values()).backward()
    wanted = {name: value.grad.clone() for name, value in trainable.named.items()}
    recorded = RecordedPass(model, trainable, it, [it.samples])
    assert recorded.room.packed == packed
    for _ in range(2):  # gradients of the pass before are forgotten
        found = recorded(samples, counts)
    for name, value in found.items():
        assert float(value) == pytest.approx(float(expected[name]) if name in expected else 0.0, rel=1e-4)
    for name, value in trainable.named.items():
        torch.testing.assert_close(value.grad, wanted[name], atol=1e-7, rtol=1e-3, msg=name)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_mask_made_once_is_the_models_own(model_type):
    model = tiny_model(model_type)
    ids = torch.randint(3, 150, (2, 9))
    expected = final_hidden(model, ids, torch.ones_like(ids))
    torch.testing.assert_close(final_hidden(model, ids), expected, atol=1e-5, rtol=1e-4)
    if (mask := causal_mask(model, 9)) is not None:
        torch.testing.assert_close(final_hidden(model, ids, mask), expected, atol=1e-5, rtol=1e-4)
        sequence = torch.arange(2).repeat_interleave(9)
        among = causal_mask(model, 18) & (sequence[:, None] == sequence)
        packed = final_hidden(model, ids.reshape(1, 18), among, torch.arange(9).repeat(2)[None])
        torch.testing.assert_close(packed.reshape(expected.shape), expected, atol=1e-5, rtol=1e-4)
    assert (mask is None) == (model_type in ("mistral", "gemma2", "gemma3_text"))


def calibrator(path, *, record):
    model, trainable = student()
    return EndToEndCalibrator(model, trainable, objective(), SETTINGS, state_path=path, record=record)


def test_a_recorded_run_goes_where_the_other_goes(tmp_path):
    plain, recorded = (calibrator(tmp_path / f"{record}.safetensors", record=record) for record in (False, True))
    for ours, theirs in zip(recorded.run(progress=None), plain.run(progress=None), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=2e-2, abs=1e-3)


def test_a_batch_that_does_not_fit_ends_the_recording(tmp_path, monkeypatch, caplog):
    runner = calibrator(tmp_path / "state.safetensors", record=True)

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner.objective, "losses_of", too_large)
    original = BehaviourObjective.losses_of.__get__(runner.objective)

    def losses(model, samples, counts):
        monkeypatch.setattr(runner.objective, "losses_of", original)
        return BehaviourObjective.losses(runner.objective, model, samples, counts)

    monkeypatch.setattr(runner.objective, "losses", losses)
    assert len(runner.run(progress=None)) == SETTINGS.steps
    assert runner.recorded is None and runner.parts.size == 2 and "parts of 2" in caplog.text
