"""Blocks with fewer launches compute what Hugging Face's blocks compute, and know when they must not be asked."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import qrealign_kernels
from qrealign.arch import block_spec
from qrealign.deploy import steps
from qrealign.deploy.decoder import StaticDecoder
from qrealign.deploy.layers import SummingNorm
from qrealign.serve.runner import Runner
from qrealign_kernels import TokenStates
from tests.helpers import random_batch, tiny_model
from tests.unit.deploy_helpers import deployed, greedy

PLAIN = ["llama", "mistral", "qwen2"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls of the fused attention of steps by their rows."""
    calls: list[int] = []

    def attend(states: TokenStates, *given: Any, **options: Any) -> torch.Tensor:
        calls.append(len(states.query))
        return qrealign_kernels.decode_attention(states, *given, **options)

    monkeypatch.setattr(steps, "decode_attention", attend)
    return calls


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Keep the rows and tokens of the calls of the fused attention of prompts."""
    calls: list[tuple[int, ...]] = []

    def attend(states: TokenStates, *given: Any, **options: Any) -> torch.Tensor:
        calls.append(tuple(states.query.shape[:2]))
        return qrealign_kernels.prompt_attention(states, *given, **options)

    monkeypatch.setattr(steps, "prompt_attention", attend)
    return calls


def fused_pair(model_type: str) -> tuple[Any, Any]:
    """Return a tiny model and the same with fewer launches."""
    model = tiny_model(model_type)
    fused = deepcopy(model)
    steps.fuse_steps(fused, block_spec(fused.config))
    return model, fused


@torch.no_grad()
def decoded(model: Any, input_ids: torch.Tensor, mask: torch.Tensor | None, count: int = 8) -> torch.Tensor:
    """Return the logits of a prefill and of `count` steps, `[B, count + 1, V]`."""
    decoder = StaticDecoder(model, batch_size=len(input_ids), max_length=24)
    logits = [decoder.prefill(input_ids, mask)]
    for _ in range(count):
        logits.append(decoder.step(logits[-1].argmax(dim=-1)).clone())
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("model_type", PLAIN)
def test_static_steps_give_the_same_logits(model_type: str, counted: list[int]) -> None:
    model, fused = fused_pair(model_type)
    input_ids, mask = random_batch(length=10, padding="left")
    torch.testing.assert_close(decoded(fused, input_ids, mask), decoded(model, input_ids, mask), rtol=1e-4, atol=1e-4)
    layers = model.config.num_hidden_layers
    assert counted == ([] if model_type == "mistral" else [3] * (8 * layers))  # its window slides


@pytest.mark.parametrize("model_type", PLAIN)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
def test_generate_gives_the_same_tokens(model_type: str, options: dict[str, Any]) -> None:
    model, fused = fused_pair(model_type)
    input_ids, mask = random_batch(length=10, padding="left")
    expected = greedy(model, input_ids, attention_mask=mask, **options)
    assert torch.equal(greedy(fused, input_ids, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("model_type", PLAIN)
def test_slots_of_different_lengths_give_the_same_logits(model_type: str, counted: list[int]) -> None:
    found = []
    for model in fused_pair(model_type):
        runner = Runner(model, slots=3, max_length=40)
        prompts = [list(range(3, 3 + length)) for length in (3, 21, 12)]
        lengths = [len(prompt) for prompt in prompts]
        logits = [runner.prefill([0, 1, 2], prompts, [0, 0, 0])]
        for step in range(5):
            tokens = logits[-1].argmax(dim=-1).tolist()
            logits.append(runner.decode(tokens, [length + step for length in lengths]).clone())
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert set(counted) == {3}


@pytest.mark.parametrize("bits", [None, 8])
def test_pieces_of_prompts_give_the_logits_of_the_class(bits: int | None, prompts: list[tuple[int, ...]]) -> None:
    model, fused = fused_pair("llama")
    input_ids, mask = random_batch(length=10, padding="left")
    found = []
    for one in (model, fused):
        decoder = StaticDecoder(one, batch_size=3, max_length=24, cache_bits=bits, prompt_piece=4)
        prompts.clear()
        found.append(decoder.prefill(input_ids, mask))
    assert (found[1] - found[0]).norm() < (1e-4 if bits is None else 1e-2) * found[0].norm()  # a code may differ
    assert prompts == [size for size in ((3, 4), (3, 4), (3, 2)) for _ in range(model.config.num_hidden_layers)]


@pytest.mark.parametrize("bits", [None, 8])
def test_prompts_in_slots_give_the_logits_of_the_class(bits: int | None, prompts: list[tuple[int, ...]]) -> None:
    found = []
    for model in fused_pair("llama"):
        runner = Runner(model, slots=4, max_length=40, cache_bits=bits)
        chunks = [list(range(3, 3 + length)) for length in (3, 21, 12)]
        runner.prefill([0, 1, 2], chunks, [0, 0, 0])
        later = runner.prefill([3, 1], [list(range(4)), list(range(9))], [0, 21])
        found.append(torch.cat((later, runner.decode([5, 6, 7], [3, 30, 12]))))
    assert (found[1] - found[0]).norm() < (1e-4 if bits is None else 1e-2) * found[0].norm()  # a code may differ
    assert set(prompts) == {(3, 21), (2, 9)}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w4a8"])
def test_packed_blocks_give_the_same_logits(tmp_path: Path, scheme: str, counted: list[int]) -> None:
    _, loaded, _ = deployed(tmp_path, "llama", scheme)
    input_ids, mask = random_batch(length=10, padding="left")
    expected = decoded(loaded, input_ids, mask)
    steps.fuse_steps(loaded, block_spec(loaded.config))
    found = decoded(loaded, input_ids, mask)
    assert (found - expected).norm() < 0.01 * expected.norm()  # a code may be rounded the other way
    assert len(counted) == 8 * loaded.config.num_hidden_layers
    assert all(block.forward.__func__ is steps._run_block for block in loaded.model.layers)


def test_a_norm_keeps_what_it_was_asked_to_sum_and_nothing_else() -> None:
    norm = SummingNorm(torch.nn.Parameter(torch.rand(8) + 0.5), 1e-5, offset=0.0)
    x, branch, other = torch.randn(3, 2, 8).unbind()
    total = norm.add(x, branch)
    torch.testing.assert_close(total, x + branch)
    alone = SummingNorm(norm.weight, 1e-5, offset=0.0)
    torch.testing.assert_close(norm(total), alone(x + branch))
    norm.add(x, branch)
    torch.testing.assert_close(norm(other), alone(other))
    assert norm._last is None


def test_a_compiled_model_goes_the_way_of_the_class(counted: list[int]) -> None:
    model, fused = fused_pair("llama")
    input_ids, _ = random_batch(length=5)
    found = []
    for run in (model, torch.compile(fused, fullgraph=True, backend="eager")):
        cache = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            model(input_ids, past_key_values=cache)
            found.append(run(input_ids[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert counted == []


def test_additive_masks_go_the_way_of_the_class(counted: list[int]) -> None:
    model, fused = fused_pair("llama")
    for one in (model, fused):
        one.set_attn_implementation("eager")
    input_ids, mask = random_batch(length=10, padding="left")
    torch.testing.assert_close(decoded(fused, input_ids, mask), decoded(model, input_ids, mask), rtol=1e-4, atol=1e-4)
    assert counted == []


def test_architectures_with_other_parts_stay_as_they_are() -> None:
    model = tiny_model("gemma2")
    before = [type(module) for module in model.modules()]
    steps.fuse_steps(model, block_spec(model.config))
    assert [type(module) for module in model.modules()] == before


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_recorded_steps_give_the_logits_of_the_class(model_type: str) -> None:
    model, fused = (one.cuda() for one in fused_pair(model_type))
    input_ids, mask = (tensor.cuda() for tensor in random_batch(length=10, padding="left"))
    decoder = StaticDecoder(fused, batch_size=3, max_length=24)
    assert decoder.records
    torch.testing.assert_close(decoded(fused, input_ids, mask), decoded(model, input_ids, mask), rtol=1e-3, atol=1e-3)
