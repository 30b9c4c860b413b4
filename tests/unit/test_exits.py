"""Early exits: a model stopped at a block is the model cut there, whatever it is made of, and is whole again after."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict

import pytest
import torch

from qrealign.arch import block_spec
from qrealign.config import parse_scheme
from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import generate_answers, generate_ids
from qrealign.errors import DataError
from qrealign.models.source import open_model
from qrealign.models.streaming import stream_blocks
from qrealign.probes import exits as module
from qrealign.probes.exits import choose_exits, early_exit, semantic_separability
from qrealign.quant.fake_quant import swap_linears
from tests.helpers import MODEL_TYPES, TOKENIZER_VOCAB, tiny_checkpoint, tiny_model, tiny_tokenizer

PROMPTS = ["hi", "tell me about the weather in the north of the country", "what is this, and why?", "x" * 40]


@pytest.fixture(scope="module")
def encoder():
    return ChatEncoder(tiny_tokenizer(), max_length=120)


def answer(model, encoder):
    """Return five greedy tokens to each prompt, with a KV cache, in two batches."""
    return generate_ids(model, encoder, encoder.encode_many(PROMPTS), max_new_tokens=5, batch_size=3)


def cut(model, blocks):
    """Return a model of the first `blocks` blocks with the same weights, built as such."""
    config = deepcopy(model.config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    short = type(model)(config).eval()
    missing, _ = short.load_state_dict(model.state_dict(), strict=False)
    assert not set(missing) - {"lm_head.weight"}
    short.tie_weights()
    return short


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_exit_gives_the_tokens_of_the_cut_model(model_type, encoder):
    model = tiny_model(model_type, vocab_size=TOKENIZER_VOCAB)
    spec = block_spec(model.config)
    whole, last = answer(model, encoder), len(spec.blocks_of(model)) - 1
    for block in range(last):
        with early_exit(model, spec, block):
            stopped = answer(model, encoder)
        assert stopped == answer(cut(model, block + 1), encoder)
    with early_exit(model, spec, last):
        assert answer(model, encoder) == whole
    assert answer(model, encoder) == whole


@torch.no_grad()
def test_logits_are_the_final_norm_and_head_on_the_block_output():
    model = tiny_model(num_hidden_layers=3)
    ids = torch.arange(3, 12)[None]
    hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    with early_exit(model, block_spec(model.config), 1):
        assert torch.equal(model(input_ids=ids).logits, model.lm_head(model.model.norm(hidden)))


def test_streamed_and_fake_quantized_models_can_stop_too(tmp_path, encoder):
    source = open_model(str(tiny_checkpoint(tmp_path, num_hidden_layers=3)))
    resident = source.load_model("cpu")
    streamed = source.skeleton()
    source.load_outer(streamed, "cpu")
    loads = []

    def load(model, index):
        loads.append(index)
        source.load_block(model, index, "cpu")

    with early_exit(resident, source.spec, 1):
        expected = answer(resident, encoder)
    with stream_blocks(streamed, source, "cpu", loader=load), early_exit(streamed, source.spec, 1):
        assert answer(streamed, encoder) == expected
    assert set(loads) == {0, 1}
    for block in source.spec.blocks_of(resident):
        swap_linears(block, parse_scheme("w4a4_channel"), scale_dtype=torch.float32)
    with early_exit(resident, source.spec, 1):
        assert answer(resident, encoder) != expected  # the quantized linears did run


def test_the_model_is_whole_again_after_an_error_and_wrong_blocks_are_refused():
    model = tiny_model()
    spec, blocks = block_spec(model.config), list(model.model.layers)
    with pytest.raises(RuntimeError, match="stop"), early_exit(model, spec, 0):
        assert len(model.model.layers) == 1
        raise RuntimeError("stop")
    assert list(model.model.layers) == blocks
    for block in (-1, 2):
        with pytest.raises(ValueError, match="blocks 0 to 1"), early_exit(model, spec, block):
            pass


@pytest.mark.parametrize(
    ("blocks", "exits"),
    [
        (1, [0]),
        (4, [0, 1, 2, 3]),
        (12, list(range(12))),
        (13, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]),
        (32, [1, 4, 7, 9, 12, 15, 17, 20, 23, 25, 28, 31]),
    ],
)
def test_exits_are_all_blocks_or_an_even_spread_with_the_last(blocks, exits):
    assert choose_exits(blocks, 12) == exits


def test_rates_count_refusals_of_both_kinds_and_no_broken_answer(monkeypatch, encoder):
    model = tiny_model(num_hidden_layers=2)
    refusal, plain, broken = "I cannot help with that.", "Basil likes light and water.", "I cannot help help help " * 20
    said = {1: [refusal, broken, plain, plain], 2: [refusal, refusal, refusal, plain]}
    asked = []

    def respond(running, _encoder, prompts, **options):
        asked.append((list(prompts), options["max_new_tokens"], options["batch_size"], options["progress"]))
        return said[len(running.model.layers)]

    monkeypatch.setattr(module, "generate_answers", respond)
    rates = semantic_separability(
        model,
        encoder,
        ["m1", "m2"],
        ["b1", "b2"],
        block_spec(model.config),
        exits=[0, 1],
        max_new_tokens=7,
        batch_size=5,
        progress="aligned",
    )
    assert asked == [(["m1", "m2", "b1", "b2"], 7, 5, f"aligned, from block {block}") for block in (0, 1)]
    counts = {"n_malicious": 2, "n_benign": 2}
    assert asdict(rates[0]) == {"refused_malicious": 0.5, "refused_benign": 0.0, "degenerate": 0.25, **counts}
    assert asdict(rates[1]) == {"refused_malicious": 1.0, "refused_benign": 0.5, "degenerate": 0.0, **counts}


def test_the_last_exit_is_the_whole_models_answers(encoder, monkeypatch):
    model = tiny_model(vocab_size=TOKENIZER_VOCAB)
    whole = generate_answers(model, encoder, PROMPTS, max_new_tokens=8, batch_size=4)
    judged = []
    monkeypatch.setattr(module, "is_degenerate", lambda text: judged.append(text) or False)
    spec = block_spec(model.config)
    semantic_separability(
        model,
        encoder,
        PROMPTS[:2],
        PROMPTS[2:],
        spec,
        exits=[len(model.model.layers) - 1],
        max_new_tokens=8,
        batch_size=4,
    )
    assert judged == whole


def test_both_kinds_of_prompts_are_needed(encoder):
    model = tiny_model()
    for malicious, benign in (([], ["b"]), (["m"], [])):
        with pytest.raises(DataError, match="none of one kind"):
            semantic_separability(
                model, encoder, malicious, benign, block_spec(model.config), exits=[0], max_new_tokens=1, batch_size=1
            )
