"""Probes: their fit, their file, the states they look at and the pictures drawn from them."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import joblib
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import qrealign.probes.fit as fitting
from qrealign.errors import CheckpointFormatError, DataError, ModelError
from qrealign.probes import (
    SafetyProbe,
    collect_last_states,
    distance_ratio,
    distance_ratios,
    fisher_ratio,
    fisher_ratios,
    fit_probes,
    probe_rates,
    projection_2d,
)

SPEC = SimpleNamespace(blocks="model.layers")


def _separable(blocks: int = 2, count: int = 100, width: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """States whose classes differ along one channel, on channels of very different loudness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    states = torch.randn(blocks, count, width, generator=generator)
    states[:, :, 3] += 3.0 * (2 * labels - 1)
    loudness = torch.logspace(-2, 3, width)
    return states * loudness + 5 * loudness, labels


class _Encoder:
    """Turns a text into one token per character; pads on either side."""

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [[3 + ord(letter) % 40 for letter in text] for text in texts]

    def pad(self, ids: list[list[int]], side: str = "right") -> SimpleNamespace:
        width = max(map(len, ids))
        rows, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.long)
        for row, tokens in enumerate(ids):
            place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
            rows[row, place], mask[row, place] = torch.tensor(tokens), 1
        last = mask.sum(dim=1) - 1 if side == "right" else torch.full((len(ids),), width - 1)
        return SimpleNamespace(input_ids=rows, attention_mask=mask, last_index=last)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def test_fit_finds_the_separating_channel_without_warnings() -> None:
    states, labels = _separable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe, accuracies = fit_probes(states, labels, seed=1)
    assert probe.weight.shape == (2, 24) and probe.weight.dtype == torch.float32
    assert min(accuracies) >= 0.9
    # On standardised features the informative channel wins although others are a thousand times louder.
    scaled = probe.weight * states.std(dim=1)
    assert scaled.abs().argmax(dim=1).tolist() == [3, 3]
    assert all(fit.nonzero < 24 and fit.fisher_ratio > 0 for fit in probe.fits)
    assert probe.fits[0].margins["malicious"][2] > 0 > probe.fits[0].margins["benign"][2]


def test_folding_the_standardisation_back_is_exact() -> None:
    from qrealign.probes.fit import _regress

    states, labels = _separable(blocks=1)
    features = states[0].double().numpy()
    weight, bias = _regress(features, labels.numpy(), 0.1, 0)
    mean, spread = features.mean(axis=0), features.std(axis=0)
    on_scaled = ((features - mean) / spread) @ (weight * spread) + (bias + weight @ mean)
    assert torch.allclose(torch.from_numpy(features @ weight + bias), torch.from_numpy(on_scaled), atol=1e-9)
    # Shifting and scaling the raw features must change the probe, never its verdicts.
    moved_weight, moved_bias = _regress(features * 7 - 100, labels.numpy(), 0.1, 0)
    assert torch.allclose(
        torch.from_numpy((features * 7 - 100) @ moved_weight + moved_bias), torch.from_numpy(on_scaled), atol=1e-6
    )


def test_constant_channels_get_no_weight() -> None:
    states, labels = _separable(blocks=1)
    states[:, :, 7] = 1234.5
    probe, _ = fit_probes(states, labels, seed=0)
    assert probe.weight[0, 7] == 0


def test_temperature_is_the_median_malicious_margin() -> None:
    states, labels = _separable()
    probe, _ = fit_probes(states, labels, seed=0)
    logits = probe.logit(states[1][labels == 1], 1)
    assert probe.temperature[1] == pytest.approx(float(logits.abs().median()), rel=1e-3)
    assert probe.scaled_logit(states[1][labels == 1], 1).abs().median() == pytest.approx(1.0, rel=1e-3)


def test_fit_is_deterministic_and_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    states, labels = _separable()
    first, _ = fit_probes(states, labels, seed=5)
    second, _ = fit_probes(states, labels.tolist(), seed=5, progress="probes")
    assert torch.equal(first.weight, second.weight)
    assert "probes" in capsys.readouterr().err


def test_wide_blocks_are_fitted_side_by_side_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    states, labels = _separable(blocks=3)
    alone, _ = fit_probes(states, labels, seed=0)
    monkeypatch.setattr(fitting, "_WIDE_NUMBERS", 1)
    monkeypatch.setattr(fitting, "_cores", lambda: 2)
    with joblib.parallel_config(backend="multiprocessing"):  # its forks start in no time
        together, _ = fit_probes(states, labels, seed=0)
    assert torch.equal(alone.weight, together.weight) and alone.fits == together.fits


def test_older_scikit_learn_is_asked_for_l1_by_name() -> None:
    from qrealign.probes.fit import _l1_argument

    class Old:
        def __init__(self, penalty: str = "l2") -> None: ...

    class Gone:
        def __init__(self, l1_ratio: float = 0.0) -> None: ...

    assert _l1_argument(Old) == {"penalty": "l1"}
    assert _l1_argument(Gone) == {"l1_ratio": 1.0}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param([0, 1] * 49 + [0, None], "1 of 100 prompts have no label", id="missing"),
        pytest.param([1] * 100, "all 100 prompts are of one class: the probe needs benign", id="one-class"),
        pytest.param([0] * 95 + [1] * 5, "only 5 malicious prompts", id="few"),
        pytest.param([0, 2] * 50, "found 2", id="strange"),
        pytest.param([0, 1], "2 labels for 100 prompts", id="count"),
    ],
)
def test_bad_labels_are_named(labels: list[int | None], message: str) -> None:
    states, _ = _separable()
    with pytest.raises(DataError, match=message):
        fit_probes(states, labels, seed=0)


def test_states_that_are_not_finite_are_refused() -> None:
    states, labels = _separable()
    states[0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        fit_probes(states, labels, seed=0)


def test_file_round_trip(tmp_path) -> None:
    states, labels = _separable()
    probe, _ = fit_probes(states, labels, seed=0)
    file = probe.save(tmp_path / "probes", {"model": "ab", "data": "cd"})
    assert file.name == "probes.safetensors"
    for path in (file, file.with_suffix(".json"), file.parent):
        loaded = SafetyProbe.load(path)
        assert (
            torch.equal(loaded.weight, probe.weight)
            and torch.equal(loaded.bias, probe.bias)
            and torch.equal(loaded.temperature, probe.temperature)
        )
        assert loaded.fits == probe.fits and loaded.hashes == {"model": "ab", "data": "cd"}
    details = json.loads(file.with_suffix(".json").read_text())
    assert set(details["blocks"][0]) == {"accuracy", "fisher_ratio", "inverse_penalty", "nonzero", "margins"}


def test_bad_probe_files_are_named(tmp_path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ModelError, match="there is no probe at"):
        SafetyProbe.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointFormatError, match="no readable safetensors"):
        SafetyProbe.load(tmp_path / "cut.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointFormatError, match="is no probe: it holds"):
        SafetyProbe.load(tmp_path / "other.safetensors")
    save_file(
        {"weight": torch.zeros(2, 4), "bias": torch.zeros(3), "temperature": torch.ones(2)},
        tmp_path / "shapes.safetensors",
    )
    with pytest.raises(CheckpointFormatError, match="its shapes"):
        SafetyProbe.load(tmp_path / "shapes.safetensors")
    save_file(
        {"weight": torch.full((2, 4), torch.nan), "bias": torch.zeros(2), "temperature": torch.ones(2)},
        tmp_path / "nan.safetensors",
    )
    with pytest.raises(CheckpointFormatError, match="not finite"):
        SafetyProbe.load(tmp_path / "nan.safetensors")


def test_bad_probe_descriptions_are_named(tmp_path) -> None:
    probe = SafetyProbe(weight=torch.zeros(2, 4), bias=torch.zeros(2), temperature=torch.ones(2))
    file = probe.save(tmp_path / "p.safetensors")
    description = file.with_suffix(".json")
    good = json.loads(description.read_text())
    for text, message in (
        ("{", "no readable JSON"),
        ("[]", "does not describe a probe"),
        (json.dumps({**good, "num_blocks": 9}), "different probes"),
        (json.dumps({**good, "blocks": [{"x": 1}]}), "unknown way"),
        (json.dumps({**good, "hashes": ["model"]}), "unknown way"),
    ):
        description.write_text(text)
        with pytest.raises(CheckpointFormatError, match=message):
            SafetyProbe.load(file)
    description.unlink()
    with pytest.raises(ModelError, match=r"description .* is missing"):
        SafetyProbe.load(file)


def test_probe_of_another_shape_is_refused() -> None:
    probe = SafetyProbe(weight=torch.zeros(2, 4), bias=torch.zeros(2), temperature=torch.ones(2))
    probe.check_model(2, 4)
    with pytest.raises(ModelError, match="2 blocks and hidden size 4, but this model has 3 blocks and hidden size 4"):
        probe.check_model(3, 4)


def test_logit_keeps_gradients_and_takes_any_dtype() -> None:
    probe = SafetyProbe(weight=torch.ones(1, 4), bias=torch.full((1,), 0.5), temperature=torch.ones(1)).to("cpu")
    hidden = torch.ones(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    logit = probe.logit(hidden, 0)
    assert logit.dtype == torch.float32 and logit.shape == (2, 3) and float(logit[0, 0].detach()) == 4.5
    logit.sum().backward()
    assert hidden.grad is not None and bool((hidden.grad == 1).all())


@pytest.mark.parametrize("side", ["right", "left"])
def test_states_are_the_block_outputs_at_the_last_prompt_token(llama: LlamaForCausalLM, side: str) -> None:
    prompts = ["a longer prompt of many letters", "short", "a middle one here"]
    states = collect_last_states(llama, _Encoder(), prompts, SPEC, batch_size=2, padding_side=side)
    assert states.shape == (3, 3, 32) and states.dtype == torch.float32
    for row, ids in enumerate(_Encoder().encode_many(prompts)):
        with torch.no_grad():
            hidden = llama.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        for block in range(2):  # the last entry of hidden_states is after the final norm, which the probe must not see
            assert torch.allclose(states[block, row], hidden[block + 1][0, -1], atol=1e-5)
        normed = llama.model.norm(states[2, row])
        assert torch.allclose(normed, hidden[3][0, -1], atol=1e-5)


def test_states_of_an_architecture_with_learned_positions() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    model, spec = OPTForCausalLM(config).eval(), SimpleNamespace(blocks="model.decoder.layers")
    right, left = (
        collect_last_states(model, _Encoder(), ["abcdefg", "xy"], spec, padding_side=side) for side in ("right", "left")
    )
    assert torch.allclose(right, left, atol=1e-5)


def test_hooks_are_removed_and_progress_is_shown(llama: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    before = [len(block._forward_hooks) for block in llama.model.layers]
    collect_last_states(llama, _Encoder(), ["abc"], SPEC, progress="states")
    assert "states" in capsys.readouterr().err
    assert [len(block._forward_hooks) for block in llama.model.layers] == before


def test_no_prompts_is_an_error(llama: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="no prompts"):
        collect_last_states(llama, _Encoder(), [], SPEC)


def test_fisher_ratio_equals_its_formula() -> None:
    states = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert fisher_ratio(states, labels) == pytest.approx(16.0 / 1.0)
    assert fisher_ratios(torch.stack([states, states * 3]), labels) == pytest.approx([16.0, 16.0])
    with pytest.raises(DataError, match="one class"):
        fisher_ratio(states, torch.ones(4))


def test_distance_ratio_equals_its_formula_and_weighs_classes_alike() -> None:
    # Class means (1, 0) and (1, 4); distances to them 1 and 2, however many rows have them.
    benign = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    malicious = torch.tensor([[-1.0, 4.0], [3.0, 4.0], [-1.0, 4.0], [3.0, 4.0]])
    states, labels = torch.cat([benign, malicious]), torch.tensor([0, 0, 1, 1, 1, 1])
    assert distance_ratio(states, labels) == pytest.approx(4.0 / 1.5)
    assert distance_ratios(torch.stack([states, states * 3]), labels) == pytest.approx([4.0 / 1.5] * 2)
    with pytest.raises(DataError, match="one class"):
        distance_ratio(states, torch.ones(6))


def test_probe_rates_count_right_and_wrong() -> None:
    probe = SafetyProbe(weight=torch.ones(1, 1), bias=torch.zeros(1), temperature=torch.ones(1))
    states = torch.tensor([[[1.0], [-1.0], [-1.0], [-1.0]]])
    rates = probe_rates(probe, states, torch.tensor([1, 1, 0, 0]))[0]
    assert (rates.recall, rates.specificity, rates.accuracy) == (0.5, 1.0, 0.75)
    with pytest.raises(DataError, match="one class"):
        probe_rates(probe, states, torch.zeros(4))


def test_projection_uses_the_probe_and_the_variance_left() -> None:
    states, labels = _separable(blocks=1, width=6)
    probe, _ = fit_probes(states, labels, seed=0)
    plane = projection_2d(states[0], labels, probe, 0)
    points = plane(states[0])
    assert points.shape == (100, 2) and points.dtype == torch.float32
    assert torch.allclose(points[:, 0], probe.logit(states[0], 0), atol=1e-3)
    assert abs(float(plane.first @ plane.second)) < 1e-6 * float(plane.first.norm())
    # The loudest channel is the variance left, and the same plane serves another model.
    assert int(plane.second.abs().argmax()) == 5
    assert torch.equal(plane(states[0][:3]), points[:3])


@pytest.mark.parametrize("with_empty_probe", [False, True])
def test_projection_without_a_probe_uses_the_class_means(with_empty_probe: bool) -> None:
    states, labels = _separable(blocks=1, width=6)
    probe = (
        SafetyProbe(weight=torch.zeros(1, 6), bias=torch.zeros(1), temperature=torch.ones(1))
        if with_empty_probe
        else None
    )
    points = projection_2d(states[0], labels, probe, 0)(states[0])
    assert float(points[labels == 1, 0].mean()) > 0 > float(points[labels == 0, 0].mean())
    assert float(points[labels == 1, 0].mean()) == pytest.approx(-float(points[labels == 0, 0].mean()), rel=1e-3)
