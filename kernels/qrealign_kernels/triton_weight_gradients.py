"""Gradients of a rounded weight by the Triton kernels: which of them a gradient needs, and its launch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from qrealign_kernels import launches
from qrealign_kernels.reference import MIN_SCALE, code_range
from qrealign_kernels.reference_calibration import (
    WeightGradients,
    WeightTransform,
    fake_quant_edited_weight_ref,
    transformed_weight,
)
from qrealign_kernels.triton_common import LARGEST_WIDTH, as_float, on_device_of, tile_width
from qrealign_kernels.triton_gradient_kernels import (
    bound_gradients_bwd_kernel,
    product_gradients_bwd_kernel,
    weight_gradients_bwd_kernel,
)
from qrealign_kernels.triton_math import FLOAT_KINDS, FP_FUSION
from qrealign_kernels.triton_overlap import overlap
from qrealign_kernels.triton_strip_kernels import (
    PIECE,
    VALUES,
    add_rows_kernel,
    extreme_gradients_bwd_kernel,
    strip_gradients_bwd_kernel,
)
from qrealign_kernels.triton_weight import is_full, row_tile, share_source

WIDEST_IN_PRODUCT = 128  # columns of a group that a tile of the product can hold


def edited_weight_gradients(
    grad: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    *,
    transform: WeightTransform,
    wanted: frozenset[str],
    extremes: Tensor | None = None,
    **grid: Any,
) -> WeightGradients:
    """Compute the gradients of `fake_quant_edited_weight_ref` that are wanted, by their names in `WeightGradients`.

    `extremes` is what `triton_weight.fake_quant_edited_weight` kept, or None to find them again. Reductions alone need
    no tensor of the weight's size. The weight and the factors of an edit do: their gradients are made of the `[N, K]`
    gradient of the edited weight.
    """
    width = grid["group_size"] or weight.shape[1]
    if width > LARGEST_WIDTH:
        return _gradients_by_definition(grad, weight, low_logit, high_logit, transform, wanted, **grid)
    if transform.left is None:
        reduction = _Reduction(weight.contiguous(), low_logit, high_logit, transform, wanted, **grid)
        if extremes is not None and not wanted & {"weight", "column_scale"}:
            return _reduce_streamed(grad, reduction, extremes)
        if extremes is not None and (strips := _strips_of(reduction)) is not None:
            return _reduce_strips(grad, reduction, extremes, strips)
        found = _reduce_stored(grad, reduction, extremes)
        if found.weight is None:
            return found
        return found._replace(weight=_through_transform(found.weight, transform).to(weight.dtype))
    edited = transformed_weight(weight, transform)
    reduction = _Reduction(edited, low_logit, high_logit, WeightTransform(), frozenset({"weight"}), **grid)
    return _through_edit(_reduce_stored(grad, reduction, None), weight, transform, wanted)


@dataclasses.dataclass(frozen=True)
class _Reduction:
    """The arguments and results that the kernels share: what a gradient is reduced to."""

    weight: Tensor
    low_logit: Tensor | None
    high_logit: Tensor | None
    transform: WeightTransform
    wanted: frozenset[str]
    num_bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def width(self) -> int:
        """Columns of a scale group."""
        return self.group_size or self.weight.shape[1]

    def arguments(self) -> list[Tensor | None]:
        """Return what the kernels read besides weight and gradient."""
        column_scale, row_divisor = (None if part is None else as_float(part) for part in self.transform[:2])
        return [share_source(self.low_logit), share_source(self.high_logit), column_scale, row_divisor]

    def results(self, programs: int) -> list[Tensor | None]:
        """Return what the kernels fill: gradients of the logits, partial sums of column scale and row divisor."""
        rows, columns = self.weight.shape
        groups = columns // self.width
        shapes = (
            (rows, groups) if self.low_logit is not None else None,
            (rows, groups) if self.high_logit is not None else None,
            (programs, columns) if "column_scale" in self.wanted else None,
            (groups, rows) if "row_divisor" in self.wanted else None,
        )
        return [
            None if shape is None else torch.empty(shape, dtype=torch.float32, device=self.weight.device)
            for shape in shapes
        ]

    def constants(self) -> dict[str, Any]:
        """Return the constexpr arguments that the kernels share."""
        qmin, qmax = code_range(self.num_bits)
        return {
            "HAS_LOW": self.low_logit is not None,
            "HAS_HIGH": self.high_logit is not None,
            "HAS_COLUMN": self.transform.column_scale is not None,
            "HAS_ROW": self.transform.row_divisor is not None,
            "TO_COLUMN": "column_scale" in self.wanted,
            "TO_ROW": "row_divisor" in self.wanted,
            "QMIN": qmin,
            "QMAX": qmax,
            "SYMMETRIC": self.symmetric,
            "SCALE_KIND": FLOAT_KINDS[self.scale_dtype],
            "MIN_SCALE": MIN_SCALE,
            "enable_fp_fusion": FP_FUSION,
        }

    def gradients(self, results: list[Tensor | None]) -> WeightGradients:
        """Return what the kernels filled, summed over the programs."""
        to_low, to_high, to_column, to_divisor = results
        return WeightGradients(
            low_logit=_like(to_low, self.low_logit),
            high_logit=_like(to_high, self.high_logit),
            column_scale=None if to_column is None else _like(_total(to_column), self.transform.column_scale),
            row_divisor=None if to_divisor is None else _like(_total(to_divisor), self.transform.row_divisor),
        )


def _pointers(weight: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    """Return a kernel's pointer arguments; one that it does not follow points to the weight."""
    return [weight if tensor is None else tensor for tensor in tensors]


def _reduce_stored(grad: Tensor, reduction: _Reduction, extremes: Tensor | None) -> WeightGradients:
    """Reduce a stored gradient; the field `weight`, where wanted, is that of the edited weight, in float32."""
    weight = reduction.weight
    rows, columns = weight.shape
    tile = row_tile("weight_gradients_bwd", reduction.width, weight.device)
    # As many programs as run at once: each leaves a row of sums over its rows, and memory is to hold few of these.
    groups, tiles = columns // reduction.width, triton.cdiv(rows, tile["BLOCK_N"])
    steps = triton.cdiv(tiles, max(1, tile.pop("PROGRAMS") // groups))
    programs = triton.cdiv(tiles, steps)
    results = reduction.results(programs)
    to_weight = None
    if "weight" in reduction.wanted:
        to_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    with on_device_of(weight):
        weight_gradients_bwd_kernel[(groups, programs)](
            grad.contiguous(),
            weight,
            *_pointers(weight, [*reduction.arguments(), extremes, *results, to_weight]),
            rows,
            columns,
            reduction.width,
            groups,
            steps,
            FULL=is_full(rows, reduction.width, tile),
            HAS_EXTREMES=extremes is not None,
            TO_WEIGHT=to_weight is not None,
            **reduction.constants(),
            **tile,
        )
    return reduction.gradients(results)._replace(weight=to_weight)


def _reduce_streamed(grad: Tensor, reduction: _Reduction, extremes: Tensor) -> WeightGradients:
    """Reduce a stored gradient to logits and row divisor, where the groups' extremes are known.

    Then no weight is needed twice: rows are walked in steps by a few threads each, which the work on a group's grid
    costs little of.
    """
    weight = reduction.weight
    rows, columns = weight.shape
    groups = columns // reduction.width
    key = "rows" if groups == 1 else "groups"
    tile = launches.choice("bound_gradients_bwd", key, weight.device)
    tile = tile | {"BLOCK_C": min(tile["BLOCK_C"], tile_width(reduction.width))}
    results = reduction.results(0)
    constants = reduction.constants()
    del constants["TO_COLUMN"]
    with on_device_of(weight):
        bound_gradients_bwd_kernel[(groups, triton.cdiv(rows, tile["BLOCK_N"]))](
            grad.contiguous(),
            weight,
            *_pointers(weight, [*reduction.arguments(), extremes, results[0], results[1], results[3]]),
            rows,
            columns,
            reduction.width,
            groups,
            FULL=reduction.width % tile["BLOCK_C"] == 0 and rows % tile["BLOCK_N"] == 0,
            **constants,
            **tile,
        )
    return reduction.gradients(results)


def _strips_of(reduction: _Reduction) -> launches.Choice | None:
    """Return the launch of the kernels that walk down strips of columns, or None where they do not serve.

    They know one group a row. A gradient as large as the weight needs a row's sums before it can be written.
    """
    if reduction.width != reduction.weight.shape[1] or "weight" in reduction.wanted:
        return None
    if reduction.low_logit is None and reduction.high_logit is None:
        return None
    divided = reduction.transform.row_divisor is not None
    key = "divided" if divided else launches.by_shape("plain", *reduction.weight.shape)
    strips = dict(launches.choice("strip_gradients_bwd", key, reduction.weight.device))
    return strips if strips.pop("COLUMNS") <= reduction.width else None


def _reduce_strips(grad: Tensor, reduction: _Reduction, extremes: Tensor, strips: launches.Choice) -> WeightGradients:
    """Reduce a stored gradient to all but the weight, where the rows' extremes are known.

    Each weight is read once, but what a row's extremes get waits for the row's sums: a second, short kernel adds it.
    Both leave rows of partial sums of the columns. Torch takes two to four times as long to add these up as a third.
    """
    weight = reduction.weight
    rows, columns = weight.shape
    across = triton.cdiv(columns, strips["PIECES"] * PIECE.value)
    tiles = triton.cdiv(rows, strips["BLOCK_N"])
    steps = triton.cdiv(tiles, max(1, strips.pop("PROGRAMS") // across))
    down = triton.cdiv(tiles, steps)
    ends = launches.choice("extreme_gradients_bwd", launches.DEFAULT, weight.device)
    results = reduction.results(down + triton.cdiv(rows, ends["BLOCK_R"]))
    given = _pointers(weight, [*reduction.arguments(), extremes])
    low, high, to_column, to_divisor = _pointers(weight, results)
    # Of each row and strip; sums stand by row, the grid by strip, so that no two programs write the same.
    kept, sums = torch.empty(2, rows * across * VALUES.value, dtype=torch.float32, device=weight.device)
    constants = reduction.constants()
    del constants["TO_COLUMN"]
    with on_device_of(weight):
        strip_gradients_bwd_kernel[(across, down)](
            grad.contiguous(),
            weight,
            *given,
            kept,
            sums,
            to_column,
            rows,
            columns,
            steps,
            FULL=columns % (strips["PIECES"] * PIECE.value) == 0 and rows % strips["BLOCK_N"] == 0,
            **constants,
            **strips,
            **overlap(weight.device),
        )
        extreme_gradients_bwd_kernel[(triton.cdiv(rows, ends["BLOCK_R"]),)](
            weight,
            *given,
            sums,
            low,
            high,
            to_column[down:],
            to_divisor,
            rows,
            columns,
            across,
            PIECES=strips["PIECES"],
            STRIPS=tile_width(across),
            **constants,
            **ends,
            **overlap(weight.device),
        )
        adding = launches.choice("add_rows", launches.DEFAULT, weight.device)
        total = torch.empty(1, columns, dtype=torch.float32, device=weight.device)
        add_rows_kernel[(triton.cdiv(columns, adding["BLOCK_C"]),)](
            to_column, total, len(to_column), columns, **adding, **overlap(weight.device)
        )
    results[2] = total
    return reduction.gradients(results)


def _reduce_product(grad: Tensor, x: Tensor, reduction: _Reduction, tile: launches.Choice) -> WeightGradients:
    """Reduce `grad.T @ x` tile by tile; groups fit a tile."""
    weight = reduction.weight
    rows, columns = weight.shape
    block = max(16, tile_width(reduction.width))
    programs = triton.cdiv(rows, tile["BLOCK_N"])
    results = reduction.results(programs)
    with on_device_of(weight):
        product_gradients_bwd_kernel[(programs, columns // reduction.width)](
            grad.contiguous(),
            x.contiguous(),
            weight,
            *_pointers(weight, [*reduction.arguments(), *results]),
            x.shape[0],
            rows,
            columns,
            reduction.width,
            columns // reduction.width,
            BLOCK_C=block,
            **reduction.constants(),
            **tile,
        )
    return reduction.gradients(results)


def reduced_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    *,
    transform: WeightTransform,
    **grid: Any,
) -> WeightGradients:
    """Compute `reference_calibration.reduced_weight_gradient_ref` by the faster form.

    Reducing in the product reads a weight once, 2 bytes in bfloat16; storing the product first moves 6. But torch's own
    product is the faster one, which counts more the more tokens there are: the launch table says up to how many the
    first form is taken. Where a group is a whole row no tile holds it.
    """
    names = ("low_logit", "high_logit", *WeightTransform._fields[:2])
    given = (low_logit, high_logit, *transform[:2])
    wanted = frozenset(name for name, tensor in zip(names, given, strict=True) if tensor is not None)
    reduction = _Reduction(weight.contiguous(), low_logit, high_logit, transform, wanted, **grid)
    tile = dict(launches.choice("product_gradients_bwd", launches.DEFAULT, weight.device))
    if reduction.width <= WIDEST_IN_PRODUCT and x.shape[0] <= tile.pop("TOKENS"):
        return _reduce_product(grad, x.to(grad.dtype), reduction, tile)
    product = grad.T @ x.to(grad.dtype)
    return edited_weight_gradients(product, weight, low_logit, high_logit, transform=transform, wanted=wanted, **grid)


def _total(partial: Tensor) -> Tensor:
    """Return partial sums `[P, C]` added up, `[C]`: without a kernel where there is one."""
    return partial[0] if len(partial) == 1 else partial.sum(0)


def _like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """Return a gradient in the dtype of what it belongs to."""
    return None if gradient is None or tensor is None else gradient.to(tensor.dtype)


def _through_transform(grad_edited: Tensor, transform: WeightTransform) -> Tensor:
    """Return the weight's gradient, float32."""
    if transform.row_divisor is not None:
        grad_edited = grad_edited / transform.row_divisor[:, None].float()
    return grad_edited if transform.column_scale is None else grad_edited * transform.column_scale.float()


def _through_edit(
    found: WeightGradients, weight: Tensor, transform: WeightTransform, wanted: frozenset[str]
) -> WeightGradients:
    """Return the gradients wanted, from that of the edited weight."""
    column_scale, row_divisor, left, right = transform
    grad_edited = found.weight
    assert grad_edited is not None and left is not None and right is not None
    to_column = to_divisor = None
    if "column_scale" in wanted:
        to_column = _like(
            (_through_transform(grad_edited, WeightTransform(None, row_divisor)) * weight).sum(0), column_scale
        )
    if "row_divisor" in wanted and row_divisor is not None:
        unedited = transformed_weight(weight, WeightTransform(column_scale, row_divisor))
        to_divisor = _like(-(grad_edited * unedited).sum(1) / row_divisor, row_divisor)
    return found._replace(
        weight=_through_transform(grad_edited, transform).to(weight.dtype) if "weight" in wanted else None,
        column_scale=to_column,
        row_divisor=to_divisor,
        left=_like(grad_edited @ right.float().T, left) if "left" in wanted else None,
        right=_like(left.float().T @ grad_edited, right) if "right" in wanted else None,
    )


def _gradients_by_definition(
    grad: Tensor,
    weight: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor | None,
    transform: WeightTransform,
    wanted: frozenset[str],
    **grid: Any,
) -> WeightGradients:
    """Return the gradients of groups that no tile holds, by torch's autograd."""
    given = zip(WeightGradients._fields, (weight, low_logit, high_logit, *transform), strict=True)
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in wanted) for name, tensor in given
    }
    with torch.enable_grad():
        fake = fake_quant_edited_weight_ref(
            weight if leaves["weight"] is None else leaves["weight"],
            leaves["low_logit"],
            leaves["high_logit"],
            transform=WeightTransform(*(leaves[name] for name in WeightTransform._fields)),
            **grid,
        )
    inputs = {name: leaf for name, leaf in leaves.items() if leaf is not None and name in wanted}
    found = torch.autograd.grad(fake, list(inputs.values()), grad.float())
    return WeightGradients(**dict(zip(inputs, found, strict=True)))
