"""The block-wise engine on tiny models: every target, batches, resume, divergence."""

from dataclasses import replace

import pytest
import torch

from qrealign.calibrate.blockwise import BlockwiseCalibrator, Target
from qrealign.calibrate.methods import method_settings
from qrealign.calibrate.streams import Inputs, Streams
from qrealign.config import parse_scheme
from qrealign.data.capture import capture_block_inputs, run_block
from qrealign.errors import CalibrationDivergedError
from qrealign.models.source import open_model
from qrealign.probes.probe import SafetyProbe
from qrealign.quant.fake_quant import quantized_linears
from tests.helpers import random_batch, tiny_checkpoint

CPU = torch.device("cpu")
FAST = {"epochs": 1.0, "batch_size": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        seed: tiny_checkpoint(root / f"m{seed}", "llama", seed=seed, dtype=torch.bfloat16, num_hidden_layers=3)
        for seed in (0, 1)
    }


def calibrator(folders, tmp_path, settings, scheme="w8a8", name="streams", samples=8):
    source, aligned = open_model(str(folders[0])), open_model(str(folders[1]))
    model = source.skeleton(dtype=torch.float32)
    source.load_outer(model, CPU, torch.float32)
    ids, mask = random_batch(160, batch=samples, length=20, padding="right")
    hidden, kwargs = capture_block_inputs(model, ids, mask)
    malicious = torch.arange(samples) % 4 != 0
    inputs = Inputs(mask=mask, last_index=mask.sum(dim=1) - 1, malicious=malicious, kwargs=kwargs)
    streams = Streams(student=hidden, finetuned=hidden.clone())
    pair = None
    if settings.uses_aligned:
        other = aligned.skeleton(dtype=torch.float32)
        aligned.load_outer(other, CPU, torch.float32)
        streams.aligned, pair = capture_block_inputs(other, ids, mask)[0], (aligned, other)
    probe = None
    if settings.uses_probe:
        probe = SafetyProbe(
            weight=torch.randn(3, 64, generator=torch.Generator().manual_seed(5)),
            bias=torch.zeros(3),
            temperature=torch.ones(3),
        )
    blocks = {}
    runner = BlockwiseCalibrator(
        source=source,
        model=model,
        scheme=parse_scheme(scheme),
        settings=settings,
        inputs=inputs,
        streams=streams,
        state_path=tmp_path / f"{name}.safetensors",
        on_block=lambda index, block: blocks.setdefault(
            index, {key: (layer.codes.clone(), layer.scale.clone()) for key, layer in quantized_linears(block).items()}
        ),
        device=CPU,
        dtype=torch.float32,
        aligned=pair,
        probe=probe,
    )
    return runner, blocks


@pytest.mark.parametrize(
    ("method", "scheme", "options"),
    [
        ("reconstruction", "w8a8", {}),
        ("paper", "w8a8", {}),
        ("paper", "w4a4_g32", {}),
        ("realign", "w8a8", {"engine": "blockwise"}),
        ("realign", "w4a16_g32", {"engine": "blockwise", "edit": "none"}),
    ],
)
def test_every_target_learns(folders, tmp_path, method, scheme, options):
    settings = method_settings(method, **options, **FAST | {"epochs": 12.0})
    if method == "paper":  # its rates need thousands of steps
        settings = replace(settings, clip_learning_rate=0.2, transform_learning_rate=0.05)
    runner, blocks = calibrator(folders, tmp_path, settings, scheme)
    curve = runner.run(progress=None)
    assert sorted(blocks) == [0, 1, 2] and set(runner.seconds) == {0, 1, 2}
    assert all(len(layers) == 7 for layers in blocks.values())
    name = "benign" if method == "reconstruction" else "malicious"
    points = [point.losses[name] for point in curve if point.block == 2 and name in point.losses]
    assert sum(points[-6:]) < sum(points[:6])


def test_student_stream_is_the_chain_of_frozen_blocks(folders, tmp_path):
    runner, _ = calibrator(folders, tmp_path, method_settings("realign", engine="blockwise", **FAST))
    start, kept = runner.streams.student.clone(), []
    runner.on_block = lambda index, block: kept.append(__import__("copy").deepcopy(block))
    runner.run(progress=None)
    hidden = start
    rows = torch.arange(len(start))
    for index, block in enumerate(kept):
        hidden = run_block(block, hidden, runner.inputs.kwargs_of(index, rows))
    real = runner.inputs.mask.bool()
    assert torch.allclose(hidden[real], runner.streams.student[real], atol=1e-5)


def test_batch_of_eight_has_the_gradient_of_eight_batches_of_one(folders, tmp_path):
    settings = method_settings("paper", **FAST)
    runner, _ = calibrator(folders, tmp_path, settings)
    torch.manual_seed(0)
    output = torch.randn(8, 20, 64, requires_grad=True)
    target = Target(benign=torch.randn(8, 20, 64), aligned=None, probe=runner.probe)
    rows = torch.arange(8)
    runner.sample_losses(1, output, target, rows).mean().backward()
    together, output.grad = output.grad.clone(), None
    for row in rows.split(1):
        (runner.sample_losses(1, output[row], target, row).mean() / 8).backward()
    assert torch.allclose(output.grad, together, rtol=1e-5, atol=1e-8)


def test_a_resumed_run_gives_the_same_codes(folders, tmp_path):
    settings = method_settings("paper", **FAST)
    whole, expected = calibrator(folders, tmp_path, settings, name="whole")
    whole.run(progress=None)
    broken, first = calibrator(folders, tmp_path, settings, name="broken")
    keep = broken.on_block

    def kill(index, block):
        keep(index, block)
        if index == 1:
            raise KeyboardInterrupt

    broken.on_block = kill
    with pytest.raises(KeyboardInterrupt):
        broken.run(progress=None)
    resumed, rest = calibrator(folders, tmp_path, settings, name="broken")
    resumed.run(progress=None)
    assert sorted(rest) == [1, 2]  # block 0 was saved
    for index, layers in ({0: first[0]} | rest).items():
        for name, (codes, scale) in layers.items():
            assert torch.equal(codes, expected[index][name][0]) and torch.equal(scale, expected[index][name][1])
    assert [point.losses for point in resumed.curve] == [point.losses for point in whole.curve]


def test_divergence_names_block_and_step(folders, tmp_path, monkeypatch):
    runner, _ = calibrator(folders, tmp_path, method_settings("reconstruction", **FAST))
    original = runner.sample_losses
    monkeypatch.setattr(
        runner, "sample_losses", lambda index, *rest: original(index, *rest) * (float("nan") if index == 1 else 1.0)
    )
    with pytest.raises(CalibrationDivergedError, match="block 1, step 0"):
        runner.run(progress=None)


def test_padding_does_not_change_what_is_learned(folders, tmp_path):
    """Garbage in the padded positions of every stream leaves the codes as they are."""
    settings = replace(method_settings("reconstruction", **FAST), transform_learning_rate=0.0)
    clean, expected = calibrator(folders, tmp_path, settings, name="clean")
    clean.run(progress=None)
    dirty, found = calibrator(folders, tmp_path, settings, name="dirty")
    padded = ~dirty.inputs.mask.bool()
    dirty.streams.student[padded] = 3.0
    dirty.streams.finetuned[padded] = -2.0
    dirty.run(progress=None)
    for name, (codes, _) in found[0].items():
        assert torch.equal(codes, expected[0][name][0])
