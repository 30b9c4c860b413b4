"""Decoder blocks with fewer launches: a decoding step beside its products is as long as its kernels are many.

The modules stay Hugging Face's own, with another `forward`:

- a block lets the norm behind each residual sum make that sum, the norm of the next block included;
- attention over one new token a row and a cache of fixed size turns, stores and attends in one op; everything else
  (prompts, growing caches, torch.compile, which fuses by itself) goes the way of the class.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from qrealign.arch import BlockSpec
from qrealign.deploy.blocks import rms_norm_eps
from qrealign.deploy.layers import MovedNorm, SummingNorm
from qrealign.models.placement import replace_module
from qrealign_kernels import decode_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NORMS = ("input_layernorm", "post_attention_layernorm")


class StepCells(NamedTuple):
    """Where one new token a row goes in a layer of a cache, and what it may read.

    keys, values: `[B or more, heads, cells, head size]`. cells: `[B]` or `[1]` int64. length: cells that may be read.
    advance: whether the layer counts its tokens in `cells` itself.
    """

    keys: Tensor
    values: Tensor
    cells: Tensor
    length: int
    advance: bool


def fuse_steps(model: PreTrainedModel, spec: BlockSpec) -> None:
    """Change the blocks of a loaded model where their architecture is known to have no other parts."""
    if not spec.plain_steps:
        return
    blocks = spec.blocks_of(model)
    for block in blocks:
        block.self_attn.forward = MethodType(_attend, block.self_attn)
        for name in _NORMS:
            _replace_norm(block, name, spec)
    _replace_norm(model, spec.final_norm, spec)
    following = [*(block.input_layernorm for block in blocks[1:]), model.get_submodule(spec.final_norm)]
    for block, norm in zip(blocks, following, strict=True):
        if all(isinstance(one, (SummingNorm, MovedNorm)) for one in (block.post_attention_layernorm, norm)):
            block.following_norm = norm
            block.forward = MethodType(_run_block, block)


def _replace_norm(root: nn.Module, name: str, spec: BlockSpec) -> None:
    norm = root.get_submodule(name)
    if (eps := rms_norm_eps(norm)) is not None:
        weight = norm.get_parameter("weight")
        replace_module(root, name, SummingNorm(weight, eps, offset=float(spec.norm_weight_offset)))


def _run_block(block: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    """Compute what the block's class does."""
    attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **options)
    hidden_states = block.post_attention_layernorm.add(hidden_states, attended)
    total: Tensor = block.following_norm.add(hidden_states, block.mlp(block.post_attention_layernorm(hidden_states)))
    return total


def _attend(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute what the attention's class does."""
    place = _place(attention.layer_idx, hidden_states, attention_mask, past_key_values)
    if place is None:
        found: tuple[Tensor, Tensor | None] = type(attention).forward(
            attention,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **options,
        )
        return found
    batch = len(hidden_states)
    query, key, value = (
        project(hidden_states)[:, 0].unflatten(-1, (-1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = (turn[:, 0].expand(batch, -1) for turn in position_embeddings)
    mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(batch, -1)
    out = decode_attention(
        query,
        key,
        value,
        cos,
        sin,
        place.keys,
        place.values,
        place.cells,
        mask,
        length=place.length,
        scaling=attention.scaling,
        advance=place.advance,
    )
    return attention.o_proj(out.reshape(batch, 1, -1)), None


def _place(layer: int, hidden_states: Tensor, mask: Tensor | None, cache: Any) -> StepCells | None:
    """Return where a step's token goes, None where this is no step or the op does not know the cache or the mask."""
    if torch.compiler.is_compiling() or hidden_states.shape[1] != 1 or cache is None:
        return None
    place = _cells_of(cache.layers[layer]) if layer < len(cache.layers) else None
    if place is None or place.keys.dtype != hidden_states.dtype:
        return None
    fits = mask is None or (mask.dtype == torch.bool and mask.shape[1:] == (1, 1, place.length))
    return place if fits else None


def _cells_of(layer: Any) -> StepCells | None:
    """Return a cache layer's place for a step: Hugging Face's static one knows it, or a layer says it by itself."""
    if hasattr(layer, "step_cells"):
        found: StepCells | None = layer.step_cells()
        return found
    if type(layer) is not StaticLayer or not layer.is_initialized:
        return None
    assert layer.keys is not None and layer.values is not None
    return StepCells(layer.keys, layer.values, layer.cumulative_length.view(1), layer.max_cache_len, True)
