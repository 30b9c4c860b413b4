"""Decoding on a static cache gives what `generate` gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qrealign.deploy.decoder import StaticDecoder
from qrealign.errors import ConfigError, UnsupportedArchitectureError
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


@torch.no_grad()
def logits_of(decoder: StaticDecoder, input_ids: torch.Tensor, mask: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return the logits behind a prompt and behind each of `count` given tokens, `[B, count + 1, V]`."""
    found = [decoder.prefill(input_ids, mask).clone()]
    found += [decoder.step(torch.full((len(input_ids),), 5 + index)).clone() for index in range(count)]
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("piece", [4, 64])
def test_prompts_in_pieces_give_the_same_logits(model_type: str, piece: int) -> None:
    model = tiny_model(model_type)
    input_ids, mask = random_batch(length=10, padding="left")
    expected = logits_of(StaticDecoder(model, batch_size=3, max_length=24), input_ids, mask, 4)
    decoder = StaticDecoder(model, batch_size=3, max_length=24, prompt_piece=piece)
    torch.testing.assert_close(logits_of(decoder, input_ids, mask, 4), expected, rtol=1e-4, atol=1e-4)
    assert not decoder.records_prompts


@pytest.mark.parametrize("piece", [None, 4])
def test_a_cache_of_codes_stays_close(piece: int | None) -> None:
    model = tiny_model()
    input_ids, mask = random_batch(length=10, padding="left")
    expected = logits_of(StaticDecoder(model, batch_size=3, max_length=24), input_ids, mask, 4)
    decoder = StaticDecoder(model, batch_size=3, max_length=24, cache_bits=8, prompt_piece=piece)
    found = logits_of(decoder, input_ids, mask, 4)
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()
    assert {layer.keys.dtype for layer in decoder.cache.layers} == {torch.int8}


def test_a_cache_that_cannot_hold_codes_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 bits"):
        StaticDecoder(tiny_model(), batch_size=1, max_length=16, cache_bits=4)
    with pytest.raises(UnsupportedArchitectureError, match="sliding window"):
        StaticDecoder(tiny_model("gemma2"), batch_size=1, max_length=16, cache_bits=8)


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


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("bits", [None, 8])
def test_recorded_pieces_equal_whole_prompts(tmp_path: Path, scheme: str, bits: int | None) -> None:
    """The last piece is shorter than the others, or reaches behind the cache's end."""
    import qrealign

    _, _, folder = deployed(tmp_path, "llama", scheme)
    loaded = qrealign.load_packed(folder, device="cuda")
    input_ids, mask = (tensor.cuda() for tensor in random_batch(length=10, padding="left"))
    whole = StaticDecoder(loaded, batch_size=3, max_length=24, cache_bits=bits)
    expected = logits_of(whole, input_ids, mask, 6)
    for piece in (4, 8, 20):
        decoder = StaticDecoder(loaded, batch_size=3, max_length=24, cache_bits=bits, prompt_piece=piece)
        assert decoder.records_prompts
        found = logits_of(decoder, input_ids, mask, 6)
        assert (found - expected).norm() < 0.02 * expected.norm()
    short = StaticDecoder(loaded, batch_size=3, max_length=11, cache_bits=bits, prompt_piece=8)
    assert (short.prefill(input_ids, mask) - expected[:, 0]).norm() < 0.02 * expected[:, 0].norm()


@pytest.mark.gpu
def test_pieces_of_a_plain_model_are_recorded_too() -> None:
    model = tiny_model().cuda()
    input_ids, mask = (tensor.cuda() for tensor in random_batch(length=10, padding="left"))
    expected = logits_of(StaticDecoder(model, batch_size=3, max_length=24), input_ids, mask, 6)
    decoder = StaticDecoder(model, batch_size=3, max_length=24, prompt_piece=4)
    assert decoder.records_prompts
    torch.testing.assert_close(logits_of(decoder, input_ids, mask, 6), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_a_model_in_little_memory_gives_nearly_the_same_logits(tmp_path: Path, scheme: str) -> None:
    import qrealign

    _, _, folder = deployed(tmp_path, "llama", scheme)
    input_ids, mask = (tensor.cuda() for tensor in random_batch(length=10, padding="left"))
    plain = qrealign.load_packed(folder, device="cuda")
    expected = logits_of(StaticDecoder(plain, batch_size=3, max_length=24), input_ids, mask, 6)
    small = qrealign.load_packed(folder, device="cuda", head_bits=8, embedding_on_host=True)
    assert small.get_input_embeddings().table.is_pinned() and small.device.type == "cuda"
    decoder = StaticDecoder(small, batch_size=3, max_length=24, cache_bits=8, prompt_piece=8)
    assert decoder.records_prompts
    found = logits_of(decoder, input_ids, mask, 6)
    assert (found - expected).norm() < 0.05 * expected.norm()
