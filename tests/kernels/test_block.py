"""A decoder block beside its products: every backend against the definition, and that against Hugging Face's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import qrealign_kernels as kernels
from qrealign_kernels import launches, reference_block
from qrealign_kernels import reference_calibration as definitions
from qrealign_kernels.triton_common import interpreting

EPS = 1e-5
LENGTH = 45


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Cut attention into few runs where Triton's interpreter walks through them one after the other."""
    launch = {"SPLITS": 2, "BLOCK_S": 16, "num_warps": 1}
    with launches.forced("decode_attention", launch) if interpreting() else nullcontext():
        yield


def step_inputs(
    batch: int = 3, heads: int = 4, groups: int = 2, size: int = 32, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return one step's tensors: queries, keys and values are parts of one tensor, as a joined product's are."""
    states = torch.randn(batch, heads + 2 * groups, size).to(dtype)
    query, key, value = states.split([heads, groups, groups], dim=1)
    angles = torch.rand(batch, size // 2) * 6
    keys, values = (torch.randn(batch + 1, groups, LENGTH + 4, size).to(dtype) for _ in range(2))
    cells = torch.tensor([0, 17, LENGTH - 1])[:batch]
    given = {"query": query, "key": key, "value": value, "keys": keys, "values": values, "cells": cells}
    given |= {name: turn(angles).repeat(1, 2).to(dtype) for name, turn in (("cos", torch.cos), ("sin", torch.sin))}
    return given | {"mask": None, "length": LENGTH, "scaling": size**-0.5}


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """Return the same step on buffers of its own."""
    return given | {name: given[name].clone() for name in ("keys", "values", "cells")}


def assert_steps_agree(given: dict[str, Any], *, advance: bool = False, tolerance: float = 1e-5) -> None:
    """Run a step on the chosen backend and by definition: the same result, and the same in the buffers."""
    ours, theirs = copied(given), copied(given)
    found = kernels.decode_attention(**ours, advance=advance)
    expected = reference_block.decode_attention_ref(**theirs, advance=advance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for name in ("keys", "values", "cells"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 32), (4, 2, 32), (6, 2, 40), (5, 1, 16)])
def test_attention_equals_the_definition(
    each_backend: str, poisoned_memory: None, heads: int, groups: int, size: int
) -> None:
    given = step_inputs(heads=heads, groups=groups, size=size)
    assert_steps_agree(given)
    assert_steps_agree(given | {"mask": torch.rand(3, LENGTH) < 0.5})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_rounds_where_the_model_rounds(each_backend: str, dtype: torch.dtype) -> None:
    assert_steps_agree(step_inputs(dtype=dtype), tolerance=1e-2)


@pytest.mark.parametrize("splits", [1, 8])
def test_attention_does_not_depend_on_how_it_is_cut(each_backend: str, splits: int) -> None:
    with launches.forced("decode_attention", {"SPLITS": splits, "BLOCK_S": 16, "num_warps": 1}):
        assert_steps_agree(step_inputs())


def test_rows_can_share_a_cell_that_moves_on(each_backend: str) -> None:
    given = step_inputs() | {"cells": torch.tensor([9])}
    given["cos"], given["sin"] = given["cos"][:1].expand(3, -1), given["sin"][:1].expand(3, -1)
    assert_steps_agree(given, advance=True)


def test_a_cell_behind_the_length_reads_no_further(each_backend: str) -> None:
    given = step_inputs() | {"cells": torch.tensor([LENGTH + 3, 5, LENGTH])}
    given["keys"][:, :, LENGTH:] = given["values"][:, :, LENGTH:] = float("nan")
    found = kernels.decode_attention(**copied(given))
    assert torch.isfinite(found).all()
    assert_steps_agree(given)


def test_attention_is_that_of_hugging_face(each_backend: str) -> None:
    given = step_inputs()
    batch, heads, _ = given["query"].shape
    ours = copied(given)
    found = kernels.decode_attention(**ours)
    query, key = apply_rotary_pos_emb(
        given["query"][:, :, None], given["key"][:, :, None], given["cos"][:, None], given["sin"][:, None]
    )
    for row in range(batch):
        cell = int(given["cells"][row])
        states = [
            torch.cat((given[name][row, :, :cell], new[row]), dim=1)[None]
            for name, new in (("keys", key), ("values", given["value"][:, :, None]))
        ]
        repeated = [one.repeat_interleave(heads // one.shape[1], dim=1) for one in states]
        expected = torch.nn.functional.scaled_dot_product_attention(query[row][None], *repeated)
        torch.testing.assert_close(found[row], expected[0, :, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours["keys"][row, :, cell], key[row, :, 0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(3, 5, 32)}, ValueError, "divisor"),
        ({"cos": torch.zeros(3, 16)}, ValueError, "cos must be"),
        ({"values": torch.zeros(4, 2, LENGTH + 3, 32)}, ValueError, "keys and values"),
        ({"length": LENGTH + 5}, ValueError, "keys and values"),
        ({"cells": torch.zeros(2, dtype=torch.int64)}, ValueError, "cells must be"),
        ({"advance": True}, ValueError, "to advance"),
        ({"mask": torch.ones(3, LENGTH)}, ValueError, "mask must be bool"),
        ({"sin": torch.zeros(3, 32, dtype=torch.float16)}, TypeError, "sin must have one"),
    ],
)
def test_what_attention_cannot_take_is_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        kernels.decode_attention(**step_inputs() | change)


@pytest.mark.parametrize("shape", [(1, 67), (2, 3, 130)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_behind_a_sum_equals_the_definition(
    each_backend: str, poisoned_memory: None, shape: tuple[int, ...], offset: float, dtype: torch.dtype
) -> None:
    x, branch = (torch.randn(shape).to(dtype) for _ in range(2))
    weight = (torch.rand(shape[-1]) + 0.5).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # one rounding may fall the other way
    for given in (branch, None):
        found = kernels.add_rms_norm(x, given, weight, EPS, offset=offset)
        expected = reference_block.add_rms_norm_ref(x, given, weight, EPS, offset=offset)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_equals_the_definition(each_backend: str, poisoned_memory: None, tokens: int, dtype: torch.dtype) -> None:
    gate, up = torch.randn(tokens, 2 * 131).to(dtype).split(131, dim=-1)  # strided rows, as a joined product's are
    found = kernels.silu_mul(gate, up)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, definitions.silu_mul_ref(gate, up), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("num_bits", [8, 4])
def test_codes_behind_a_sum_equal_the_definition(
    each_backend: str, poisoned_memory: None, offset: float, num_bits: int
) -> None:
    x, branch, weight = torch.randn(2, 3, 130), torch.randn(2, 3, 130), torch.rand(130) + 0.5
    total, found = kernels.add_rms_norm_quantize(x, branch, weight, EPS, offset=offset, num_bits=num_bits)
    expected = reference_block.add_rms_norm_quantize_ref(x, branch, weight, EPS, offset=offset, num_bits=num_bits)
    torch.testing.assert_close(total, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found.scale, expected[2], rtol=1e-5, atol=0)
    difference = (found.codes.int() - expected[1].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.003 and found.dtype == x.dtype


def test_a_branch_of_another_shape_is_refused() -> None:
    x: Tensor = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="branch must be"):
        kernels.add_rms_norm(x, torch.zeros(1, 8), torch.ones(8), EPS)
