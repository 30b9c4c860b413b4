"""What the end-to-end engine does on a GPU alone: recorded passes, coded products, streams beside the computation."""

from __future__ import annotations

import pytest
import torch

from qrealign.calibrate.handover import HandOver
from qrealign.calibrate.methods import method_settings
from qrealign.calibrate.objectives import BehaviourObjective
from qrealign.calibrate.recorded import RecordedPass
from qrealign.models.source import open_model
from qrealign.models.streaming import stream_blocks
from qrealign.models.transfer import open_stream
from qrealign.pipeline.models import ModelPool
from qrealign.pipeline.student import Student
from qrealign.quant.fake_quant import fake_quant_linears
from tests.helpers import TOKENIZER_VOCAB, random_batch, tiny_adapter, tiny_checkpoint, tiny_model
from tests.unit.test_endtoend import cache_of
from tests.unit.test_memory import context_of

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
SETTINGS = method_settings("realign", steps=4, batch_size=6, edit_rank=2, sequence_length=32)
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=4, dtype=torch.bfloat16, **WIDE)
    return open_model(str(folder), adapter=str(tiny_adapter(tmp_path_factory.mktemp("lora"), folder)))


def learning_student(source, memory):
    it = Student(context_of(source, ModelPool(GPU, memory), SETTINGS), SETTINGS)
    generator = torch.Generator().manual_seed(3)
    for name, value in it.trainable.named.items():
        if name.endswith("left"):
            value.data.copy_(0.02 * torch.randn(value.shape, generator=generator))
    return it


def objective():
    models = [tiny_model("llama", seed=seed, vocab_size=TOKENIZER_VOCAB, **WIDE) for seed in (2, 1)]
    return BehaviourObjective(cache_of(*models), SETTINGS, pad_id=0, device=GPU)


def gradients_of(it, losses):
    sum(losses.values()).backward()
    return {name: value.grad.clone() for name, value in it.trainable.named.items()}


def test_blocks_loaded_on_a_gpu_are_those_of_the_files(adapted):
    found, expected = adapted.load_model(GPU, torch.bfloat16), adapted.load_model("cpu", torch.bfloat16)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), expected.state_dict()[name], rtol=8e-3, atol=1e-4, msg=name)


def held_bytes(model):
    """Return the bytes of the memory that a model's tensors lie in, each piece once."""
    pieces = (tensor.untyped_storage() for tensor in model.state_dict().values())
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


def test_a_model_that_becomes_another_takes_no_more_memory(adapted):
    pool = ModelPool(GPU, "resident")
    before = held_bytes(pool.full_precision("aligned", open_model(str(adapted.path))))
    found = pool.full_precision("finetuned", adapted, instead_of="aligned")
    assert held_bytes(found) == before
    for name, tensor in adapted.load_model(GPU, torch.bfloat16).state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("held", [0, 2])
def test_a_streamed_model_computes_what_a_resident_one_does(adapted, held):
    ids, mask = (tensor.cuda() for tensor in random_batch(padding="right"))
    model = adapted.skeleton(dtype=torch.bfloat16)
    adapted.load_outer(model, GPU, torch.bfloat16)
    one = adapted.block_layout(0, torch.bfloat16).num_bytes
    stream = open_stream(adapted, torch.bfloat16, GPU, held_bytes=held * one)
    with stream_blocks(model, adapted, GPU, stream=stream), torch.no_grad():
        found = [model(input_ids=ids, attention_mask=mask).logits for _ in range(3)]
    expected = adapted.load_model(GPU, torch.bfloat16)(input_ids=ids, attention_mask=mask).logits
    assert all(torch.equal(logits, expected) for logits in found)


@pytest.mark.parametrize("memory", ["streamed", "low"])
def test_gradients_do_not_depend_on_where_the_weights_are(adapted, memory):
    gradients = []
    for mode in ("resident", memory):
        it, goal = learning_student(adapted, mode), objective()
        gradients.append(gradients_of(it, goal.losses(it.model, goal.samples, goal.count(goal.samples))))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_recorded_pass_is_the_pass_itself(adapted):
    it, goal = learning_student(adapted, "resident"), objective()
    counts = goal.count(goal.samples)
    losses = goal.losses(it.model, goal.samples, counts)
    wanted, expected = gradients_of(it, losses), {name: float(value.detach()) for name, value in losses.items()}
    del losses  # no graph may be alive that was made on another stream than the recording's
    recorded = RecordedPass(it.model, it.trainable, goal, [goal.samples])
    for samples in (goal.samples, goal.samples[::-1], goal.samples):
        found = recorded(samples, counts)
    for name, value in found.items():
        assert float(value) == pytest.approx(expected[name], rel=2e-2)
    for name, value in it.trainable.named.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(value.grad, wanted[name], rtol=5e-2, atol=3e-2 * scale, msg=name)


def test_coded_products_are_as_near_to_the_plain_model_as_fake_quantized_ones(adapted):
    outputs = []
    for quantize, coded in ((False, False), (True, False), (True, True)):
        it = learning_student(adapted, "resident")
        for layer in fake_quant_linears(it.model).values():
            layer.quantize, layer.coded = quantize, coded
            assert layer.is_coded() == coded
        ids, mask = (tensor.cuda() for tensor in random_batch(padding="right"))
        with torch.no_grad():
            outputs.append(it.model(input_ids=ids, attention_mask=mask).logits.float())
    fake, coded = ((output - outputs[0]).norm() / outputs[0].norm() for output in outputs[1:])
    assert 0.01 < float(fake) < 0.1 and float(coded) < 1.2 * float(fake)


def test_pieces_are_handed_over_side_by_side():
    results = []
    with HandOver(GPU, pieces=3) as hand_over:
        for value in range(8):
            tensor = torch.full((1000,), float(value), device=GPU)
            hand_over.submit(lambda tensor=tensor: results.append(float(tensor.cpu().mean())))
    assert sorted(results) == [float(value) for value in range(8)]
