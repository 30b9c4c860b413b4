"""Launch candidates of the calibration kernels, and the calls that time them, at the shapes of 7B layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import qrealign_kernels as kernels
from benchmarks.timing import rotations
from benchmarks.tunables.tunable import Calls, Tunable
from qrealign_kernels.launches import Choice
from qrealign_kernels.reference_calibration import WeightTransform
from qrealign_kernels.triton_activations import rms_norm_gradients
from qrealign_kernels.triton_weight import fake_quant_edited_weight
from qrealign_kernels.triton_weight_gradients import edited_weight_gradients

# Key -> rows, columns and group size of the weight that stands for it.
WEIGHTS = {
    "128": (4096, 4096, 128),
    "4096": (11008, 4096, 0),
    "8192": (8192, 8192, 0),
    "16384": (4096, 11008, 0),
    "32768": (8192, 28672, 0),
}
BOUNDS = {"rows": (11008, 4096, 0), "groups": (4096, 4096, 128)}
STRIPS = {  # rows, columns, with a row divisor
    "plain": (4096, 4096, False),
    "plain-wide": (11008, 4096, False),
    "divided": (4096, 4096, True),
}
EDITED = {"rows": (4096, 11008, 0), "16": (4096, 4096, 8), "32": (4096, 4096, 32), "64": (4096, 4096, 64)}
TOKENS = {
    "4096": (2048, 4096),
    "8192": (2048, 8192),
    "16384": (2048, 11008),
    "32768": (2048, 28672),
    "4096-few": (1, 4096),
    "8192-few": (1, 8192),
    "16384-few": (1, 11008),
    "32768-few": (1, 28672),
}


def grid(candidates: dict[str, Sequence[int]], keep: Callable[[Choice], bool]) -> list[Choice]:
    """Return every combination that `keep` accepts."""
    choices = (dict(zip(candidates, values, strict=True)) for values in product(*candidates.values()))
    return [choice for choice in choices if keep(choice)]


def _held(choice: Choice, width: int, rows: str) -> bool:
    """Tell whether a thread holds 4 to 64 values of the tile."""
    return 4 <= choice[rows] * width / (32 * choice["num_warps"]) <= 64


def weight_candidates(key: str) -> list[Choice]:
    """Return tiles of whole groups: many rows of short ones, one row of long ones."""
    width, short = int(key), int(key) <= 1024
    return grid(
        {"BLOCK_N": (8, 16, 32, 64) if short else (1, 2), "num_warps": (1, 2, 4, 8) if short else (2, 4, 8, 16, 32)},
        lambda choice: _held(choice, width, "BLOCK_N"),
    )


def gradient_candidates(key: str) -> list[Choice]:
    """Return the same tiles with how many programs share the rows, and whether a program loads a tile ahead."""
    return [
        choice | {"AHEAD": ahead, "PROGRAMS": programs}
        for choice in weight_candidates(key)
        for ahead in (1, 2)
        for programs in (264, 528, 1056)
    ]


def strip_candidates(key: str) -> list[Choice]:
    """Return strips of columns, a warp a row or two, and how many programs share the rows."""
    return grid(
        {
            "BLOCK_N": (1, 2, 4, 8),
            "PIECES": (1, 2, 4),
            "AHEAD": (1, 2, 3),
            "PROGRAMS": (528, 792, 1056, 1584, 2112),
            "COLUMNS": (1024,),
            "num_warps": (1, 2, 4, 8),
        },
        lambda choice: choice["num_warps"] <= choice["BLOCK_N"] <= 2 * choice["num_warps"],
    )


def extreme_candidates(key: str) -> list[Choice]:
    """Return tiles of rows."""
    return grid({"BLOCK_R": (16, 32, 64), "num_warps": (4, 8)}, lambda choice: True)


def adding_candidates(key: str) -> list[Choice]:
    """Return tiles of many rows and few columns."""
    return grid(
        {"BLOCK_P": (128, 256, 512), "BLOCK_C": (16, 32), "num_warps": (4, 8)},
        lambda choice: _held(choice, choice["BLOCK_C"], "BLOCK_P"),
    )


def bound_candidates(key: str) -> list[Choice]:
    """Return tiles of a step along some rows."""
    return grid(
        {
            "BLOCK_N": (1, 2, 4, 8) if key == "rows" else (8, 16, 32, 64),
            "BLOCK_C": (256, 512, 1024) if key == "rows" else (128,),
            "AHEAD": (1, 3),
            "num_warps": (1, 2, 4, 8),
        },
        lambda choice: 8 <= choice["BLOCK_N"] * choice["BLOCK_C"] / (32 * choice["num_warps"]) <= 16,
    )


def edited_candidates(key: str) -> list[Choice]:
    """Return tiles of a few rows and a part of their columns."""
    if key == "rows":
        return grid(
            {"BLOCK_N": (1, 2, 4, 8), "BLOCK_C": (256, 512, 1024), "AHEAD": (1, 3), "num_warps": (1, 2, 4, 8)},
            lambda choice: 8 <= choice["BLOCK_N"] * choice["BLOCK_C"] / (32 * choice["num_warps"]) <= 16,
        )
    return grid(
        {"BLOCK_N": (16, 32, 64), "BLOCK_C": (64, 128, 256), "AHEAD": (1, 2, 3), "num_warps": (4, 8)},
        lambda choice: 1024 <= choice["BLOCK_N"] * choice["BLOCK_C"] <= 8192,
    )


def product_candidates(key: str) -> list[Choice]:
    """Return tiles of the rows of some groups of 128 and the tokens of a step."""
    return grid(
        {
            "BLOCK_M": (32, 64, 128),
            "BLOCK_N": (32, 64, 128),
            "AHEAD": (1, 2, 3),
            "num_warps": (4, 8),
            "TOKENS": (0, 256),  # with 0 it is the two-kernel form that is timed
        },
        lambda choice: choice["AHEAD"] * choice["BLOCK_M"] * (choice["BLOCK_N"] + 128) <= 48 * 1024,
    )


def token_candidates(key: str) -> list[Choice]:
    """Return tiles of whole tokens."""
    width = int(key.partition("-")[0])
    rows = (1, 2, 4) if width <= 4096 and "few" not in key else (1,)
    return grid({"BLOCK_R": rows, "num_warps": (2, 4, 8, 16, 32)}, lambda choice: _held(choice, width, "BLOCK_R"))


def norm_gradient_candidates(key: str) -> list[Choice]:
    """Return tiles of whole tokens, and how many of them a program takes one after the other."""
    width = int(key.partition("-")[0])
    return grid(
        {"BLOCK_R": (1,), "STEPS": (1,) if "few" in key else (2, 4, 8, 16), "num_warps": (4, 8, 16, 32)},
        lambda choice: _held(choice, width, "BLOCK_R"),
    )


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def learned(rows: int, columns: int, group_size: int) -> dict[str, Any]:
    """Return all that block-wise calibration learns of a weight, and its grid, as the op's keyword arguments."""
    shape = (rows, columns // (group_size or columns))
    return {
        "low_logit": _randn(*shape, dtype=torch.float32) + 4,
        "high_logit": _randn(*shape, dtype=torch.float32) + 4,
        "column_scale": torch.rand(columns, device="cuda") + 0.5,
        "row_divisor": torch.rand(rows, device="cuda") + 0.5,
        "num_bits": 4 if group_size else 8,
        "group_size": group_size or None,
    }


def forward_calls(rows: int, columns: int, group_size: int) -> Calls:
    """Return calls that round a bfloat16 weight to bfloat16."""
    arguments = learned(rows, columns, group_size) | {"out_dtype": torch.bfloat16}
    return [
        partial(kernels.fake_quant_weight, _randn(rows, columns) * 0.02, **arguments)
        for _ in range(rotations(4 * rows * columns))
    ]


def gradient_calls(rows: int, columns: int, group_size: int) -> Calls:
    """Return calls that reduce a bfloat16 gradient to logits, column scale and row divisor.

    Of whole rows the weight's own gradient is asked for as well: without it they go down strips.
    """
    return backward_calls(rows, columns, learned(rows, columns, group_size), of_weight=not group_size)


def strip_calls(rows: int, columns: int, divided: bool) -> Calls:
    """Return calls that reduce a bfloat16 gradient to logits, column scale and, where there is one, row divisor."""
    arguments = learned(rows, columns, 0)
    if not divided:
        del arguments["row_divisor"]
    return backward_calls(rows, columns, arguments)


def bound_calls(rows: int, columns: int, group_size: int) -> Calls:
    """Return calls that reduce a bfloat16 gradient to the logits."""
    arguments = learned(rows, columns, group_size)
    del arguments["column_scale"], arguments["row_divisor"]
    return backward_calls(rows, columns, arguments)


def backward_calls(rows: int, columns: int, arguments: dict[str, Any], *, of_weight: bool = False) -> Calls:
    """Return calls of the backward of `fake_quant_weight` with what its forward keeps.

    Autograd would start them on the stream of the forward pass, which a graph cannot capture.
    """
    given = dict(arguments)
    transform = WeightTransform(given.pop("column_scale", None), given.pop("row_divisor", None))
    wanted = frozenset(name for name, value in arguments.items() if isinstance(value, Tensor))
    wanted |= {"weight"} if of_weight else frozenset()
    grid = {name: given.pop(name) for name in ("num_bits", "group_size")}
    shared: dict[str, Any] = {"transform": transform, "symmetric": True, "scale_dtype": torch.bfloat16} | given | grid
    calls: Calls = []
    for _ in range(rotations(4 * rows * columns)):
        weight = _randn(rows, columns) * 0.02
        _, extremes = fake_quant_edited_weight(weight, out_dtype=torch.bfloat16, keep=True, **shared)
        grad = _randn(rows, columns)
        calls.append(partial(edited_weight_gradients, grad, weight, wanted=wanted, extremes=extremes, **shared))
    return calls


def product_calls(tokens: int, rows: int, columns: int, group_size: int) -> Calls:
    """Return calls that reduce the product of a bfloat16 gradient and input while it is made."""
    arguments = learned(rows, columns, group_size)
    return [
        partial(
            kernels.reduced_weight_gradient,
            _randn(tokens, rows),
            _randn(tokens, columns),
            _randn(rows, columns) * 0.02,
            **arguments,
        )
        for _ in range(rotations(2 * rows * columns))
    ]


def edited_calls(rows: int, columns: int, rank: int) -> Calls:
    """Return calls that encode a bfloat16 weight with an edit; with rank 0, that round one with learned bounds."""
    if rank == 0:
        arguments = learned(rows, columns, 0) | {"column_scale": None, "row_divisor": None}
        return [
            partial(kernels.fake_quant_weight, _randn(rows, columns) * 0.02, **arguments, out_dtype=torch.bfloat16)
            for _ in range(rotations(4 * rows * columns))
        ]
    left, right = _randn(rows, rank, dtype=torch.float32) * 0.01, _randn(rank, columns, dtype=torch.float32) * 0.02
    return [
        partial(kernels.encode_weight, _randn(rows, columns) * 0.02, num_bits=8, left=left, right=right)
        for _ in range(rotations(3 * rows * columns))
    ]


def token_calls(tokens: int, columns: int) -> Calls:
    """Return calls that quantize bfloat16 tokens."""
    return [
        partial(kernels.quantize_per_token, _randn(tokens, columns)) for _ in range(rotations(3 * tokens * columns))
    ]


def norm_calls(tokens: int, columns: int) -> Calls:
    """Return calls that normalize and quantize bfloat16 tokens."""
    weight = torch.rand(columns, device="cuda").bfloat16() + 0.5
    return [
        partial(kernels.rms_norm_quantize, _randn(tokens, columns), weight, 1e-5)
        for _ in range(rotations(3 * tokens * columns))
    ]


def norm_gradient_calls(tokens: int, columns: int) -> Calls:
    """Return calls of the norm's backward."""
    weight = torch.rand(columns, device="cuda").bfloat16() + 0.5
    call = partial(rms_norm_gradients, weight=weight, eps=1e-5, offset=0.0)
    return [
        partial(call, _randn(tokens, columns), _randn(tokens, columns)) for _ in range(rotations(6 * tokens * columns))
    ]


def gate_calls(tokens: int, columns: int) -> Calls:
    """Return calls that gate and quantize the two halves of a wider bfloat16 tensor."""
    return [
        partial(kernels.silu_mul_quantize, *_randn(tokens, 2 * columns).split(columns, dim=-1))
        for _ in range(rotations(5 * tokens * columns))
    ]


def inner_candidates(key: str) -> list[Choice]:
    """Return tiles of few tokens and many columns."""
    return grid(
        {"BLOCK_M": (1, 2, 4, 8), "BLOCK_C": (256, 512, 1024, 2048), "num_warps": (4, 8)},
        lambda choice: _held(choice, choice["BLOCK_C"], "BLOCK_M"),
    )


def outer_candidates(key: str) -> list[Choice]:
    """Return tiles of many tokens and few columns."""
    return grid(
        {"BLOCK_M": (32, 64, 128, 256), "BLOCK_C": (16, 32, 64), "num_warps": (4, 8)},
        lambda choice: _held(choice, choice["BLOCK_C"], "BLOCK_M"),
    )


def edit_gradient_calls(tokens: int, rows: int, columns: int, left: Tensor, right: Tensor) -> Calls:
    """Return calls that give the gradients of an edit of a linear that has read codes."""
    return [
        partial(kernels.low_rank_gradients, _randn(tokens, rows), codes, left, right, scale)
        for codes, scale in (
            kernels.quantize_per_token(_randn(tokens, columns)) for _ in range(rotations(tokens * (2 * rows + columns)))
        )
    ]


def slight_edit_calls(tokens: int, rows: int, columns: int) -> Calls:
    """Return the same for an edit of rank 2, that of the default recipe."""
    left, right = _randn(rows, 2, dtype=torch.float32) * 0.01, _randn(2, columns, dtype=torch.float32) * 0.02
    return edit_gradient_calls(tokens, rows, columns, left, right)


def head_candidates(key: str) -> list[Choice]:
    """Return tiles of some heads of one token."""
    return grid({"BLOCK_H": (4, 8, 16, 32), "num_warps": (1, 2, 4, 8)}, lambda choice: _held(choice, 64, "BLOCK_H"))


def head_calls(tokens: int, heads: int, width: int) -> Calls:
    """Return calls that turn bfloat16 heads as a projection gives them."""
    angles = [_randn(1, tokens, width) for _ in range(2)]
    return [
        partial(kernels.rotate_heads, _randn(1, tokens, heads, width).transpose(1, 2), *angles)
        for _ in range(rotations(4 * tokens * heads * width))
    ]


TUNABLES = (
    Tunable(name="fake_quant_edited_fwd", keys=WEIGHTS, candidates=weight_candidates, make_calls=forward_calls),
    Tunable(name="weight_gradients_bwd", keys=WEIGHTS, candidates=gradient_candidates, make_calls=gradient_calls),
    Tunable(
        name="strip_gradients_bwd",
        keys=STRIPS,
        candidates=strip_candidates,
        make_calls=strip_calls,
    ),
    Tunable(
        name="extreme_gradients_bwd",
        keys={"default": STRIPS["plain-wide"]},
        candidates=extreme_candidates,
        make_calls=strip_calls,
    ),
    Tunable(
        name="add_rows",
        keys={"default": STRIPS["plain-wide"]},
        candidates=adding_candidates,
        make_calls=strip_calls,
    ),
    Tunable(name="bound_gradients_bwd", keys=BOUNDS, candidates=bound_candidates, make_calls=bound_calls),
    Tunable(name="fake_quant_edited_steps_fwd", keys=EDITED, candidates=edited_candidates, make_calls=edited_calls),
    Tunable(
        name="product_gradients_bwd",
        keys={"default": (256, 4096, 4096, 128)},
        candidates=product_candidates,
        make_calls=product_calls,
    ),
    Tunable(name="quantize_per_token", keys=TOKENS, candidates=token_candidates, make_calls=token_calls),
    Tunable(name="rms_norm_quantize", keys=TOKENS, candidates=token_candidates, make_calls=norm_calls),
    Tunable(name="silu_mul_quantize", keys=TOKENS, candidates=token_candidates, make_calls=gate_calls),
    Tunable(
        name="low_rank_inner",
        keys={"default": (2048, 11008, 4096)},
        candidates=inner_candidates,
        make_calls=slight_edit_calls,
    ),
    Tunable(
        name="low_rank_outer",
        keys={"default": (2048, 11008, 4096)},
        candidates=outer_candidates,
        make_calls=slight_edit_calls,
    ),
    Tunable(name="rotate_heads", keys={"default": (2048, 32, 128)}, candidates=head_candidates, make_calls=head_calls),
    Tunable(name="rms_norm_bwd", keys=TOKENS, candidates=norm_gradient_candidates, make_calls=norm_gradient_calls),
)
