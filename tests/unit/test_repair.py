"""Repairs: each formula at its ends, against its definition, and as a model that any reader of tensors sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qrealign.errors import ResumeError
from qrealign.models.source import open_model
from qrealign.repair.gather import repair_blocks
from qrealign.repair.interpolate import InterpolationChange, interpolate
from qrealign.repair.safedelta import SecondMoment, accepted_entries, inverse_factor, safe_delta
from qrealign.repair.safelora import SafeLoraChange, choose_projected, projected_update, update_cosines
from qrealign.repair.settings import SafeDelta
from qrealign.repair.stored import StoredChange, block_file, store_block
from tests.helpers import random_batch, tiny_checkpoint, tiny_model

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Base, aligned and fine-tuned tiny models of one shape."""
    root = tmp_path_factory.mktemp("repair")
    return [open_model(str(tiny_checkpoint(root / str(seed), seed=seed, tokenizer=False))) for seed in range(3)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_interpolation_has_both_models_at_its_ends():
    aligned, finetuned = random(4, 6), random(4, 6, seed=1)
    assert torch.equal(interpolate(aligned, finetuned, 0.0), aligned)
    assert torch.allclose(interpolate(aligned, finetuned, 1.0), finetuned, atol=1e-6)
    middle = interpolate(aligned.bfloat16(), finetuned.bfloat16(), 0.5)
    assert middle.dtype == torch.bfloat16 and torch.allclose(middle.float(), (aligned + finetuned) / 2, atol=2e-2)


def test_interpolated_model_is_read_like_any_other(sources):
    _, aligned, finetuned = sources
    repaired = finetuned.changed_by(InterpolationChange(aligned, 0.25))
    for read in (lambda source: source.block_state(1), lambda source: source.outer_state()):
        ours, start, end = read(repaired), read(aligned), read(finetuned)
        assert ours.keys() == start.keys()
        assert all(torch.allclose(ours[name], start[name] + 0.25 * (end[name] - start[name])) for name in ours)
    assert len({repaired.fingerprint(), finetuned.fingerprint(), aligned.fingerprint()}) == 3
    other = finetuned.changed_by(InterpolationChange(aligned, 0.5))
    assert other.fingerprint() != repaired.fingerprint() and not finetuned.changes


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_head_of_its_own_is_interpolated_with_the_tied_one(sources, tmp_path, stored):
    folder = tiny_checkpoint(tmp_path, seed=1, tokenizer=False, tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    shared = state.pop("model.embed_tokens.weight")
    save_file(state | {stored: shared}, folder / "model.safetensors", {"format": "pt"})
    repaired = sources[2].changed_by(InterpolationChange(open_model(str(folder)), 0.0))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(repaired.read_tensor(name), shared)


def test_projection_keeps_an_update_along_alignment_and_drops_one_across_it():
    direction = torch.outer(random(8), random(5, seed=1))
    aligned = random(8, 5, seed=2)
    left = direction[:, 0]
    along = torch.outer(left, random(5, seed=3))
    across = torch.linalg.qr(torch.stack([left, random(8, seed=4)], dim=1)).Q[:, 1:] @ random(1, 5, seed=5)
    projected, cosine = projected_update(aligned - direction, aligned, aligned + along)
    expected = direction @ direction.T @ along / direction.norm()
    assert torch.allclose(projected, expected, atol=1e-4) and cosine == pytest.approx(1.0, abs=1e-5)
    projected, cosine = projected_update(aligned - direction, aligned, aligned + across)
    assert float(projected.norm()) < 1e-4
    assert projected_update(aligned, aligned, aligned + along)[1] == 1.0
    assert projected_update(aligned - direction, aligned, aligned)[1] == 1.0


def test_projected_linears_are_chosen_by_threshold_or_by_number():
    cosines = {"a": 0.9, "b": 0.1, "c": 0.4}
    assert choose_projected(cosines, threshold=0.5, lowest=0) == ["b", "c"]
    assert choose_projected(cosines, threshold=0.5, lowest=1) == ["b"]
    assert choose_projected(cosines, threshold=0.05, lowest=0) == []


def test_safelora_changes_the_chosen_linears_alone(sources):
    base, aligned, finetuned = sources
    cosines = update_cosines(base, aligned, finetuned)
    assert cosines.keys() == finetuned.linear_shapes().keys() and all(-1 <= value <= 1 for value in cosines.values())
    repaired = finetuned.changed_by(SafeLoraChange(base, aligned, [DOWN]))
    name = f"{DOWN}.weight"
    update, cosine = projected_update(*(source.read_tensor(name) for source in sources))
    assert cosine == pytest.approx(cosines[DOWN])
    assert torch.allclose(repaired.read_tensor(name), aligned.read_tensor(name) + update, atol=1e-6)
    changed = [
        name
        for name in finetuned.stored_names
        if not torch.equal(repaired.read_tensor(name), finetuned.read_tensor(name))
    ]
    assert changed == [name]


def second_moment(inputs):
    moment = SecondMoment()
    for part in inputs.split(50):
        moment.add(part)
    return moment.result()


def test_second_moment_is_the_mean_over_all_inputs():
    inputs = random(130, 6)
    assert torch.allclose(second_moment(inputs), 2 * inputs.T @ inputs / 130, atol=1e-5)
    with pytest.raises(ValueError, match="no inputs"):
        SecondMoment().result()


def test_inverse_factor_inverts_the_damped_moment():
    moment = second_moment(random(40, 6))
    moment[2], moment[:, 2] = 0, 0  # a dead channel
    factor = inverse_factor(moment, 0.01)
    damped = moment.clone()
    damped[2, 2] = 1.0
    damped += 0.01 * damped.diagonal().mean() * torch.eye(6)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(6), atol=1e-4)
    assert torch.equal(factor, factor.triu())


def test_entries_are_accepted_from_the_least_sensitive_column_on():
    weight, target = torch.zeros(4096, 4), torch.ones(4096, 4)
    diagonal = torch.tensor([1.0, 4.0, 2.0, 0.5])  # columns by sensitivity: 1, 2, 0, 3
    everything = accepted_entries(weight, target, diagonal, budget=1e9, skipped=0.25)
    assert everything.sum(dim=0).tolist() == [4096, 4096, 4096, 0]  # the most sensitive quarter never
    sensitivity = 1 / diagonal.square()
    budget = 2 * 4096 * float(sensitivity[1] + sensitivity[2]) / float(sensitivity.mean()) + 1e-3
    some = accepted_entries(weight, target, diagonal, budget=budget, skipped=0.0)
    assert some.sum(dim=0).tolist() == [0, 4096, 4096, 0]
    assert not accepted_entries(weight, target, diagonal, budget=0.0, skipped=0.0).any()


@pytest.mark.parametrize("columns", [1024, 5], ids=["one block", "blocks of five"])
def test_safe_delta_accepts_within_its_budget_and_compensates(columns):
    aligned, finetuned = random(16, 12), random(16, 12) + 0.3 * random(16, 12, seed=1)
    inputs = random(400, 12, seed=2) @ random(12, 12, seed=3)
    moment = second_moment(inputs)
    settings = SafeDelta(columns=columns, skipped=0.0, damping=1e-4)
    nothing = safe_delta(aligned, finetuned, moment, replace(settings, budget=0.0))
    everything = safe_delta(aligned, finetuned, moment, replace(settings, budget=1e9))
    assert torch.equal(nothing, aligned) and torch.allclose(everything, finetuned, atol=1e-5)
    some = safe_delta(aligned, finetuned, moment, replace(settings, budget=300.0))
    taken = some == finetuned
    assert 0.1 < taken.float().mean() < 0.9
    plain = torch.where(taken, finetuned, aligned)
    harm, harm_without = (((weight - aligned) @ inputs.T).norm() for weight in (some, plain))
    assert harm < 0.8 * harm_without


def test_safe_delta_over_a_model_uses_the_aligned_models_activations(sources, tmp_path):
    from qrealign.data.encode import Batch, last_real_index

    _, aligned, finetuned = sources
    ids, mask = random_batch(batch=5, padding="right")
    batch = Batch(input_ids=ids, attention_mask=mask, last_index=last_real_index(mask))
    settings = SafeDelta(budget=20.0)
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "progress": None}
    repair_blocks(aligned, finetuned, batch, settings, tmp_path / "a", **options)
    change = StoredChange(tmp_path / "a", 2)
    repaired = finetuned.changed_by(change)
    moment = SecondMoment()
    model = tiny_model("llama", seed=1, vocab_size=aligned.config.vocab_size)
    hook = model.get_submodule(DOWN).register_forward_pre_hook(lambda _, args: moment.add(args[0][mask.bool()]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    hook.remove()
    name = f"{DOWN}.weight"
    expected = safe_delta(aligned.read_tensor(name), finetuned.read_tensor(name), moment.result(), settings)
    assert torch.allclose(repaired.read_tensor(name), expected, atol=1e-4)
    assert torch.equal(repaired.read_tensor("model.norm.weight"), finetuned.read_tensor("model.norm.weight"))
    # A block that is whole is kept, and the blocks behind it come out the same.
    store_block(tmp_path / "b", 0, {"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64)})
    repair_blocks(aligned, finetuned, batch, settings, tmp_path / "b", **options)
    resumed = finetuned.changed_by(StoredChange(tmp_path / "b", 2))
    assert not resumed.read_tensor("model.layers.0.mlp.up_proj.weight").any()
    assert torch.equal(resumed.read_tensor(name), repaired.read_tensor(name))


def test_an_expert_that_no_safety_prompt_reaches_stays_fine_tuned(tmp_path):
    from qrealign.data.encode import Batch, last_real_index

    aligned, finetuned = (
        open_model(str(tiny_checkpoint(tmp_path / str(seed), "mixtral", seed=seed, tokenizer=False))) for seed in (1, 2)
    )
    ids, mask = torch.tensor([[5]]), torch.tensor([[1]])
    batch = Batch(input_ids=ids, attention_mask=mask, last_index=last_real_index(mask))
    repair_blocks(
        aligned, finetuned, batch, SafeDelta(budget=0.0), tmp_path / "r", device=torch.device("cpu"),
        dtype=torch.float32, progress=None,
    )  # fmt: skip
    repaired = finetuned.changed_by(StoredChange(tmp_path / "r", 2))
    names = [f"{name}.weight" for name in finetuned.linear_shapes() if ".experts." in name]
    tuned = [torch.equal(repaired.read_tensor(name), finetuned.read_tensor(name)) for name in names]
    kept = [torch.equal(repaired.read_tensor(name), aligned.read_tensor(name)) for name in names]
    assert sum(tuned) == sum(kept) == len(names) // 2  # one token reaches two of four experts in each block


def test_stored_edits_are_added_and_a_missing_file_is_told(sources, tmp_path):
    finetuned = sources[2]
    left, right = random(64, 2), random(2, 96, seed=1)
    store_block(tmp_path, 0, {"other": left})
    with pytest.raises(ResumeError, match="block-00001"):
        StoredChange(tmp_path, 2)
    store_block(tmp_path, 1, {f"{DOWN}.left": left, f"{DOWN}.right": right})
    change = StoredChange(tmp_path, 2)
    repaired = finetuned.changed_by(change)
    name = f"{DOWN}.weight"
    assert torch.allclose(repaired.read_tensor(name), finetuned.read_tensor(name) + left @ right, atol=1e-6)
    assert torch.equal(repaired.read_tensor("model.norm.weight"), finetuned.read_tensor("model.norm.weight"))
    before = change.fingerprint()
    block_file(tmp_path, 1).unlink()
    store_block(tmp_path, 1, {f"{DOWN}.left": 2 * left, f"{DOWN}.right": right})
    assert StoredChange(tmp_path, 2).fingerprint() != before
