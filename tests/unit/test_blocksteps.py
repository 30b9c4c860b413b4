"""A block's steps: what a look at the losses leads to, and that a recorded step is the step that was recorded."""

import gc
import weakref

import pytest
import torch

from qrealign.arch import block_spec
from qrealign.calibrate import blocksteps
from qrealign.calibrate.blocksteps import BlockSteps
from qrealign.calibrate.handover import HandOver
from qrealign.calibrate.methods import method_settings
from qrealign.calibrate.parameters import BlockContext, Trainable
from qrealign.calibrate.schedule import Plateau
from qrealign.calibrate.streams import Inputs, Streams, advance, stream_place
from qrealign.config import parse_scheme
from qrealign.data.capture import run_block
from qrealign.errors import CalibrationDivergedError
from qrealign.quant.fake_quant import swap_linears
from tests.helpers import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SAMPLES, LENGTH, WIDTH = 8, 12, 64


def block_and_inputs(device):
    """Return a block with fake-quantized linears, its parameters, and inputs `[8, 12, 64]` with arguments."""
    model = tiny_model("llama", seed=3).to(device)
    block = model.model.layers[0]
    swap_linears(block, parse_scheme("w8a8"), scale_dtype=torch.bfloat16)
    amax = {name: torch.ones(layer.in_features) for name, layer in block.named_modules() if hasattr(layer, "scheme")}
    settings = method_settings("paper", batch_size=2)
    context = BlockContext(
        block=block, index=0, spec=block_spec(model.config, model), settings=settings, activation_amax=amax
    )
    hidden = torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    rotary = model.model.rotary_emb(hidden, torch.arange(LENGTH, device=device)[None])
    return block, Trainable([context]), hidden, {"position_embeddings": rotary}


def steps_of(device, *, spoil=None, steps=8, **options):
    """Return the steps of a block that learns to give its inputs back, and its parameters."""
    block, trainable, hidden, kwargs = block_and_inputs(device)
    taken = []

    def losses_of(rows):
        taken.append(len(taken))
        losses = (run_block(block, hidden[rows], kwargs) - hidden[rows]).square().mean(dim=(1, 2))
        return losses if spoil is None else losses * spoil(len(taken) - 1)

    order = torch.arange(2 * steps).reshape(steps, 2) % SAMPLES
    malicious = torch.arange(SAMPLES) % 2 == 0
    return (
        BlockSteps(
            index=0, trainable=trainable, losses_of=losses_of, order=order, malicious=malicious, device=device,
            epoch=4, **options,
        ),
        trainable,
    )  # fmt: skip


def test_curve_has_every_class_and_the_loss_falls():
    runner, _ = steps_of(CPU, steps=40)
    heard = []
    curve = runner.run(lambda done, loss: heard.append((done, loss)))
    assert [done for done, _ in heard] == list(range(1, 41)) and len(curve) == 40
    assert all(point.losses.keys() == {"total", "malicious", "benign"} for point in curve)
    assert curve[-1].losses["total"] == heard[-1][1] < curve[0].losses["total"]


def test_a_broken_step_takes_the_epoch_back_at_half_the_rate():
    runner, trainable = steps_of(CPU, spoil=lambda call: float("nan") if call == 6 else 1.0)
    done = []
    curve = runner.run(lambda step, _: done.append(step))
    assert done == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]  # the seventh call was step 6, the epoch began at step 4
    assert trainable.rate_factor == 0.5 and len(curve) == 8
    assert all(torch.isfinite(value).all() for value in trainable.named.values())


def test_steps_that_stay_broken_end_the_run():
    runner, _ = steps_of(CPU, spoil=lambda call: float("inf") if call >= 5 else 1.0)
    with pytest.raises(CalibrationDivergedError, match="block 0, step"):
        runner.run(lambda *_: None)


def test_a_finished_block_leaves_nothing_to_the_garbage_collector(monkeypatch):
    recordings = []

    class Watched(blocksteps.Recorded):
        def __init__(self, *args):
            super().__init__(*args)
            recordings.append(weakref.ref(self))

    monkeypatch.setattr(blocksteps, "Recorded", Watched)
    runner, trainable = steps_of(CPU)
    gc.disable()
    try:
        runner.run(lambda *_: None)
        assert [recording() for recording in recordings] == [None]
        parameters = weakref.ref(trainable)
        del runner, trainable
        assert parameters() is None
    finally:
        gc.enable()


def test_a_plateau_ends_a_block():
    runner, _ = steps_of(CPU, steps=40, plateau=0.9)  # nobody gets ten times better in an epoch
    done = []
    assert len(runner.run(lambda step, _: done.append(step))) == 8 == done[-1]


def test_plateau_compares_with_the_lowest_loss():
    plateau = Plateau(0.1)
    assert [plateau.reached(loss) for loss in (10.0, 8.0, 7.0, 6.9)] == [False, False, False, True]
    assert not any(Plateau(0.0).reached(1.0) for _ in range(3))
    falling = Plateau(0.1)  # a loss below zero, such as one that pushes
    assert [falling.reached(loss) for loss in (-1.0, -2.0, -2.1)] == [False, False, True]


def test_handing_over_raises_what_the_work_raised():
    done = []
    with HandOver(CPU) as hand_over:
        hand_over.submit(lambda: done.append(1))
        with pytest.raises(ZeroDivisionError):
            hand_over.submit(lambda: 1 / 0)
    assert done == [1]


@pytest.mark.gpu
def test_a_recorded_step_is_the_step_itself(monkeypatch):
    recorded, learned = steps_of(GPU)
    curve = recorded.run(lambda *_: None)
    monkeypatch.setattr(blocksteps.Recorded, "record", lambda self: None)
    called, expected = steps_of(GPU)
    assert [point.losses for point in called.run(lambda *_: None)] == [point.losses for point in curve]
    for name, tensor in expected.state().items():
        assert torch.equal(learned.state()[name], tensor), name


@pytest.mark.gpu
def test_a_recorded_divergence_is_taken_back():
    late = torch.zeros((), device=GPU)
    runner, trainable = steps_of(GPU, spoil=lambda _: torch.where((late > 0) & (rate > full), float("nan"), 1.0))
    rate = trainable.optimizer.param_groups[0]["lr"]
    full = 0.75 * rate.clone()
    heard = []

    def after(step, _):
        heard.append(step)
        late.fill_(1.0)

    curve = runner.run(after)
    assert heard == [4, 8] and trainable.rate_factor == 0.5 and len(curve) == 8
    assert all(torch.isfinite(value).all() for value in trainable.named.values())


@pytest.mark.gpu
def test_work_is_handed_over_beside_the_main_stream():
    results = []
    with HandOver(GPU) as hand_over:
        for value in range(3):
            tensor = torch.full((1000,), float(value), device=GPU)
            hand_over.submit(lambda tensor=tensor: results.append(float(tensor.cpu().mean())))
    assert results == [0.0, 1.0, 2.0]


@pytest.mark.gpu
def test_streams_in_host_memory_are_read_and_written_by_the_gpu():
    block, _, hidden, kwargs = block_and_inputs(GPU)
    inputs = Inputs(
        mask=torch.ones(SAMPLES, LENGTH, device=GPU),
        last_index=torch.full((SAMPLES,), LENGTH - 1, device=GPU),
        malicious=torch.zeros(SAMPLES, dtype=torch.bool, device=GPU),
        kwargs=[kwargs],
    )
    rows = torch.tensor([0, 2, 5], device=GPU)
    results = []
    for low_memory in (False, True):
        place = stream_place(GPU, torch.float32, low_memory=low_memory)
        gc.collect()
        before = torch.cuda.memory_allocated()
        stream = place(hidden.cpu())
        assert (torch.cuda.memory_allocated() > before) != low_memory
        results.append(advance(block, 0, stream, inputs, rows=rows, batch_size=2, place=place))
        assert stream.device.type == "cuda" and torch.equal(stream, hidden)
    assert torch.equal(*results) and torch.equal(results[0][1], hidden[1]) and not torch.equal(results[0][2], hidden[2])
    assert Streams(student=results[1], finetuned=results[1]).tensors()["student"].cpu().equal(results[0].cpu())
