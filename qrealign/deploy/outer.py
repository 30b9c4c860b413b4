"""What stands around the blocks, in less device memory: the embedding on the host, the head as codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qrealign.deploy import HEAD_BITS
from qrealign.deploy.layers import PackedLinear
from qrealign.errors import ConfigError, UnsupportedArchitectureError
from qrealign.models.placement import replace_module
from qrealign_kernels import gather_rows, quantize_weight, repack_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 4096  # of a head that are quantized at a time: float32 copies of all would be its size several times


class HostEmbedding(nn.Module):
    """An embedding whose table stays in the host's memory; a GPU's kernel reads the rows of a step from there.

    The table is no parameter: it neither counts nor moves with the model.

    Args:
        table: `[V, H]` floating point, pinned.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.num_embeddings, self.embedding_dim = table.shape

    def forward(self, input_ids: Tensor) -> Tensor:
        return gather_rows(self.table, input_ids)


def check_head_bits(bits: int | None) -> None:
    """Refuse a width that no head has.

    Raises:
        ConfigError: it is another.
    """
    if bits is not None and bits not in HEAD_BITS:
        raise ConfigError(f"a head has codes of 8 bits, or stays in 16, but {bits} bits were asked for")


def pack_head(model: PreTrainedModel, bits: int) -> None:
    """Replace the head by a product with its codes, one scale a row; activations stay as they are.

    Raises:
        UnsupportedArchitectureError: the model's head is no linear layer.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UnsupportedArchitectureError(f"model type {model.config.model_type!r} has no linear head to quantize")
    parts = [quantize_weight(rows, num_bits=bits)[:2] for rows in head.weight.detach().split(_ROWS)]
    codes, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    weight = repack_weight(codes, scale, None, num_bits=bits, activation_bits=None)
    name = next(name for name, module in model.named_modules() if module is head)
    replace_module(model, name, PackedLinear(weight, None if head.bias is None else head.bias.detach()))


def host_embedding(model: PreTrainedModel) -> None:
    """Move the table of a model on a GPU into the host's pinned memory.

    Raises:
        UnsupportedArchitectureError: the embedding is more than a table, or the head shares it.
    """
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding:
        raise UnsupportedArchitectureError(
            f"model type {model.config.model_type!r} has an embedding of its own kind, which stays on the device"
        )
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is embedding.weight:
        raise UnsupportedArchitectureError(
            "the head shares the embedding's table, so that moving it saves nothing: quantize the head too"
        )
    name = next(name for name, module in model.named_modules() if module is embedding)
    replace_module(model, name, HostEmbedding(embedding.weight.detach().cpu().pin_memory()))
