"""What stands around the blocks in less memory: the head as codes, the embedding on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qrealign
from qrealign.deploy.layers import PackedLinear
from qrealign.deploy.outer import HostEmbedding, host_embedding, pack_head
from qrealign.errors import ConfigError, UnsupportedArchitectureError
from tests.helpers import random_batch, tiny_model
from tests.unit.deploy_helpers import deployed


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # the second one's head is its embedding
def test_a_packed_head_stays_close(tmp_path: Path, model_type: str) -> None:
    _, plain, folder = deployed(tmp_path, model_type, "w8a8")
    packed = qrealign.load_packed(folder, device="cpu", head_bits=8, embedding_on_host=True)
    input_ids, mask = random_batch()
    expected, found = (model(input_ids, attention_mask=mask).logits for model in (plain, packed))
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()
    assert type(packed.get_output_embeddings()) is PackedLinear
    assert type(packed.get_input_embeddings()) is type(plain.get_input_embeddings())  # a CPU's is on the host already


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    _, _, folder = deployed(tmp_path, "llama", "w8a8")
    with pytest.raises(ConfigError, match="4 bits"):
        qrealign.load_packed(folder, device="cpu", head_bits=4)


def test_what_is_no_linear_head_stays() -> None:
    model = tiny_model()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedArchitectureError, match="no linear head"):
        pack_head(model, 8)


def test_embeddings_that_cannot_move_are_refused() -> None:
    tied = tiny_model()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(UnsupportedArchitectureError, match="quantize the head too"):
        host_embedding(tied)
    other = tiny_model()
    other.model.embed_tokens = nn.Sequential(other.model.embed_tokens)
    with pytest.raises(UnsupportedArchitectureError, match="of its own kind"):
        host_embedding(other)


def test_an_embedding_on_the_host_is_no_part_of_the_model() -> None:
    table = torch.randn(7, 4)
    embedding = HostEmbedding(table)
    assert not list(embedding.parameters()) and not list(embedding.buffers())
    ids = torch.tensor([[6, 0]])
    assert torch.equal(embedding(ids), table[ids])
