"""Decoder blocks with fewer launches: a decoding step beside its products is as long as its kernels are many.

The modules stay Hugging Face's own, with another `forward`:

- a block lets the norm behind each residual sum make that sum, the norm of the next block included;
- attention over a cache of fixed size turns, stores and attends in one op, for a step and for a prompt; everything else
  (growing caches, additive masks, torch.compile, which fuses by itself) goes the way of the class.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qrealign.arch import BlockSpec
from qrealign.deploy.blocks import rms_norm_eps
from qrealign.deploy.cache import STATIC_LAYERS, static_place
from qrealign.deploy.decoder import LENGTH_DEPENDENT_ROPE
from qrealign.deploy.layers import MovedNorm, SummingNorm
from qrealign.models.placement import replace_module
from qrealign_kernels import CachePlace, TokenStates, decode_attention, prompt_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NORMS = ("input_layernorm", "post_attention_layernorm")


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
    rotary: Any = model.base_model.rotary_emb
    if rotary.rope_type not in LENGTH_DEPENDENT_ROPE:
        rotary.forward = MethodType(_angles, rotary)
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
    key_heads = attention.k_proj.out_features // attention.head_dim
    no_keys = hidden_states.new_empty(len(hidden_states), key_heads, 0, attention.head_dim)
    place = _place(attention.layer_idx, hidden_states, attention_mask, past_key_values, no_keys)
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
    out = _attend_to(place, attention, hidden_states, position_embeddings, attention_mask)
    return attention.o_proj(out.flatten(2)), None


def _attend_to(
    place: CachePlace, attention: Any, hidden_states: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Store the keys and values of `[B, T, H]` and attend: `[B, T, heads, head size]`."""
    batch, tokens = hidden_states.shape[:2]
    heads = (
        project(hidden_states).unflatten(-1, (-1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    states = TokenStates(*heads, *(turn.expand(batch, -1, -1) for turn in turns))
    mask = None if mask is None else mask[:, 0].expand(batch, -1, -1)
    if tokens > 1 or place.rows is not None:
        return prompt_attention(states, place, mask, scaling=attention.scaling)
    if place.cells.dim() > 1:
        place = place._replace(cells=place.cells[:, 0])
    states = TokenStates(*(tensor[:, 0] for tensor in states))
    mask = None if mask is None else mask[:, 0]
    return decode_attention(states, place, mask, scaling=attention.scaling)[:, None]


def _place(layer: int, hidden_states: Tensor, mask: Tensor | None, cache: Any, no_keys: Tensor) -> CachePlace | None:
    """Return where tokens go, None where the ops do not know the cache or the mask; `no_keys` is of no token."""
    if torch.compiler.is_compiling() or cache is None or layer >= len(cache.layers):
        return None
    place = _place_in(cache.layers[layer], no_keys)
    if place is None or (place.key_scale is None and place.keys.dtype != hidden_states.dtype):
        return None
    wanted = (1, hidden_states.shape[1], place.length)
    return place if mask is None or (mask.dtype == torch.bool and mask.shape[1:] == wanted) else None


def _place_in(layer: Any, no_keys: Tensor) -> CachePlace | None:
    """Return a cache layer's place: a layer says it by itself, or it is Hugging Face's static one or ours."""
    if not hasattr(layer, "cache_place") and type(layer) not in STATIC_LAYERS:
        return None
    if not layer.is_initialized:
        layer.lazy_initialization(no_keys, no_keys)
    place: CachePlace | None = layer.cache_place() if hasattr(layer, "cache_place") else static_place(layer)
    return place


def _angles(rotary: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what the rotary embedding's class does, without the library's product, which would keep a workspace."""
    angles = position_ids[..., None].float() * rotary.inv_freq.float()
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = ((turn * rotary.attention_scaling).to(x.dtype) for turn in (angles.cos(), angles.sin()))
    return cos, sin
