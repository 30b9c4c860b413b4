"""Attention of one new token a sequence: every backend against the definition, and the definition against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import qrealign_kernels as kernels
from qrealign_kernels.reference_attention import decode_attention_ref

SHAPES = [
    pytest.param(batch, heads, kv_heads, length, size, id=f"B{batch}-H{heads}-{kv_heads}-S{length}-D{size}")
    for batch, heads, kv_heads, length, size in [
        (1, 4, 4, 300, 64),
        (3, 4, 2, 65, 40),
        (2, 20, 1, 130, 16),
        (1, 2, 2, 1, 128),
    ]
]


def inputs(batch: int, heads: int, kv_heads: int, length: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query, and key and value as a cache holds them: head by head, in memory position by position."""
    query = torch.randn(batch, heads, size).to(dtype)
    return [query, *(torch.randn(batch, length, kv_heads, size).to(dtype).transpose(1, 2) for _ in range(2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "size"), SHAPES)
def test_backends_agree(
    each_backend: str, batch: int, heads: int, kv_heads: int, length: int, size: int, dtype: torch.dtype
) -> None:
    query, key, value = inputs(batch, heads, kv_heads, length, size, dtype)
    mask = torch.arange(length) >= torch.arange(batch)[:, None]  # padding on the left
    mask &= torch.arange(length) < max(1, length - 20)  # and a cache that is not full
    for visible in (mask, None):
        found = kernels.decode_attention(query, key, value, visible, scaling=size**-0.5)
        truth = decode_attention_ref(query.double().float(), key.float(), value.float(), visible, size**-0.5)
        bound = 1e-5 if dtype == torch.float32 else 2e-3
        assert found.dtype == dtype and found.shape == query.shape
        assert float((found.float() - truth).abs().max()) < bound


def test_what_nothing_sees_is_zero(each_backend: str) -> None:
    query, key, value = inputs(2, 2, 2, 40, 16, torch.float32)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[1, 39] = True
    found = kernels.decode_attention(query, key, value, mask, scaling=1.0)
    assert not found[0].any() and torch.allclose(found[1], value[1, :, 39])


def test_hidden_positions_are_not_read(each_backend: str) -> None:
    query, key, value = inputs(1, 2, 2, 200, 16, torch.float32)
    mask = (torch.arange(200) < 70)[None]
    before = kernels.decode_attention(query, key, value, mask, scaling=0.3)
    key[:, :, 130:], value[:, :, 130:] = torch.nan, torch.nan
    if each_backend == "triton":  # torch multiplies what is hidden by zero
        assert torch.equal(kernels.decode_attention(query, key, value, mask, scaling=0.3), before)


def test_definition_is_torchs() -> None:
    query, key, value = inputs(2, 6, 3, 50, 32, torch.float32)
    mask = torch.rand(2, 50) > 0.3
    theirs = F.scaled_dot_product_attention(
        query[:, :, None], key, value, attn_mask=mask[:, None, None], scale=0.2, enable_gqa=True
    )
    assert torch.allclose(decode_attention_ref(query, key, value, mask, 0.2), theirs[:, :, 0], atol=1e-5)


def test_bad_arguments_are_named() -> None:
    query, key, value = inputs(1, 4, 2, 8, 16, torch.float32)
    with pytest.raises(ValueError, match=r"H / n"):
        kernels.decode_attention(query[:, :3], key, value, scaling=1.0)
    with pytest.raises(ValueError, match="disagree"):
        kernels.decode_attention(query[..., :8], key, value, scaling=1.0)
    with pytest.raises(ValueError, match="mask must be"):
        kernels.decode_attention(query, key, value, torch.ones(1, 8), scaling=1.0)
    with pytest.raises(TypeError, match="one floating point dtype"):
        kernels.decode_attention(query, key.half(), value, scaling=1.0)


def test_it_is_one_operator_when_compiled() -> None:
    query, key, value = inputs(1, 4, 2, 8, 16, torch.float32)
    mask = torch.ones(1, 8, dtype=torch.bool)
    torch.library.opcheck(torch.ops.qrealign.decode_attention, (query, key, value, mask, 0.5))
