"""Sequences in slots: whatever their company, rows and lengths, they continue as they do alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qrealign.errors import ConfigError, DeviceError, UnsupportedArchitectureError
from qrealign.serve.graphs import SlotGraphs
from qrealign.serve.runner import Runner, cache_bytes_per_token, fitting_slots
from qrealign.serve.slots import MaskMaker
from tests.helpers import MODEL_TYPES, VOCAB, tiny_config, tiny_model

STEPS = 6


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def continue_alone(model, prompt: list[int], steps: int = STEPS) -> list[int]:
    """Return the greedy continuation without any cache."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def decode_together(runner: Runner, first: list[int], lengths: list[int]) -> list[list[int]]:
    """Return the greedy continuation of rows whose prompts were read and gave the tokens `first`."""
    answers, lengths = [[token] for token in first], list(lengths)
    for _ in range(STEPS - 1):
        logits = runner.decode([answer[-1] for answer in answers], lengths)
        for row, token in enumerate(logits.argmax(-1).tolist()):
            answers[row].append(token)
            lengths[row] += 1
    return answers


def answers_together(runner: Runner, prompts: list[list[int]]) -> list[list[int]]:
    """Return the continuations of three prompts in one batch."""
    runner.check()
    # The second prompt comes in two pieces, in a row that it leaves before it decodes.
    token = int(runner.prefill([0, 2], [prompts[0], prompts[1][:10]], [0, 0])[0].argmax())
    runner.cache.swap_rows(2, 1, 10)
    rest = runner.prefill([1, 2], [prompts[1][10:], prompts[2]], [10, 0])
    tokens = [token, *rest.argmax(-1).tolist()]
    return decode_together(runner, tokens, [len(prompt) for prompt in prompts])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture_continues_as_alone(model_type):
    model = tiny_model(model_type)
    prompts = prompts_of(3, 21, 34)  # windows of 8 tokens lie inside
    answers = answers_together(Runner(model, slots=3, max_length=60), prompts)
    assert answers == [continue_alone(model, prompt) for prompt in prompts]


def test_a_row_can_be_filled_to_its_last_cell_and_used_again():
    model = tiny_model()
    runner = Runner(model, slots=2, max_length=12)
    for prompt in prompts_of(12 - STEPS, 4):
        tokens = runner.prefill([0], [prompt], [0]).argmax(-1).tolist()
        assert decode_together(runner, tokens, [len(prompt)]) == [continue_alone(model, prompt)]


def test_copied_rows_continue_where_they_were():
    model = tiny_model()
    runner = Runner(model, slots=3, max_length=40)
    prompts = prompts_of(5, 9, 7)
    tokens = runner.prefill([0, 1, 2], prompts, [0, 0, 0]).argmax(-1).tolist()
    runner.cache.copy_row(2, 0, 7)
    answers = decode_together(runner, [tokens[2], tokens[1]], [7, 9])
    assert answers == [continue_alone(model, prompts[2]), continue_alone(model, prompts[1])]


def test_a_row_of_nan_is_harmless_once_cleared():
    model = tiny_model()
    runner = Runner(model, slots=2, max_length=40)
    prompt = prompts_of(4)[0]
    runner.prefill([0], [prompts_of(20)[0]], [0])
    for layer in runner.cache.layers:
        layer.values[0, :, 10:] = float("nan")
    assert not torch.isfinite(runner.prefill([0], [prompt], [0])).all()
    runner.cache.clear_row(0)
    assert torch.isfinite(runner.prefill([0], [prompt], [0])).all()


@torch.no_grad()
def test_rows_of_codes_move_with_their_scales():
    model = tiny_model()
    runner = Runner(model, slots=3, max_length=60, cache_bits=8)
    runner.check()
    prompts = prompts_of(3, 21)
    first = runner.prefill([0, 2], [prompts[0], prompts[1][:10]], [0, 0])[0]
    runner.cache.swap_rows(2, 1, 10)
    second = runner.prefill([1], [prompts[1][10:]], [10])[0]
    later = runner.decode([5, 6], [3, 21])
    ends = [prompts[0], prompts[1], [*prompts[0], 5], [*prompts[1], 6]]
    for found, ids in zip([first, second, *later], ends, strict=True):
        alone = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert 0 < (found - alone).norm() < 0.02 * alone.norm()


def test_slots_of_another_width_are_refused():
    with pytest.raises(ConfigError, match="4 bits"):
        Runner(tiny_model(), slots=1, max_length=20, cache_bits=4)


@pytest.mark.parametrize("bits", [None, 8])
def test_the_buffer_is_allocated_once_and_as_large_as_foretold(bits):
    model = tiny_model("gemma2")
    runner = Runner(model, slots=3, max_length=20, cache_bits=bits)
    runner.check()
    before = [layer.keys.data_ptr() for layer in runner.cache.layers]
    runner.prefill([0, 1], prompts_of(20, 5), [0, 0])
    assert [layer.keys.data_ptr() for layer in runner.cache.layers] == before
    held = sum(buffer.nbytes for buffer in runner.cache._buffers())
    assert held == 3 * 21 * cache_bytes_per_token(model, bits)


def test_slots_fit_the_memory_or_are_refused(monkeypatch):
    model = tiny_model()
    slot = cache_bytes_per_token(model) * 101
    monkeypatch.setattr("qrealign.serve.runner.free_bytes", lambda _: 5 * slot)
    assert [fitting_slots(model, 100, most) for most in (2, 9)] == [2, 4]
    monkeypatch.setattr("qrealign.serve.runner.free_bytes", lambda _: slot)
    with pytest.raises(DeviceError, match="--max-length"):
        fitting_slots(model, 100, 2)


def test_layers_that_no_mask_can_say_are_refused():
    config = tiny_config("qwen3")
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedArchitectureError, match="linear_attention"):
        MaskMaker(config, torch.float32)


def test_a_model_that_mixes_its_batch_is_refused():
    model = tiny_model()
    original = model.forward

    def mixing(*arguments, **options):
        output = original(*arguments, **options)
        output.logits = (
            output.logits - 0.9 * output.logits.mean(0, keepdim=True) if len(output.logits) > 1 else output.logits
        )
        return output

    model.forward = mixing
    with pytest.raises(UnsupportedArchitectureError, match="otherwise in a batch"):
        Runner(model, slots=2, max_length=40).check()


def test_memory_that_runs_out_at_the_check_is_told():
    model = tiny_model()
    runner = Runner(model, slots=2, max_length=40)

    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.forward = too_much
    with pytest.raises(DeviceError, match="--max-slots"):
        runner.check()


def test_shapes_of_recorded_passes_are_few():
    graphs = SlotGraphs(lambda *_: None, slots=6, tokens=1024, spare=1000, device=torch.device("cpu"))
    sizes = ((1, 1), (3, 65), (5, 300), (2, 1000))
    assert [graphs.padded(*size) for size in sizes] == [(1, 64), (4, 128), (6, 512), (2, 1024)]
    prompts = [(4, 256), (2, 256), (1, 256), (6, 128), (4, 128), (2, 128), (1, 128), (6, 64), (4, 64), (2, 64), (1, 64)]
    assert list(graphs.shapes()) == [*prompts, (6, 1), (4, 1), (2, 1), (1, 1)]


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_what_fills_up_a_shape_changes_no_answer(model_type, monkeypatch):
    shapes = []

    def capture(graphs, ids, place):
        """Stand in for a CUDA graph: what is replayed is the same pass over the same tensors."""
        shapes.append((*ids.shape, place.length))
        logits = graphs._forward(ids, place).clone()
        return SimpleNamespace(replay=lambda: logits.copy_(graphs._forward(ids, place))), logits

    monkeypatch.setattr(SlotGraphs, "_capture", capture)
    model = tiny_model(model_type)
    runner = Runner(model, slots=5, max_length=60)
    runner._graphs = SlotGraphs(runner._forward, slots=5, tokens=512, spare=60, device=torch.device("cpu"))
    prompts = prompts_of(3, 21, 34)
    assert answers_together(runner, prompts) == [continue_alone(model, prompt) for prompt in prompts]
    assert shapes == [(2, 64, 60), (2, 1, 60), (4, 1, 60)]
    runner.warm_up()
    assert len(shapes) == 8
    assert runner.prefill(range(5), [[3]] * 5, [9, 9, 9, 9, 10]).shape == (5, VOCAB)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_replayed_graphs_continue_as_alone(model_type):
    model = tiny_model(model_type).cuda()
    runner = Runner(model, slots=3, max_length=60)
    runner.warm_up()
    prompts = prompts_of(3, 21, 34)
    answers = answers_together(runner, prompts)
    assert {shape[:2] for shape in runner._graphs._graphs} == {(rows, width) for rows in (1, 2, 3) for width in (1, 64)}
    model.cpu()
    assert answers == [continue_alone(model, prompt) for prompt in prompts]
