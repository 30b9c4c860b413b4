"""A streamed model computes what a resident one does, and holds one block at a time."""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qrealign.arch import block_spec
from qrealign.config import parse_scheme
from qrealign.data.capture import capture_block_inputs
from qrealign.models.source import open_model
from qrealign.models.streaming import stream_blocks
from qrealign.pipeline.student import enable_checkpointing
from qrealign.quant.clipping import LearnableWeightClipping
from qrealign.quant.fake_quant import fake_quant_linears, freeze_linears, swap_linears
from tests.helpers import random_batch, tiny_adapter, tiny_checkpoint


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "opt", "mixtral"])
def source(request, tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return open_model(str(folder))


@pytest.fixture(scope="module")
def merged_source(tmp_path_factory):
    """A Llama with an adapter."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)
    return open_model(str(folder), adapter=str(tiny_adapter(tmp_path_factory.mktemp("lora"), folder)))


def streamed_skeleton(source):
    """Return a skeleton with its outer tensors loaded."""
    model = source.skeleton()
    source.load_outer(model, "cpu")
    return model


def is_empty(source, model):
    """Tell whether all block parameters are on the meta device."""
    return all(parameter.is_meta for parameter in model.get_submodule(source.spec.blocks).parameters())


class CountingLoader:
    """Loads blocks, counts the loads and how many blocks are held at once."""

    def __init__(self, source):
        self.source = source
        self.loads = []
        self.most_held = 0

    def __call__(self, model, index):
        self.source.load_block(model, index, "cpu")
        self.loads.append(index)
        blocks = model.get_submodule(self.source.spec.blocks)
        self.most_held = max(self.most_held, sum(not any(p.is_meta for p in block.parameters()) for block in blocks))


@torch.no_grad()
def test_forward_equals_the_resident_model_with_one_block_at_a_time(source):
    input_ids, mask = random_batch(padding="right")
    model, loader = streamed_skeleton(source), CountingLoader(source)
    with stream_blocks(model, source, "cpu", loader=loader):
        assert is_empty(source, model)
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        assert is_empty(source, model)
    assert torch.equal(logits, source.load_model("cpu")(input_ids=input_ids, attention_mask=mask).logits)
    assert loader.loads == list(range(source.num_blocks)) and loader.most_held == 1


@torch.no_grad()
def test_generation_with_a_cache(merged_source):
    input_ids, mask = random_batch(padding="left")
    model = streamed_skeleton(merged_source)
    with stream_blocks(model, merged_source, "cpu"):
        settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "use_cache": True}
        answer = model.generate(input_ids, **settings)
    assert torch.equal(answer, merged_source.load_model("cpu").generate(input_ids, **settings))


def embedding_gradient(model, input_ids, run=None):
    """Return the gradient of a loss with respect to the input embeddings."""
    embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_(True)
    (run or model)(inputs_embeds=embeddings, use_cache=False).logits.square().mean().backward()
    return embeddings.grad


def test_checkpointing_is_enabled_without_a_warning_by_either_name(source):
    model, asked = streamed_skeleton(source), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_checkpointing(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    enable_checkpointing(SimpleNamespace(gradient_checkpointing_enable=asked.append), use_reentrant=True)
    assert asked == [{"use_reentrant": True, "preserve_rng_state": False}]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("enable_first", [False, True])
def test_gradient_checkpointing_loads_again_for_the_backward_pass(source, use_reentrant, enable_first):
    input_ids, _ = random_batch()
    expected = embedding_gradient(source.load_model("cpu"), input_ids)
    model, loader = streamed_skeleton(source), CountingLoader(source)
    enable = partial(enable_checkpointing, model, use_reentrant=use_reentrant)
    if enable_first:
        enable()
    with stream_blocks(model, source, "cpu", loader=loader):
        if not enable_first:
            enable()
        for block in source.spec.blocks_of(model):  # checkpointing asks for training mode; dropout stays off
            block.training, block.dropout = True, 0.0
        gradient = embedding_gradient(model, input_ids)
        assert is_empty(source, model)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-5)
    order = list(range(source.num_blocks))
    assert loader.loads == order + order[::-1] and loader.most_held == 1


def test_plain_torch_checkpoint_of_a_block(merged_source):
    input_ids, _ = random_batch()
    model, loader = streamed_skeleton(merged_source), CountingLoader(merged_source)
    hidden, kwargs = capture_block_inputs(model, input_ids)
    hidden.requires_grad_(True)
    with stream_blocks(model, merged_source, "cpu", loader=loader):
        out = hidden
        for block, arguments in zip(model.model.layers, kwargs, strict=True):
            out = checkpoint(partial(block, **arguments), out, use_reentrant=False)
        out.sum().backward()
    assert loader.loads == [0, 1, 2, 2, 1, 0] and loader.most_held == 1
    assert hidden.grad.abs().sum() > 0


def test_learned_parameters_of_swapped_linears_stay_and_get_gradients(merged_source):
    scheme = parse_scheme("w8a8")
    model = streamed_skeleton(merged_source)
    layers = {}
    for index, block in enumerate(model.model.layers):
        for name, layer in swap_linears(block, scheme, scale_dtype=torch.float32).items():
            layer.clipping = LearnableWeightClipping((layer.out_features, layer.in_features), scheme.weights)
            layers[f"{index}.{name}"] = layer
    enable_checkpointing(model)
    model.train()
    with stream_blocks(model, merged_source, "cpu"):
        embedding_gradient(model, random_batch()[0])
    gradients = [parameter.grad for layer in layers.values() for parameter in layer.clipping.parameters()]
    assert (
        all(gradient is not None for gradient in gradients) and sum(gradient.abs().sum() for gradient in gradients) > 0
    )
    assert all(layer.weight.is_meta for layer in layers.values())


@torch.no_grad()
def test_a_loader_may_replace_submodules(merged_source):
    scheme = parse_scheme("w8a8")

    def load_quantized(model, index):
        block = merged_source.load_block(model, index, "cpu")
        swap_linears(block, scheme, scale_dtype=torch.float32)
        freeze_linears(block)

    input_ids, mask = random_batch(padding="right")
    resident = merged_source.load_model("cpu")
    for index in range(3):
        load_quantized(resident, index)
    model = streamed_skeleton(merged_source)
    with stream_blocks(model, merged_source, "cpu", loader=load_quantized):
        for _ in range(2):
            logits = model(input_ids=input_ids, attention_mask=mask).logits
    assert torch.equal(logits, resident(input_ids=input_ids, attention_mask=mask).logits)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear) and not fake_quant_linears(model)


def test_weights_go_when_a_block_fails_and_the_handle_ends_cleanly(merged_source):
    model = streamed_skeleton(merged_source)
    handle = stream_blocks(model, merged_source, "cpu")
    with pytest.raises(RuntimeError):
        model.model.layers[0](torch.zeros(1, 2, 3), position_embeddings=None)
    assert is_empty(merged_source, model)
    handle.remove()
    handle.remove()
    assert "forward" not in model.model.layers[0].__dict__
    assert block_spec(model.config).blocks == merged_source.spec.blocks
