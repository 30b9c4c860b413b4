"""Pure-PyTorch definition of every op, on any device: the truth that kernels are measured against.

`*_ref` functions are the definitions, differentiable by torch's own autograd. `*_rows` functions are the same maths on
`[R, C]` rows (a row is one scale group of the weight, or one token), written to touch memory as few times as eager
PyTorch can; `autograd.py` calls them where no kernel is chosen, and the tests hold both against each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# 2**-24 is the smallest positive float16, so every storage dtype holds it exactly.
MIN_SCALE = 2.0**-24
# The checkpoint format's package puts this in the place of a zero activation scale; equality with it needs the same
# value.
ZERO_SCALE_REPLACEMENT = torch.finfo(torch.float32).eps


class WeightGrid(NamedTuple):
    """Grid of each group; every field is `[R, 1]` float32 with R = N * G, `zero_point` is None for symmetric grids."""

    minimum: Tensor
    maximum: Tensor
    low: Tensor
    high: Tensor
    raw_scale: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def of(cls, block: Tensor, *, symmetric: bool) -> WeightGrid:
        """Name the fields of a block `[7, R, 1]`, the form in which backends hand the grid on."""
        minimum, maximum, low, high, raw_scale, scale, zero_point = block
        return cls(minimum, maximum, low, high, raw_scale, scale, None if symmetric else zero_point)

    def to_block(self) -> Tensor:
        """Return the fields as one block `[7, R, 1]`."""
        return torch.stack([*self[:6], torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point])


class GradientSums(NamedTuple):
    """Sums over each row, `[R, 1]` float32: gradient of entries below and above the bounds, and of the scale."""

    below: Tensor
    above: Tensor
    scale: Tensor


def code_range(num_bits: int) -> tuple[int, int]:
    """Return the ends (qmin, qmax) of signed `num_bits` codes."""
    return -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1


def _divide(x: Tensor, number: float) -> Tensor:
    """Return `x / number`, rounded once on every device: on a GPU, torch multiplies by a Python number's reciprocal."""
    return x / x.new_full((), number)


class _StraightThrough(torch.autograd.Function):
    """Takes its value from one tensor and gives its gradient to another."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, surrogate: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def weight_grid(
    rows: Tensor,
    low_share: Tensor | None,
    high_share: Tensor | None,
    *,
    num_bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> WeightGrid:
    """Return the grid of each row: bounds, scale and zero point.

    Args:
        rows: `[R, C]` floating point.
        low_share: `[R, 1]` float32 in (0, 1], kept share of the row's minimum; None keeps all of it.
        high_share: the same for the maximum.
        num_bits: 2 to 8.
        symmetric: no zero point if true.
        scale_dtype: the scale is rounded to it.
    """
    # Not aminmax, which is ten times slower on a CPU than both of these together.
    minimum = rows.amin(dim=-1, keepdim=True).float().clamp(max=0)
    maximum = rows.amax(dim=-1, keepdim=True).float().clamp(min=0)
    low = minimum.detach() if low_share is None else minimum * low_share
    high = maximum.detach() if high_share is None else maximum * high_share
    qmin, qmax = code_range(num_bits)
    raw_scale = (
        torch.maximum(_divide(high, qmax), _divide(low, qmin)) if symmetric else _divide(high - low, qmax - qmin)
    )
    bounded = raw_scale.clamp(min=MIN_SCALE)
    scale = _StraightThrough.apply(bounded, bounded.to(scale_dtype).float())
    zero_point = None if symmetric else torch.round(qmin - low / scale).clamp(qmin, qmax).detach()
    return WeightGrid(minimum, maximum, low, high, raw_scale, scale, zero_point)


def _to_rows(tensor: Tensor, group_size: int | None) -> Tensor:
    """View `[N, K]` as `[N * G, group_size]`."""
    return tensor.reshape(-1, group_size or tensor.shape[-1])


def kept_share(logit: Tensor | None) -> Tensor | None:
    """Return the kept share of a bound as `[R, 1]` float32, from its `[N, G]` logit."""
    return None if logit is None else torch.sigmoid(logit.float()).reshape(-1, 1)


def fake_quant_weight_ref(
    weight: Tensor,
    low_logit: Tensor | None = None,
    high_logit: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Round a weight to its grid and back; the definition of value and gradients.

    Per group, with s = sigmoid: `low = min(w, 0) * s(low_logit)`, `high = max(w, 0) * s(high_logit)` (a logit that is
    None keeps the whole side), `scale = max(high / qmax, low / qmin)` or, with a zero point, `(high - low) / (qmax -
    qmin)`, at least `MIN_SCALE`, rounded to `scale_dtype`. Entries beyond a bound are set to it, then
    `code = clamp(round(w / scale) + zero_point, qmin, qmax)` and the result is `(code - zero_point) * scale`.

    Gradients are those of `clipped + scale * (code - zero_point - clipped / scale)` with the bracket held constant:
    rounding is passed straight through and the zero point has no gradient. The weight's group extremes receive a
    gradient through the bounds only where a logit is given.

    Args:
        weight: `[N, K]` floating point.
        low_logit: `[N, G]`, G = K / group_size or 1.
        high_logit: `[N, G]`.
        num_bits: 2 to 8.
        group_size: columns that share a scale; None for the whole row.
        symmetric: no zero point if true.
        scale_dtype: float32, float16 or bfloat16.

    Returns:
        `[N, K]` float32.

    Source: two-sided learned clipping, arXiv 2308.13137 section 3.2; used by arXiv 2601.08089.
    """
    rows = _to_rows(weight, group_size).float()
    grid = weight_grid(
        rows,
        kept_share(low_logit),
        kept_share(high_logit),
        num_bits=num_bits,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )
    clipped = torch.where(rows < grid.low, grid.low, torch.where(rows > grid.high, grid.high, rows))
    steps = _steps_ref(clipped.detach(), grid, num_bits)
    surrogate = clipped + grid.scale * (steps - clipped / grid.scale).detach()
    return _StraightThrough.apply(surrogate, steps * grid.scale.detach()).reshape(weight.shape)


def quantize_weight_ref(
    weight: Tensor,
    low_logit: Tensor | None = None,
    high_logit: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the codes, scales and zero points behind `fake_quant_weight_ref`.

    Returns:
        `[N, K]` int8 codes, `[N, G]` float32 scales that `scale_dtype` holds exactly, `[N, G]` int8 zero points or
        None.
    """
    with torch.no_grad():
        rows = _to_rows(weight, group_size).float()
        grid = weight_grid(
            rows,
            kept_share(low_logit),
            kept_share(high_logit),
            num_bits=num_bits,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
        )
        steps = _steps_ref(rows.clamp(grid.low, grid.high), grid, num_bits)
        codes = steps if grid.zero_point is None else steps + grid.zero_point
        by_row = (weight.shape[0], -1)
        zero_point = None if grid.zero_point is None else grid.zero_point.to(torch.int8).reshape(by_row)
        return codes.to(torch.int8).reshape(weight.shape), grid.scale.reshape(by_row), zero_point


def _steps_ref(clipped: Tensor, grid: WeightGrid, num_bits: int) -> Tensor:
    """Return `code - zero_point` as float32 `[R, C]`."""
    qmin, qmax = code_range(num_bits)
    rounded = torch.round(clipped / grid.scale.detach())
    if grid.zero_point is None:
        return rounded.clamp(qmin, qmax)
    return (rounded + grid.zero_point).clamp(qmin, qmax) - grid.zero_point


def dequantize_weight_ref(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return `(codes - zero_point) * scale`, computed in float32.

    Args:
        codes: `[N, K]` int8.
        scale: `[N, G]` float32; G divides K.
        zero_point: `[N, G]` int8 or None.
        out_dtype: dtype of the result.

    Returns:
        `[N, K]` in `out_dtype`.
    """
    steps = codes.reshape(*scale.shape, -1).float()
    if zero_point is not None:
        steps -= zero_point.unsqueeze(-1).float()
    return (steps * scale.unsqueeze(-1)).reshape(codes.shape).to(out_dtype)


def quantize_per_token_ref(x: Tensor, *, num_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantize each token (last dimension) symmetrically to its own largest magnitude.

    The grid is the checkpoint format's: `scale = max|x| / ((2**num_bits - 1) / 2)`, `code = clamp(round(x / scale),
    qmin, qmax)`; a token of zeros gets the scale float32's epsilon.

    Args:
        x: `[..., K]` floating point; computed in float32.
        num_bits: 2 to 8.

    Returns:
        `[..., K]` int8 codes and `[..., 1]` float32 scales.

    Source: per-token activations, arXiv 2206.01861 section 4.1; constants of the compressed-tensors package.
    """
    return quantize_per_token_rows(x, num_bits)


def fake_quant_per_token_ref(x: Tensor, *, num_bits: int = 8) -> Tensor:
    """Quantize each token and back; the gradient passes straight through.

    Args:
        x: `[..., K]` floating point; computed in float32.
        num_bits: 2 to 8.

    Returns:
        `[..., K]` in x's dtype.
    """
    return _StraightThrough.apply(x, fake_quant_per_token_rows(x.detach(), num_bits))


def fake_quant_per_token_rows(x: Tensor, num_bits: int) -> Tensor:
    """Return the value of `fake_quant_per_token_ref`."""
    steps, scale = _per_token_steps(x, num_bits)
    return steps.mul_(scale).to(x.dtype)


def quantize_per_token_rows(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Return the value of `quantize_per_token_ref`."""
    steps, scale = _per_token_steps(x, num_bits)
    return steps.to(torch.int8), scale


def _per_token_steps(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes as a new float32 tensor, and the scales."""
    qmin, qmax = code_range(num_bits)
    largest = torch.maximum(-x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)).float()
    scale = _divide(largest, (qmax - qmin) / 2)
    scale = scale.masked_fill(scale == 0, ZERO_SCALE_REPLACEMENT)
    return torch.div(x.float(), scale).round_().clamp_(qmin, qmax), scale


def fake_quant_weight_rows(
    rows: Tensor,
    low_share: Tensor | None,
    high_share: Tensor | None,
    *,
    num_bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the value of `fake_quant_weight_ref` as `[R, C]` float32, and the grid as a block; no gradients."""
    grid = weight_grid(rows, low_share, high_share, num_bits=num_bits, symmetric=symmetric, scale_dtype=scale_dtype)
    qmin, qmax = code_range(num_bits)
    offset = 0 if grid.zero_point is None else grid.zero_point
    steps = torch.div(rows.float(), grid.scale).round_()
    # Dividing by a positive scale and rounding never swap two values, so clipping the weight to [low, high] and
    # clipping its steps to the steps of these bounds are the same; the second joins the clamp to the code range.
    lowest = torch.round(grid.low / grid.scale).clamp(min=qmin - offset)
    highest = torch.round(grid.high / grid.scale).clamp(max=qmax - offset)
    return _clip_(steps, lowest, highest).mul_(grid.scale), grid.to_block()


def _clip_(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clip rows in place; `clamp_` with tensor bounds is three times slower on a CPU."""
    torch.maximum(rows, low, out=rows)
    return torch.minimum(rows, high, out=rows)


def weight_gradient_sums(
    grad: Tensor, rows: Tensor, fake: Tensor, block: Tensor, *, num_bits: int, symmetric: bool
) -> GradientSums:
    """Return what of the gradient meets the bounds and the scale of each row.

    Args:
        grad: `[R, C]` float32, gradient of the fake-quantized rows.
        rows: `[R, C]` floating point, the weight.
        fake: `[R, C]` float32, what the forward returned; a backend may recompute it instead.
        block: `[7, R, 1]` float32, the grid that the forward returned.
        num_bits: 2 to 8.
        symmetric: as in the forward.
    """
    rows, grid = rows.float(), WeightGrid.of(block, symmetric=symmetric)
    work = _clip_(rows.clone(), grid.low, grid.high)
    # -1 below the range, 1 above it, 0 inside: float arithmetic, because comparisons and `where` are slow on a CPU.
    side = torch.sub(rows, work).sign_()
    scale = torch.sub(fake, work, out=work).mul_(grad).sum(-1, keepdim=True) / grid.scale
    difference = torch.mul(grad, side, out=work).sum(-1, keepdim=True)
    total = work.mul_(side).sum(-1, keepdim=True)
    return GradientSums((total - difference) / 2, (total + difference) / 2, scale)


def weight_gradient_rows(grad: Tensor, rows: Tensor, block: Tensor, at_minimum: Tensor, at_maximum: Tensor) -> Tensor:
    """Return the rows' gradient: `grad` where nothing is clipped, plus what the bounds give to the extremes that set
    them.

    Args:
        grad: `[R, C]` float32, gradient of the fake-quantized rows.
        rows: `[R, C]` floating point, the weight.
        block: `[7, R, 1]` float32, the grid that the forward returned.
        at_minimum: `[R, 1]` float32, to be shared by the entries equal to the row's minimum.
        at_maximum: `[R, 1]` float32, the same for the maximum.

    Returns:
        `[R, C]` float32.
    """
    rows, grid = rows.float(), WeightGrid.of(block, symmetric=True)
    result = torch.where((rows < grid.low) | (rows > grid.high), 0.0, grad)
    for extreme, amount in ((grid.minimum, at_minimum), (grid.maximum, at_maximum)):
        at_extreme = (rows == extreme).float()
        ties = at_extreme.sum(-1, keepdim=True).clamp(min=1)
        result.addcmul_(at_extreme, amount / ties)
    return result


def bound_gradients(sums: GradientSums, grid: WeightGrid, *, num_bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of low and high, `[R, 1]` each: of the entries clipped to them, and through the scale."""
    qmin, qmax = code_range(num_bits)
    grad_scale = sums.scale * (grid.raw_scale >= MIN_SCALE)
    if not symmetric:
        return sums.below - grad_scale / (qmax - qmin), sums.above + grad_scale / (qmax - qmin)
    from_low, from_high = _divide(grid.low, qmin), _divide(grid.high, qmax)
    low_weight = (from_low > from_high).float() + 0.5 * (from_low == from_high).float()
    return sums.below + grad_scale * low_weight / qmin, sums.above + grad_scale * (1 - low_weight) / qmax
