"""--memory: how the pool holds models, what the student makes of it, and what preflight says of both."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from qrealign.calibrate.distributed import ALONE, Team
from qrealign.calibrate.methods import method_settings
from qrealign.config import parse_scheme
from qrealign.models.source import open_model
from qrealign.models.streaming import is_streamed
from qrealign.models.transfer import open_stream
from qrealign.pipeline import calibrating, models, preflight, student, teaching
from qrealign.pipeline.models import ModelPool
from qrealign.pipeline.student import Student, graph_bytes, kept_blocks
from qrealign.quant.fake_quant import fake_quant_linears
from tests.helpers import random_batch, tiny_adapter, tiny_checkpoint

CPU, GPU = torch.device("cpu"), SimpleNamespace(type="cuda")
SETTINGS = method_settings("realign", steps=4, batch_size=4, edit_rank=2, sequence_length=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(str(tiny_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=4)))


@pytest.fixture(scope="module")
def adapted(source, tmp_path_factory):
    return open_model(str(source.path), adapter=str(tiny_adapter(tmp_path_factory.mktemp("lora"), source.path)))


def context_of(source, pool, settings=SETTINGS):
    spec = SimpleNamespace(endtoend=settings, settings=settings)
    return SimpleNamespace(
        repaired=source,
        finetuned=source,
        pool=pool,
        device=pool.device,
        scheme=parse_scheme("w8a8"),
        spec=spec,
        team=ALONE,
    )


def live_graphs():
    """Return how many nodes of coded products are alive in any autograd graph."""
    gc.collect()
    return sum(type(one).__name__ == "_IntegerLinearBackward" for one in gc.get_objects())


def logits(model):
    input_ids, mask = random_batch(padding="right")
    with torch.no_grad():
        return model(input_ids=input_ids, attention_mask=mask).logits


@pytest.mark.parametrize(
    ("memory", "free", "mode"),
    [
        ("auto", 99.0, "resident"),
        ("auto", 1.2, "low"),
        ("auto", 0.1, "streamed"),
        ("resident", 0.1, "resident"),
        ("low", 99.0, "low"),
        ("streamed", 99.0, "streamed"),
    ],
)
def test_what_is_asked_for_is_done_and_auto_follows_the_free_memory(source, monkeypatch, memory, free, mode):
    pool = ModelPool(CPU, memory)
    monkeypatch.setattr(models, "free_bytes", lambda _: int(free * pool.resident_bytes(source)))
    pool.device = GPU
    assert pool.mode(source) == mode
    whole, outer = pool.resident_bytes(source), pool.resident_bytes(source) - 4 * pool.block_bytes(source)
    expected = {"resident": whole, "streamed": outer + 2 * pool.block_bytes(source), "low": whole}
    assert pool.weight_bytes(source) == pytest.approx(expected[mode], rel=0.02)


def test_a_cpu_streams_from_where_the_files_are(source):
    pool = ModelPool(CPU, "streamed")
    assert pool.open_stream(source) is None and pool.mode(source) == "streamed"
    model = pool.full_precision("it", source)
    assert is_streamed(model, source.spec)
    assert torch.equal(logits(model), logits(source.load_model("cpu")))


def test_a_model_becomes_its_adapted_form_where_it_stands(source, adapted):
    pool = ModelPool(CPU)
    before = pool.full_precision("aligned", source)
    unchanged = before.model.layers[0].mlp.up_proj.weight
    after = pool.full_precision("finetuned", adapted, instead_of="aligned")
    assert after is before and after.model.layers[0].mlp.up_proj.weight is unchanged
    assert torch.equal(logits(after), logits(adapted.load_model("cpu")))
    assert pool.full_precision("finetuned", adapted, instead_of="aligned") is after


def test_a_model_of_other_files_replaces_the_one_before(source, adapted, tmp_path):
    other = open_model(str(tiny_checkpoint(tmp_path / "other", seed=5, num_hidden_layers=4)))
    pool = ModelPool(CPU)
    pool.full_precision("aligned", other)
    model = pool.full_precision("finetuned", adapted, instead_of="aligned")
    assert torch.equal(logits(model), logits(adapted.load_model("cpu"))) and list(pool._kept) == ["finetuned"]


def test_the_student_takes_over_the_teacher_that_it_starts_from(source, adapted):
    pool = ModelPool(CPU)
    teacher = pool.full_precision("finetuned", adapted)
    taught = Student(context_of(adapted, pool), SETTINGS)
    assert taught.model is teacher and pool.take(adapted) is None and not taught.recordable
    fresh = Student(context_of(adapted, ModelPool(CPU)), SETTINGS)
    assert fresh.model is not teacher and torch.equal(logits(taught.model), logits(fresh.model))
    pool.full_precision("aligned", source)
    assert pool.take(adapted) is None and not pool._kept


@pytest.mark.parametrize(
    ("free", "streamed", "expected"), [(140, False, 32), (140, True, 55), (7, True, 41), (2, True, 32)]
)
def test_a_teacher_answers_more_prompts_at_once_where_its_weights_are_streamed(monkeypatch, free, streamed, expected):
    """Sizes of a Llama-2-7B: 512 KiB of keys and values a token."""
    monkeypatch.setattr(teaching, "free_bytes", lambda _: free * 2**30)
    pool = SimpleNamespace(
        dtype=torch.bfloat16,
        fits=lambda _: not streamed,
        resident_bytes=lambda _: 13.5e9,
        weight_bytes=lambda _: 2**30,
    )
    config = SimpleNamespace(num_attention_heads=32, num_key_value_heads=32, head_dim=128)
    source = SimpleNamespace(config=config, num_blocks=32)
    settings = method_settings("realign", sequence_length=128, refusal_tokens=8, benign_tokens=20)
    context = SimpleNamespace(device=GPU, finetuned=source, pool=pool)
    assert teaching.teacher_batch(context, settings) == expected


def test_streamed_models_of_the_same_files_share_what_lies_in_host_memory(source, adapted, monkeypatch):
    """The aligned model, the fine-tuned one and the student: blocks are read once, and merged once."""
    read, merged = [], []
    monkeypatch.setattr(ModelPool, "copies_blocks", True)
    for one, name, calls in (
        (source, "unmerged_block", read),
        (adapted, "unmerged_block", read),
        (adapted, "merge_block", merged),
    ):
        original = getattr(one, name)
        monkeypatch.setattr(
            one, name, lambda index, rest, calls=calls, original=original: calls.append(index) or original(index, rest)
        )
    pool = ModelPool(CPU, "streamed")
    aligned = pool.full_precision("aligned", source)
    assert torch.equal(logits(aligned), logits(source.load_model("cpu")))
    finetuned = pool.full_precision("finetuned", adapted, instead_of="aligned")
    expected = logits(adapted.load_model("cpu"))
    assert torch.equal(logits(finetuned), expected) and torch.equal(logits(finetuned), expected)
    assert pool.take(adapted) is None
    stream = pool.open_stream(adapted)
    for index in range(4):
        assert all(
            torch.equal(value, stream.acquire(index)[name]) for name, value in adapted.block_state(index).items()
        )
    assert sorted(read) == sorted(merged) == [0, 1, 2, 3]
    stream.close()


def test_host_memory_of_other_files_is_given_back(source, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelPool, "copies_blocks", True)
    other = open_model(str(tiny_checkpoint(tmp_path / "other", seed=5, num_hidden_layers=4)))
    pool = ModelPool(CPU, "streamed")
    pool.full_precision("aligned", other)
    host = pool._streams["aligned"].host
    model = pool.full_precision("finetuned", source, instead_of="aligned")
    assert not host._all and torch.equal(logits(model), logits(source.load_model("cpu")))
    pool.full_precision("another", other)
    assert list(pool._streams) == ["another"]  # whoever holds the one before may still use it
    assert torch.equal(logits(model), logits(source.load_model("cpu")))
    pool.release()
    assert not pool._streams


def test_a_streamed_student_computes_and_freezes_what_a_resident_one_does(adapted):
    resident, streamed = (Student(context_of(adapted, ModelPool(CPU, m)), SETTINGS) for m in ("resident", "streamed"))
    assert streamed.streamed and not resident.streamed
    assert torch.equal(logits(resident.model), logits(streamed.model))
    frozen = []
    for one in (resident, streamed):
        blocks = {}
        one.freeze(lambda index, block, blocks=blocks: blocks.setdefault(index, dict(block.state_dict())))
        frozen.append(blocks)
    assert frozen[0].keys() == frozen[1].keys() == set(range(4))
    for index, state in frozen[0].items():
        assert all(torch.equal(tensor, frozen[1][index][name]) for name, tensor in state.items())


def test_gradients_through_a_stream_are_those_of_a_resident_student(adapted):
    """The stream's two slots are written anew while a backward pass walks down."""
    gradients = []
    for memory in ("resident", "streamed"):
        pool = ModelPool(CPU, memory)
        pool.open_stream = lambda source: open_stream(source, torch.float32, CPU, held_bytes=0.0)
        it = Student(context_of(adapted, pool), SETTINGS)
        for layer in fake_quant_linears(it.model).values():
            layer.coded = True
        input_ids, mask = random_batch(padding="right")
        for _ in range(2):
            it.trainable.zero_grad()
            it.model(input_ids=input_ids, attention_mask=mask).logits.square().mean().backward()
        gradients.append({name: value.grad for name, value in it.trainable.named.items()})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    del it, pool
    gc.collect()


def test_blocks_keep_their_activations_as_far_as_memory_allows(adapted, monkeypatch):
    pool = ModelPool(CPU)
    it = Student(context_of(adapted, pool), SETTINGS)
    context, blocks = context_of(adapted, pool), list(adapted.spec.blocks_of(it.model))
    assert not any(block.training for block in blocks)  # a CPU has room for all of them
    fixed, each = graph_bytes(it.model, adapted.spec)
    one = fixed + each * SETTINGS.batch_size * (SETTINGS.sequence_length + SETTINGS.benign_tokens)
    for share, expected in ((0.0, 0), (2.5, 2), (99.0, 4)):
        monkeypatch.setattr(student, "free_bytes", lambda _, s=share: s * one / student.ACTIVATION_SHARE)
        assert kept_blocks(context, SETTINGS, it.model, blocks) == (expected, 0)
    context.device = GPU
    monkeypatch.setattr(student, "free_bytes", lambda _: 1e15)
    codes = sum(layer.weight.numel() for layer in fake_quant_linears(blocks[0]).values())
    monkeypatch.setattr(pool, "resident_bytes", lambda _: int((4 * one + 2.5 * codes) / student.KEPT_SHARE))
    assert kept_blocks(context, SETTINGS, it.model, blocks) == (4, 2)
    monkeypatch.setattr(pool, "resident_bytes", lambda _: int(3.5 * one / student.KEPT_SHARE))
    assert kept_blocks(context, SETTINGS, it.model, blocks) == (3, 0)
    monkeypatch.setattr(student, "free_bytes", lambda _: 2 * 1.5 * one)
    assert kept_blocks(context, SETTINGS, it.model, blocks) == (1, 0)
    context.team = Team(rank=0, size=SETTINGS.batch_size)  # a sample for each process
    assert kept_blocks(context, SETTINGS, it.model, blocks)[0] > 1


def test_codes_are_kept_where_blocks_are_computed_again_and_where_memory_is_left(adapted, monkeypatch):
    found = {}
    for plan in ((2, 0), (4, 1)):
        monkeypatch.setattr(student, "kept_blocks", lambda *_, plan=plan: plan)
        it = Student(context_of(adapted, ModelPool(CPU)), SETTINGS)
        blocks = [fake_quant_linears(block).values() for block in adapted.spec.blocks_of(it.model)]
        found[plan] = [{layer.keeps_codes for layer in layers} for layers in blocks]
    assert found == {(2, 0): [{True}, {True}, {False}, {False}], (4, 1): [{False}, {False}, {False}, {True}]}
    streamed = Student(context_of(adapted, ModelPool(CPU, "streamed")), SETTINGS)
    assert not any(layer.keeps_codes for layer in fake_quant_linears(streamed.model).values())


def test_the_bytes_of_a_graph_grow_with_its_tokens_and_hold_no_parameters(source):
    kept, coded, before = [], [], live_graphs()
    for is_coded, found in ((False, kept), (True, coded)):
        it = Student(context_of(source, ModelPool(CPU)), SETTINGS)
        for layer in fake_quant_linears(it.model).values():
            layer.coded = is_coded
        found.extend(graph_bytes(it.model, source.spec))
    weights = sum(rows * columns for rows, columns in source.linear_shapes().values())  # float32, of one block in four
    assert kept[0] >= weights > 0.2 * weights > coded[0]  # the rounded weights, or none of them
    assert 0 < coded[1] < kept[1]  # codes instead of numbers
    assert live_graphs() <= before  # measuring leaves none behind


def test_preflight_says_what_a_step_moves(source, monkeypatch):
    monkeypatch.setattr(teaching, "free_bytes", lambda _: 10**15)
    for memory, words in (
        ("resident", "weights resident"),
        ("streamed", "weights streamed: 0.0 GiB come from the host in each step"),
        ("auto", "weights resident (chosen from what is free)"),
    ):
        pool = ModelPool(CPU, memory)
        monkeypatch.setattr(models, "free_bytes", lambda _: 10**15)
        pool.device = GPU
        context = context_of(source, pool)
        assert preflight.memory_line(context).endswith(words)
        moved = preflight.moved_bytes(context)
        assert moved == (0 if memory != "streamed" else 2 * (pool.resident_bytes(source) - pool.weight_bytes(source)))
    resident, streamed = (ModelPool(CPU, name) for name in ("resident", "streamed"))
    for pool in (resident, streamed):
        pool.device = GPU
    sizes = [preflight.memory_bytes(context_of(source, pool)) for pool in (streamed, resident)]
    assert sizes[0] < sizes[1]
    monkeypatch.setattr(preflight, "cache_bytes", lambda *_: 10**9)  # the teachers' answers then take more than a step
    assert preflight.memory_bytes(context_of(source, streamed)) > 10**9 > sizes[1]


def test_preflight_says_where_the_streams_of_the_block_wise_engine_are(source, monkeypatch):
    settings, sizes = method_settings("paper", samples=40, sequence_length=32), {}
    for memory, free, on_host in (
        ("auto", 10**15, False),
        ("auto", 4 * 2 * 40 * 32 * 64 * 4 - 1, True),  # the streams would fill a quarter
        ("low", 10**15, True),
        ("resident", 1, False),
    ):
        monkeypatch.setattr(calibrating, "free_bytes", lambda _, free=free: free)
        context = context_of(source, ModelPool(CPU, memory), settings)
        context.spec.endtoend, context.device = None, GPU
        line = preflight.memory_line(context)
        assert line.endswith("activation streams in host memory") == on_host
        sizes[memory] = preflight.memory_bytes(context)
    assert sizes["resident"] - sizes["low"] == calibrating.stream_bytes(context) == 2 * 40 * 32 * 64 * 4
