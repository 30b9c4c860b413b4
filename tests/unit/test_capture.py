"""Captured block inputs reproduce the model's own forward."""

from __future__ import annotations

import pytest
import torch

from qrealign.arch import block_spec
from qrealign.data.capture import capture_block_inputs, run_block, select_rows
from qrealign.errors import UnsupportedArchitectureError
from tests.helpers import MODEL_TYPES, random_batch, tiny_model


def block_outputs(model, input_ids, attention_mask):
    """Return every block's output in the model's own forward."""
    outputs = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in model.get_submodule(block_spec(model.config, model).blocks)
    ]
    model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "gpt_neox"])
@torch.no_grad()
def test_chained_blocks_equal_the_models_own_forward(model_type, padding):
    model = tiny_model(model_type)
    input_ids, mask = random_batch(padding=padding)
    expected = block_outputs(model, input_ids, mask)
    hidden, kwargs = capture_block_inputs(model, input_ids, mask)
    blocks = model.get_submodule(block_spec(model.config, model).blocks)
    assert len(kwargs) == len(blocks)
    for block, arguments, output in zip(blocks, kwargs, expected, strict=True):
        assert not arguments.get("use_cache") and arguments.get("past_key_values") is None
        hidden = run_block(block, hidden, arguments)
        assert torch.equal(hidden, output)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_arguments_follow_each_layers_attention_type(model_type):
    model = tiny_model(model_type)
    _, kwargs = capture_block_inputs(model, *random_batch(length=14))
    sliding, full, again = (arguments["attention_mask"] for arguments in kwargs)
    assert torch.equal(sliding, again) and not (full is not None and torch.equal(sliding, full))
    if model_type == "gemma3_text":
        assert not torch.equal(kwargs[0]["position_embeddings"][0], kwargs[1]["position_embeddings"][0])


def test_blocks_are_not_needed_and_are_left_as_they_were():
    model = tiny_model()
    input_ids, mask = random_batch()
    expected = model(input_ids, attention_mask=mask).logits
    blocks = model.get_submodule("model.layers")
    state = {name: tensor.clone() for name, tensor in blocks.state_dict().items()}
    hidden, _ = capture_block_inputs(model, input_ids, mask)
    assert torch.equal(hidden, model.get_input_embeddings()(input_ids))
    assert torch.equal(model(input_ids, attention_mask=mask).logits, expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in blocks.state_dict().items())
    assert torch.equal(capture_block_inputs(model_on_meta(model), input_ids, mask)[0], hidden)


def model_on_meta(model):
    """Move the blocks to the meta device."""
    model.get_submodule("model.layers").to("meta")
    return model


@torch.no_grad()
def test_select_rows_equals_a_smaller_batch():
    model = tiny_model("gemma2")
    input_ids, mask = random_batch(batch=4, padding="right")
    hidden, kwargs = capture_block_inputs(model, input_ids, mask)
    block = model.get_submodule("model.layers")[0]
    rows = torch.tensor([2, 0])
    whole = run_block(block, hidden, kwargs[0])[rows]
    part = run_block(block, hidden[rows], select_rows(kwargs[0], rows, 4))
    torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-5)


def test_errors_of_the_model_come_through():
    model = tiny_model()
    with pytest.raises(IndexError):
        capture_block_inputs(model, torch.full((1, 4), 10_000))
    assert "forward" not in model.get_submodule("model.layers")[0].__dict__


def test_model_that_does_not_chain_blocks_is_refused():
    model = tiny_model()
    model.get_submodule("model.layers")[0].register_forward_hook(lambda *_: torch.zeros(3, 4))
    with pytest.raises(UnsupportedArchitectureError, match="do not pass hidden states"):
        capture_block_inputs(model, *random_batch())
