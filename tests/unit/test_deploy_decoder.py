"""Decoding on a static cache gives what `generate` gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qrealign.deploy.decoder import StaticDecoder
from tests.helpers import random_batch, tiny_model
from tests.unit.deploy_helpers import deployed, greedy


def decode(decoder: StaticDecoder, input_ids: torch.Tensor, mask: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return `count` greedy tokens, `[B, count]`."""
    tokens = [decoder.prefill(input_ids, mask).argmax(dim=-1)]
    for _ in range(count - 1):
        tokens.append(decoder.step(tokens[-1]).argmax(dim=-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma2"])
def test_batches_with_padding_decode_as_generate_does(model_type: str) -> None:
    model = tiny_model(model_type)
    input_ids, mask = random_batch(length=10, padding="left")
    expected = greedy(model, input_ids, attention_mask=mask)
    decoder = StaticDecoder(model, batch_size=3, max_length=24)
    assert torch.equal(decode(decoder, input_ids, mask, 8), expected)
    again, _ = random_batch(length=6, seed=1)  # a prefill forgets what was there
    assert torch.equal(decode(decoder, again, None, 8), greedy(model, again))
    assert not decoder.records


def test_packed_models_decode_too(tmp_path: Path) -> None:
    _, loaded, _ = deployed(tmp_path, "llama", "w8a8")
    input_ids, _ = random_batch(batch=1)
    decoder = StaticDecoder(loaded, batch_size=1, max_length=32)
    assert torch.equal(decode(decoder, input_ids, None, 8), greedy(loaded, input_ids))


@pytest.mark.parametrize("shape", [(2, 5), (1, 16), (1, 0)])
def test_prompts_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    decoder = StaticDecoder(tiny_model(), batch_size=1, max_length=16)
    with pytest.raises(ValueError, match="1 to 15"):
        decoder.prefill(torch.ones(shape, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_recorded_steps_equal_unrecorded_ones(tmp_path: Path, scheme: str) -> None:
    import qrealign

    _, _, folder = deployed(tmp_path, "llama", scheme)
    loaded = qrealign.load_packed(folder, device="cuda")
    input_ids, mask = (tensor.cuda() for tensor in random_batch(length=10, padding="left"))
    recorded = StaticDecoder(loaded, batch_size=3, max_length=24)
    plain = StaticDecoder(loaded, batch_size=3, max_length=24)
    plain._recorded = None
    assert recorded.records
    assert torch.equal(decode(recorded, input_ids, mask, 8), decode(plain, input_ids, mask, 8))
