"""Steps of one token attend by `decode_attention`, with the answers of torch's own attention."""

from __future__ import annotations

import pytest
import torch

from qrealign.deploy import attention
from qrealign.deploy.decoder import StaticDecoder
from tests.helpers import random_batch, tiny_model
from tests.unit.deploy_helpers import greedy
from tests.unit.test_deploy_decoder import decode


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "opt", "gemma3_text", "mistral"])
def test_answers_stay_the_same(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(model_type)
    input_ids, mask = random_batch(length=10, padding="left")
    expected = greedy(model, input_ids, attention_mask=mask)
    steps = []
    kernel = attention.decode_attention
    monkeypatch.setattr(attention, "decode_attention", lambda *args, **how: steps.append(args) or kernel(*args, **how))
    attention.use_decode_attention(model)
    assert torch.equal(greedy(model, input_ids, attention_mask=mask), expected)
    assert len(steps) == 7 * model.config.num_hidden_layers  # the first token comes from the prefill
    static = greedy(model, input_ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, expected)
    assert torch.equal(decode(StaticDecoder(model, batch_size=3, max_length=24), input_ids, mask, 8), expected)


def test_models_with_another_attention_keep_it() -> None:
    model = tiny_model("gemma2")  # its scores are capped
    before = model.config._attn_implementation
    attention.use_decode_attention(model)
    assert before != "sdpa" and model.config._attn_implementation == before
