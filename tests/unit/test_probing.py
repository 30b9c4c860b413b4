"""How many prompts pass at once: few where the model is resident, what memory holds where it is streamed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qrealign.data.encode import ChatEncoder
from qrealign.models.source import open_model
from qrealign.models.streaming import is_streamed, stream_blocks
from qrealign.pipeline import probing
from qrealign.pipeline.models import ModelPool
from qrealign.pipeline.probing import STATE_BATCH, STREAMED_SHARE, state_batch
from qrealign.probes.states import collect_last_states
from tests.helpers import tiny_checkpoint

PROMPTS = [f"prompt number {index}" for index in range(40)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(str(tiny_checkpoint(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)))


@pytest.fixture
def context(source):
    return SimpleNamespace(
        finetuned=source, device=torch.device("cpu"), pool=SimpleNamespace(dtype=torch.float32), data=None
    )


@pytest.fixture(scope="module")
def encoder(source):
    return ChatEncoder(source.tokenizer(), max_length=64)


def test_a_resident_model_keeps_its_batch(context, source, encoder):
    model = source.load_model("cpu")
    assert not is_streamed(model, source.spec)
    assert state_batch(context, model, encoder, PROMPTS) == STATE_BATCH


def test_a_streamed_model_reads_its_blocks_once(context, source, encoder, monkeypatch):
    resident = collect_last_states(source.load_model("cpu"), encoder, PROMPTS, source.spec, batch_size=STATE_BATCH)
    model, loads = source.skeleton(), []
    source.load_outer(model, "cpu")
    with stream_blocks(model, source, "cpu", loader=lambda m, i: (loads.append(i), source.load_block(m, i, "cpu"))):
        assert is_streamed(model, source.spec)
        size = state_batch(context, model, encoder, PROMPTS)
        assert size == len(PROMPTS)
        states = collect_last_states(model, encoder, PROMPTS, source.spec, batch_size=size)
        assert loads == [0, 1, 2]
        torch.testing.assert_close(states, resident, atol=1e-4, rtol=1e-4)
        longest = max(map(len, encoder.encode_many(PROMPTS)))
        one = longest * (8 * 64 + 4 * 96) * 4  # hidden 64, MLP 96, float32
        monkeypatch.setattr(probing, "free_bytes", lambda _device: int(20.5 * one / STREAMED_SHARE))
        assert state_batch(context, model, encoder, PROMPTS) == 20
        monkeypatch.setattr(probing, "free_bytes", lambda _device: 0)
        assert state_batch(context, model, encoder, PROMPTS) == STATE_BATCH
    assert not is_streamed(model, source.spec)


@pytest.mark.parametrize(
    ("engine", "memory", "streams"),
    [
        ("blockwise", "auto", True),
        ("blockwise", "low", True),
        ("blockwise", "resident", False),
        ("endtoend", "auto", False),
    ],
)
def test_who_holds_one_block_reads_the_probe_s_model_block_by_block(context, source, engine, memory, streams):
    context.settings = SimpleNamespace(engine=engine)
    context.pool = ModelPool(torch.device("cpu"), memory)
    pool = probing._pool(context)
    assert is_streamed(pool.full_precision("aligned", source), source.spec) == streams
    assert (pool is context.pool) == pool.pin == (not streams)
