"""The least that the optimizer's steps must compute and move, counted, and the time it takes at given rates.

Counted are the products of the blocks' linears, the output head, and the passes over the weights around them.
Attention, norms and activations are left out: under 3 % at 128 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.calibration.cases import Engine
from benchmarks.calibration.ceilings import Ceilings
from benchmarks.calibration.geometries import Geometry

Precision = Literal["int8", "bf16"]


@dataclass(frozen=True)
class Pass:
    """One kernel's worth of a step, for every weight: products with each token, and bytes moved a step."""

    name: str
    precision: Precision
    products: int
    weight_bytes: int


_ENCODE = Pass("bf16 weights read, int8 codes written", "int8", 0, 3)
_FORWARD = Pass("forward product, codes read", "int8", 1, 1)
_INPUT_GRADIENT = Pass("gradient of the input, codes read", "bf16", 1, 1)
# The edit's gradients need no weight gradient; the activations of a block are computed again in the backward pass.
# The block-wise parameters need the weight gradient, reduced in its own product beside the weight.
PASSES: dict[Engine, tuple[Pass, ...]] = {
    "endtoend": (_ENCODE, _FORWARD, _ENCODE, _FORWARD, _INPUT_GRADIENT),
    "blockwise": (
        _ENCODE,
        _FORWARD,
        _INPUT_GRADIENT,
        Pass("gradient of the weight, reduced; bf16 weights read", "bf16", 1, 2),
    ),
}
HEAD_PRODUCTS = 3  # the teacher's and the student's logits, and the gradient


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the steps of a run come to.

    Attributes:
        engine: which passes a step makes.
        weights: that a step passes over: of all blocks end-to-end, of one block-wise.
        steps: optimizer steps, of all blocks together.
        tokens: tokens of all steps together.
        head: weights of the output head, and `positions` of it that were read; 0 block-wise.
    """

    engine: Engine
    weights: int
    steps: int
    tokens: int
    head: int = 0
    positions: int = 0

    def flops(self) -> float:
        """Return all operations."""
        products = sum(part.products for part in PASSES[self.engine])
        return 2.0 * self.weights * self.tokens * products + self._head_flops()

    def bytes(self) -> float:
        """Return all bytes of weights and codes."""
        return float(self.weights) * self.steps * sum(part.weight_bytes for part in PASSES[self.engine])

    def seconds_at(self, rates: Ceilings) -> float:
        """Return the floor: every pass at the slower of its two rates, one after the other."""
        total = self._head_flops() / (rates.bf16 * 1e12)
        for part in PASSES[self.engine]:
            rate = rates.int8 if part.precision == "int8" else rates.bf16
            computing = 2.0 * self.weights * self.tokens * part.products / (rate * 1e12)
            moving = float(self.weights) * self.steps * part.weight_bytes / (rates.copy * 1e9)
            total += max(computing, moving)
        return total

    def _head_flops(self) -> float:
        return 2.0 * HEAD_PRODUCTS * self.head * self.positions


def count_work(geometry: Geometry, engine: Engine, *, steps: int, tokens: int, positions: int) -> Work:
    """Return the work of steps that a run has taken."""
    if engine == "blockwise":
        return Work(engine=engine, weights=geometry.block_weights, steps=steps, tokens=tokens)
    return Work(
        engine=engine,
        weights=geometry.block_weights * geometry.layers,
        steps=steps,
        tokens=tokens,
        head=geometry.head_weights,
        positions=positions,
    )
