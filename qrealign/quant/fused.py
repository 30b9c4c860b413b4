"""Parts of a block that are computed in one pass while it is trained: norms and gated MLPs that hand the linears behind
them quantized inputs, and the turning of queries and keys by their positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrealign.arch import BlockSpec
from qrealign.quant.coded import coded_input
from qrealign.quant.fake_quant import FakeQuantLinear, fake_quant_linears
from qrealign_kernels import (
    rms_norm_fake_quant,
    rms_norm_gradients,
    rms_norm_quantize,
    rotate_heads,
    silu_mul_fake_quant,
    silu_mul_gradients,
    silu_mul_quantize,
)
from qrealign_kernels.reference_calibration import rotate_heads_ref

_TRIAL_TOKENS = 2
_ROTATION = "apply_rotary_pos_emb"

Pair = tuple[Tensor, Tensor]
Rotation = Callable[..., Pair]


@contextmanager
def fused_inputs(block: nn.Module, spec: BlockSpec) -> Iterator[list[str]]:
    """Let every norm and gate of `block` that is known to feed quantized linears alone quantize its output itself.

    Those are norms that a fold site names, where the op computes what their class does, and MLPs made of three linears
    and a SiLU. Yields their names; at the end they compute as before. What the block computes changes by no more than
    the order of a sum.
    """
    forwards = {**_norms(block, spec), **_gates(block)}
    for name, forward in forwards.items():
        block.get_submodule(name).forward = forward
    try:
        yield [*forwards]
    finally:
        for name in forwards:
            del block.get_submodule(name).forward


def _bits(layer: nn.Module) -> int | None:
    """Return the bits that a linear's input is rounded to, None where it is not."""
    if not isinstance(layer, FakeQuantLinear) or layer.scheme.activations is None or not layer.quantize:
        return None
    return layer.scheme.activations.num_bits


def _norms(block: nn.Module, spec: BlockSpec) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the new forwards of norms, by name."""
    forwards: dict[str, Callable[[Tensor], Tensor]] = {}
    present = dict(block.named_modules())
    for site in spec.sites:
        norm = present.get(site.producer)
        if not site.name.startswith("norm") or norm is None or site.consumers[0] not in present:
            continue
        reader = block.get_submodule(site.consumers[0])
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if (bits := _bits(reader)) is None or not isinstance(eps, float) or not _is_rms_norm(norm, eps, spec):
            continue
        assert isinstance(reader, FakeQuantLinear)
        forwards[site.producer] = _norm_forward(norm, eps, spec.norm_weight_offset, bits, reader)
    return forwards


def _norm_forward(
    norm: nn.Module, eps: float, offset: int, bits: int, reader: FakeQuantLinear
) -> Callable[[Tensor], Tensor]:
    """Return a norm's forward that quantizes what `reader`, and whoever shares its inputs, will read."""

    added = float(offset)
    quantize = partial(rms_norm_quantize, eps=eps, offset=added, num_bits=bits)
    gradients = partial(rms_norm_gradients, eps=eps, offset=added)

    def forward(x: Tensor) -> Tensor:
        weight: Tensor = norm.weight  # type: ignore[assignment]
        if reader.is_coded():
            return coded_input(quantize, gradients, (x, weight), bits, reader.inputs)
        return reader.inputs.provide(rms_norm_fake_quant(x, weight, eps, offset=added, num_bits=bits), bits)

    return forward


@torch.no_grad()
def _is_rms_norm(norm: nn.Module, eps: float, spec: BlockSpec) -> bool:
    """Whether a module computes an RMS norm as the op does, found out by a trial."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or getattr(norm, "bias", None) is not None:
        return False
    x = torch.linspace(-2, 3, _TRIAL_TOKENS * weight.numel(), device=weight.device).reshape(_TRIAL_TOKENS, -1)
    wide = weight.float() + spec.norm_weight_offset
    expected = F.rms_norm(x, weight.shape, wide, eps)
    return torch.allclose(norm(x).float(), expected, rtol=2e-2, atol=1e-2)


def _gates(block: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the new forwards of gated MLPs, by name."""
    forwards = {}
    for name, layer in fake_quant_linears(block).items():
        parent, _, leaf = name.rpartition(".")
        if leaf != "down_proj" or (bits := _bits(layer)) is None:
            continue
        mlp = block.get_submodule(parent)
        parts = dict(mlp.named_children())
        if parts.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"} and _is_silu(parts["act_fn"]):
            forwards[parent] = _gate_forward(parts, bits, layer)
    return forwards


def _is_silu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _gate_forward(parts: dict[str, nn.Module], bits: int, down: FakeQuantLinear) -> Callable[[Tensor], Tensor]:
    """Return a gated MLP's forward that quantizes the gated values for its last linear."""

    quantize = partial(silu_mul_quantize, num_bits=bits)

    def forward(x: Tensor) -> Tensor:
        gate, up = parts["gate_proj"](x), parts["up_proj"](x)
        if down.is_coded():
            return down(coded_input(quantize, silu_mul_gradients, (gate, up), bits, down.inputs))
        return down(down.inputs.provide(silu_mul_fake_quant(gate, up, num_bits=bits), bits))

    return forward


@contextmanager
def fused_rotation(block: nn.Module) -> Iterator[bool]:
    """Let the models that are built as `block` is turn their queries and keys in one pass, with the same results.

    Where the block's own module has the function that Hugging Face's models share, and a trial finds that it computes
    what the op computes. Yields whether it has; at the end it is what it was.
    """
    module: Any = inspect.getmodule(type(block))
    own: Any = getattr(module, _ROTATION, None)
    fits = own is not None and _is_rotation(own)
    if fits:
        setattr(module, _ROTATION, partial(_rotate, own))
    try:
        yield fits
    finally:
        if fits:
            setattr(module, _ROTATION, own)


def _rotate(own: Rotation, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Pair:
    """Compute what `own` computes; by itself where it is asked for anything else than turning whole heads."""
    usual = not rest and not named and q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
    if not usual or {k.dtype, cos.dtype, sin.dtype} != {q.dtype}:
        return own(q, k, cos, sin, *rest, **named)
    return rotate_heads(q, cos, sin), rotate_heads(k, cos, sin)


@torch.no_grad()
def _is_rotation(own: Rotation) -> bool:
    """Whether a function turns heads as the op does, found out by a trial."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator) for shape in ((1, 2, 3, 8), (1, 1, 3, 8), *[(1, 3, 8)] * 2)
    )
    try:
        found = own(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # a function of the same name with another purpose
        return False
    wanted = (rotate_heads_ref(q, cos, sin), rotate_heads_ref(k, cos, sin))
    return len(found) == 2 and all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
