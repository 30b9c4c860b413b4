"""Attention over a cache of fixed size: every backend against the definition, and that against Hugging Face's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import qrealign_kernels as kernels
from qrealign_kernels import launches, reference_attention
from qrealign_kernels.reference import quantize_per_token_ref
from qrealign_kernels.triton_common import interpreting

LENGTH = 37  # cells, two tiles and a part
TOKENS = 19  # of a prompt, more than a tile
BUFFERS = ("keys", "values", "key_scale", "value_scale")
KINDS = (kernels.TokenStates, kernels.CachePlace)
SHAPES = pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 32), (4, 2, 32), (6, 2, 40), (5, 1, 16)])


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Cut attention into few runs where Triton's interpreter walks through them one after the other."""
    with ExitStack() as stack:
        if interpreting():
            stack.enter_context(launches.forced("decode_attention", {"SPLITS": 2, "BLOCK_S": 16, "num_warps": 1}))
            stack.enter_context(launches.forced("prompt_attention", {"BLOCK_T": 16, "BLOCK_S": 16, "num_warps": 1}))
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


def prompt_inputs(tokens: int = TOKENS, **sizes: Any) -> dict[str, Any]:
    """Return the tensors of a piece of a prompt, which begins at another cell in each row."""
    given = step_inputs(**{"batch": 2, "heads": 2, "groups": 1} | sizes)
    batch, heads, size = given["query"].shape
    groups, dtype = given["key"].shape[1], given["query"].dtype
    states = torch.randn(batch, tokens, heads + 2 * groups, size).to(dtype)
    given |= dict(zip(("query", "key", "value"), states.split([heads, groups, groups], dim=2), strict=True))
    angles = torch.rand(batch, tokens, size // 2) * 6
    given |= {name: turn(angles).repeat(1, 1, 2).to(dtype) for name, turn in (("cos", torch.cos), ("sin", torch.sin))}
    first = torch.tensor([11, LENGTH - tokens])[:batch]
    return given | {"cells": first[:, None] + torch.arange(tokens)}


def as_codes(given: dict[str, Any]) -> dict[str, Any]:
    """Return the same call on a cache of int8 codes."""
    found = {}
    for name, scale in (("keys", "key_scale"), ("values", "value_scale")):
        found[name], scales = quantize_per_token_ref(given[name])
        found[scale] = scales[..., 0].contiguous()
    return given | found


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """Return the same call on buffers of its own."""
    return given | {name: given[name].clone() for name in (*BUFFERS, "cells") if given.get(name) is not None}


def call(run: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
    """Run an op or a definition on tensors and settings by their names."""
    states, place = (kind(**{name: given[name] for name in kind._fields if name in given}) for kind in KINDS)
    return run(states, place, given["mask"], scaling=given["scaling"])


def assert_agrees(op: str, given: dict[str, Any], *, advance: bool = False, tolerance: float = 1e-5) -> None:
    """Run a call on the chosen backend and by definition: the same result, and the same in the buffers."""
    ours, theirs = (copied(given | {"advance": advance}) for _ in range(2))
    found = call(getattr(kernels, op), ours)
    expected = call(getattr(reference_attention, f"{op}_ref"), theirs)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for name in (*BUFFERS, "cells"):
        if given.get(name) is not None:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)


def assert_steps_agree(given: dict[str, Any], **options: Any) -> None:
    assert_agrees("decode_attention", given, **options)


@SHAPES
def test_attention_equals_the_definition(
    each_backend: str, poisoned_memory: None, heads: int, groups: int, size: int
) -> None:
    given = step_inputs(heads=heads, groups=groups, size=size)
    assert_steps_agree(given)
    assert_steps_agree(as_codes(given) | {"mask": torch.rand(3, LENGTH) < 0.5})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_rounds_where_the_model_rounds(each_backend: str, dtype: torch.dtype) -> None:
    given = step_inputs(dtype=dtype, batch=2)
    assert_steps_agree(given, tolerance=1e-2)
    assert_steps_agree(as_codes(given), tolerance=1e-2)


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
    found = call(kernels.decode_attention, copied(given))
    assert torch.isfinite(found).all()
    assert_steps_agree(given)


def test_attention_is_that_of_hugging_face(each_backend: str) -> None:
    given = step_inputs()
    batch, heads, _ = given["query"].shape
    ours = copied(given)
    found = call(kernels.decode_attention, ours)
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
        ({"rows": torch.arange(3)}, ValueError, "first rows"),
        ({"mask": torch.ones(3, LENGTH)}, ValueError, "mask must be bool"),
        ({"sin": torch.zeros(3, 32, dtype=torch.float16)}, TypeError, "sin must have one"),
    ],
)
def test_what_attention_cannot_take_is_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(kernels.decode_attention, step_inputs() | change)


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 32), (3, 1, 40)])
def test_prompts_attend_as_defined(
    each_backend: str, poisoned_memory: None, heads: int, groups: int, size: int
) -> None:
    given = prompt_inputs(heads=heads, groups=groups, size=size)
    assert_agrees("prompt_attention", given)
    mask = torch.rand(2, TOKENS, LENGTH) < 0.5
    mask[1, 3:5] = False  # padding sees nothing
    assert_agrees("prompt_attention", as_codes(given) | {"mask": mask})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_are_rounded_where_the_model_rounds(each_backend: str, dtype: torch.dtype) -> None:
    given = prompt_inputs(tokens=5, dtype=dtype)
    assert_agrees("prompt_attention", as_codes(given) if dtype == torch.bfloat16 else given, tolerance=1e-2)


def test_prompts_go_to_any_rows_and_cells(each_backend: str) -> None:
    """Padding on the left is written to a spare cell behind all that are read, as a server's slots have it."""
    given = prompt_inputs()
    given["cells"][0, :4] = LENGTH + 3
    ours, theirs = (copied(as_codes(given) | {"rows": torch.tensor([2, 0])}) for _ in range(2))
    found = call(kernels.prompt_attention, ours)
    expected = call(reference_attention.prompt_attention_ref, theirs)
    torch.testing.assert_close(found[0, 4:], expected[0, 4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=1e-5)
    for name in BUFFERS:
        torch.testing.assert_close(ours[name][:, :, :LENGTH], theirs[name][:, :, :LENGTH], rtol=0, atol=0)


def test_rows_of_a_prompt_can_share_a_first_cell_that_moves_on(each_backend: str) -> None:
    given = prompt_inputs(tokens=5) | {"cells": torch.tensor([9])}
    given |= {name: given[name][:1].expand(2, -1, -1) for name in ("cos", "sin")}
    mask = (torch.rand(1, 5, LENGTH) < 0.8).expand(2, -1, -1)
    assert_agrees("prompt_attention", given | {"mask": mask}, advance=True)


def test_steps_and_pieces_of_a_prompt_see_what_the_whole_prompt_sees(each_backend: str) -> None:
    """What was stored is what is seen, so that a cache of codes gives the same however a prompt is cut."""
    whole = copied(as_codes(prompt_inputs(batch=1)))
    cut = copied(whole)
    expected = call(kernels.prompt_attention, whole)
    found = []
    for start, end in ((0, 7), (7, 18), (18, 19)):
        piece = {name: cut[name][:, start:end] for name in ("query", "key", "value", "cos", "sin", "cells")}
        if end - start > 1:
            found.append(call(kernels.prompt_attention, cut | piece))
        else:
            one = {name: tensor[:, 0] for name, tensor in piece.items()}
            found.append(call(kernels.decode_attention, cut | one)[:, None])
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(2, 2, 32)}, ValueError, "T, heads, D"),
        ({"cells": torch.zeros(3, dtype=torch.int64)}, ValueError, "cells must be"),
        ({"advance": True}, ValueError, "to advance"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, ValueError, "rows must be"),
        ({"mask": torch.ones(2, LENGTH, dtype=torch.bool)}, ValueError, "mask must be bool"),
        ({"key_scale": torch.zeros(3, 1, LENGTH + 4)}, TypeError, "with scales"),
    ],
)
def test_what_a_prompt_cannot_take_is_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(kernels.prompt_attention, prompt_inputs() | change)


def test_codes_without_all_their_scales_are_refused() -> None:
    given = as_codes(step_inputs())
    with pytest.raises(ValueError, match="together"):
        call(kernels.decode_attention, given | {"value_scale": None})
    with pytest.raises(ValueError, match="contiguous float32"):
        call(kernels.decode_attention, given | {"value_scale": given["value_scale"].half()})
    with pytest.raises(TypeError, match="without scales"):
        call(kernels.decode_attention, given | {"key_scale": None, "value_scale": None})
