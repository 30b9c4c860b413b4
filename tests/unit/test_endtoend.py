"""The end-to-end engine: it learns, resumes bit for bit, recovers from divergence, and ends in what was trained."""

from dataclasses import replace

import pytest
import torch

from qrealign.calibrate.blockwise import freeze_block
from qrealign.calibrate.endtoend import EndToEndCalibrator
from qrealign.calibrate.methods import method_settings
from qrealign.calibrate.objectives import BehaviourObjective
from qrealign.calibrate.parameters import BlockContext, Trainable
from qrealign.calibrate.readout import final_hidden, readout
from qrealign.calibrate.teachers import TeacherCache, TeacherSample, teach_behaviour, teach_refusals
from qrealign.config import parse_scheme
from qrealign.data.batching import by_length
from qrealign.data.encode import ChatEncoder
from qrealign.data.prompts import Label, Prompt
from qrealign.errors import CalibrationDivergedError, DataError, DeviceError
from qrealign.models.source import open_model
from qrealign.quant.fake_quant import swap_linears
from tests.helpers import MODEL_TYPES, TOKENIZER_VOCAB, tiny_checkpoint, tiny_model, tiny_tokenizer

PROMPTS = [Prompt(text=f"prompt number {i} of some length" + "!" * i) for i in range(8)]
SETTINGS = method_settings("realign", steps=24, batch_size=4, benign_weight=0.7, edit_rank=2, edit_budget=0.05)


def encoder():
    return ChatEncoder(tiny_tokenizer(), max_length=96)


def cache_of(aligned, finetuned):
    samples = []
    for label, model in ((Label.MALICIOUS, aligned), (Label.BENIGN, finetuned)):
        for index in range(6):
            ids = torch.randint(3, TOKENIZER_VOCAB, (10 + index,), generator=torch.Generator().manual_seed(index))
            hidden = final_hidden(model, ids[None], torch.ones_like(ids)[None])[0]
            samples.append(
                TeacherSample(
                    label=label,
                    input_ids=ids,
                    positions=torch.arange(6, 10),
                    weights=torch.full((4,), 0.25),
                    hidden=hidden[6:10],
                )
            )
    return TeacherCache(samples=samples)


def student(model_type="llama", settings=SETTINGS, scheme="w8a8"):
    model = tiny_model(model_type, seed=1, vocab_size=TOKENIZER_VOCAB)
    for block in model.model.layers:
        swap_linears(block, parse_scheme(scheme), scale_dtype=torch.float32)
    contexts = [
        BlockContext(block=block, index=i, spec=None, settings=settings) for i, block in enumerate(model.model.layers)
    ]
    return model, Trainable(contexts)


def calibrator(tmp_path, settings=SETTINGS, name="state", **options):
    aligned, finetuned = (tiny_model("llama", seed=seed, vocab_size=TOKENIZER_VOCAB) for seed in (2, 1))
    model, trainable = student(settings=settings)
    objective = BehaviourObjective(cache_of(aligned, finetuned), settings, pad_id=0, device=model.device)
    state = tmp_path / f"{name}.safetensors"
    return EndToEndCalibrator(model, trainable, objective, settings, state_path=state, **options)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_readout_of_final_hidden_is_the_models_logits(model_type):
    model = tiny_model(model_type)
    ids = torch.randint(3, 150, (2, 9))
    hidden = final_hidden(model, ids, torch.ones_like(ids))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(readout(model, hidden[1]), logits[1], atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, logits)  # the patch is gone
    other = torch.randn_like(model.get_output_embeddings().weight)
    assert not torch.allclose(readout(model, hidden[1], other), logits[1])
    assert torch.equal(readout(model, hidden[1]), readout(model, hidden[1]))


@pytest.mark.parametrize(
    "changes", [{}, {"edit_learning_rate": 0.0, "clip_learning_rate": 0.2}], ids=["edit", "clipping"]
)
def test_losses_fall(tmp_path, changes):
    curve = calibrator(tmp_path, replace(SETTINGS, **changes)).run(progress=None)
    assert len(curve) == SETTINGS.steps
    first, last = (sum(point.losses["total"] for point in part) for part in (curve[:4], curve[-4:]))
    assert last < (0.9 if not changes else 0.99) * first


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    whole = calibrator(tmp_path, name="whole")
    whole.run(progress=None)

    class Killed(Exception):
        pass

    def kill(step):
        if step == 17:
            raise Killed

    broken = calibrator(tmp_path, name="broken")
    with pytest.raises(Killed):
        broken.run(progress=None, on_step=kill)
    resumed = calibrator(tmp_path, name="broken")
    steps = []
    resumed.run(progress=None, on_step=steps.append)
    assert steps[0] == 11  # ten steps are saved, the seven after them are lost
    for name, tensor in whole.trainable.state().items():
        assert torch.equal(resumed.trainable.state()[name], tensor), name
    assert [point.losses for point in resumed.curve] == [point.losses for point in whole.curve]


def test_divergence_restores_halves_and_then_stops(tmp_path, monkeypatch):
    runner = calibrator(tmp_path)
    original, take, calls, taken = runner.objective.losses, runner._step, {"bad": 1}, []

    def step(number):
        taken.append(number)
        return take(number)

    def losses(model, samples, counts):
        values = original(model, samples, counts)
        if taken[-1] == 13 and calls["bad"]:
            calls["bad"] -= 1
            values["benign"] = values["benign"] * float("nan")
        return values

    monkeypatch.setattr(runner, "_step", step)
    monkeypatch.setattr(runner.objective, "losses", losses)
    curve = runner.run(progress=None)
    assert runner.trainable.rate_factor == 0.5 and [point.step for point in curve] == list(range(SETTINGS.steps))
    assert taken == [
        *range(20),
        *range(10, SETTINGS.steps),
    ]  # found when the losses are read, and taken back from there
    calls["bad"] = 10**6
    runner.state_path.unlink()
    runner.curve = []
    with pytest.raises(CalibrationDivergedError, match="end-to-end engine, step 13"):
        runner.run(progress=None)


def test_out_of_memory_goes_on_in_parts_with_the_same_result(tmp_path, monkeypatch, caplog):
    whole, parts = calibrator(tmp_path, name="whole"), calibrator(tmp_path, name="parts")
    original = parts.objective.losses

    def losses(model, samples, counts):
        if len(samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, samples, counts)

    monkeypatch.setattr(parts.objective, "losses", losses)
    first, second = (runner.run(progress=None)[:4] for runner in (whole, parts))
    assert parts.parts.size == 2 and "parts of 2" in caplog.text
    for ours, theirs in zip(first, second, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-3, abs=1e-5)
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(parts.objective, "losses", lambda *_: (_ for _ in ()).throw(out_of_memory))
    parts.state_path.unlink()
    with pytest.raises(DeviceError, match="does not hold one calibration prompt"):
        parts.run(progress=None)


def test_a_cpu_groups_a_batch_by_length_with_the_same_gradients(tmp_path):
    grouped, whole = calibrator(tmp_path), calibrator(tmp_path)
    lengths = [len(sample.input_ids) for sample in grouped.objective.samples]
    passes = []
    compute = grouped.objective.losses
    grouped.objective.losses = lambda model, part, counts: passes.append(len(part)) or compute(model, part, counts)
    grouped.parts.split = lambda part: by_length(part, [grouped.objective.length(item) for item in part], overhead=0)
    whole.parts.split = None
    for engine in (grouped, whole):
        engine.trainable.step = lambda: None  # the gradients stay to be compared
        engine._step(0)
    assert len(passes) == len({lengths[index] for index in grouped.schedule[0]}) > 1
    for name, parameter in grouped.trainable.named.items():
        other = whole.trainable.named[name].grad
        torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-7)


def test_frozen_student_computes_what_was_trained(tmp_path):
    runner = calibrator(tmp_path)
    runner.run(progress=None)
    ids = torch.randint(3, TOKENIZER_VOCAB, (2, 12))
    before = runner.model(input_ids=ids).logits
    for block in runner.model.model.layers:
        freeze_block(block, torch.float32)
    assert torch.equal(runner.model(input_ids=ids).logits, before)


def test_teachers_keep_refusals_and_weights_sum_to_one(tmp_path, monkeypatch):
    model = open_model(str(tiny_checkpoint(tmp_path / "m"))).load_model("cpu", torch.float32)
    monkeypatch.setattr("qrealign.calibrate.teachers.is_refusal", lambda _: True)
    samples = teach_refusals(model, encoder(), PROMPTS, answer_tokens=8, batch_size=3, progress=None)
    assert len(samples) == len(PROMPTS) and all(sample.label == Label.MALICIOUS for sample in samples)
    behaviour = teach_behaviour(model, encoder(), PROMPTS, answer_tokens=4, batch_size=3, progress=None)
    prompt = encoder().encode(PROMPTS[0].text)
    first = samples[0]
    assert first.input_ids.tolist()[: len(prompt)] == prompt and int(first.positions[0]) == len(prompt) - 1
    assert float(first.weights[0]) == pytest.approx(0.5)
    assert behaviour[0].positions.tolist() == list(range(len(behaviour[0].input_ids)))
    for sample in (*samples, *behaviour):
        assert float(sample.weights.sum()) == pytest.approx(1.0) and len(sample.hidden) == len(sample.positions) == len(
            sample.weights
        )
    alone = teach_behaviour(model, encoder(), PROMPTS[:1], answer_tokens=4, batch_size=1, progress=None)[0]
    assert torch.allclose(alone.hidden, behaviour[0].hidden, atol=1e-4)


def test_an_aligned_model_that_does_not_refuse_is_refused(tmp_path, monkeypatch):
    model = open_model(str(tiny_checkpoint(tmp_path / "m"))).load_model("cpu", torch.float32)
    monkeypatch.setattr("qrealign.calibrate.teachers.is_refusal", lambda _: False)
    with pytest.raises(DataError, match="refuses only 0 of 8"):
        teach_refusals(model, encoder(), PROMPTS, answer_tokens=8, batch_size=3, progress=None)


def test_teacher_cache_survives_the_disk(tmp_path):
    aligned = tiny_model("llama", vocab_size=TOKENIZER_VOCAB)
    cache = cache_of(aligned, aligned)
    cache.head_weight = torch.randn(4, 4)
    cache.save(tmp_path / "cache.safetensors")
    loaded = TeacherCache.load(tmp_path / "cache.safetensors")
    assert torch.equal(loaded.head_weight, cache.head_weight) and loaded.of_class(Label.BENIGN) == cache.of_class(
        Label.BENIGN
    )
    for ours, theirs in zip(cache.samples, loaded.samples, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.hidden, theirs.hidden)
