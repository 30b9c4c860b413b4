"""What is measured of each calibration kernel: inputs, the op, its definition, a check of one against the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import qrealign_kernels as kernels
from benchmarks.timing import rotations
from benchmarks.tunables.calibration import backward_calls, edit_gradient_calls, head_calls, learned
from benchmarks.tunables.tunable import Calls
from qrealign_kernels import reference
from qrealign_kernels import reference_calibration as definitions
from qrealign_kernels.reference_calibration import WeightGradients, WeightTransform

CLIP = ("low_logit", "high_logit")
COLUMN = (*CLIP, "column_scale")
ALL = (*COLUMN, "row_divisor")
LINEARS = (  # of a Llama-2-7B block: rows, columns, how many, what block-wise calibration learns of one
    (4096, 4096, 2, ALL),  # query and key
    (4096, 4096, 2, COLUMN),  # value and output
    (11008, 4096, 2, COLUMN),  # gate and up
    (4096, 11008, 1, CLIP),  # down
)
WORST_CODE_SHARE = 1e-5  # of codes that may differ by one where sums are taken in another order
WORST_GRADIENT_ERROR = 1e-2  # of gradients in bfloat16, relative; reductions in float32 stay far below


class Prepared(NamedTuple):
    """Inputs on the GPU: calls on sets of them, the definition on the first, and a check that raises AssertionError."""

    calls: Calls
    definition: Callable[[], object]
    check: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One row: `bytes` moved at least, and `operations` of matrix products; `copies` of it are in a 7B block."""

    kernel: str
    variant: str
    shape: tuple[int, ...]
    bytes: int
    operations: int = 0
    copies: int = 0
    prepare: Callable[[], Prepared]


def all_measures() -> Iterator[Measure]:
    """Yield every row of the table."""
    for group_size in (0, 128):
        for rows, columns, copies, given in LINEARS:
            counted = copies if group_size == 0 else 0
            yield from _of_weight(rows, columns, group_size, given, counted)
    for rank in (2, 8, 16, 64):
        for rows, columns in ((4096, 4096), (11008, 4096), (4096, 11008)):
            yield Measure(
                kernel="encode_weight",
                variant=f"edit of rank {rank}",
                shape=(rows, columns),
                bytes=3 * rows * columns + 4 * rank * (rows + columns),
                operations=2 * rank * rows * columns,
                prepare=partial(_prepare_encode, rows, columns, rank),
            )
    for tokens in (128, 256, 1024):
        for group_size in (0, 128):
            yield Measure(
                kernel="reduced_weight_gradient",
                variant=f"{tokens} tokens{_of_groups(group_size)}",
                shape=(4096, 4096),
                bytes=2 * (4096 * 4096 + 2 * tokens * 4096),
                operations=2 * tokens * 4096 * 4096,
                prepare=partial(_prepare_product, tokens, 4096, 4096, group_size),
            )
    for rows, columns in ((4096, 4096), (11008, 4096), (4096, 11008)):
        yield Measure(
            kernel="low_rank_gradients",
            variant="edit of rank 2, 2048 tokens",
            shape=(rows, columns),
            bytes=2048 * (2 * rows + columns),
            operations=8 * 2048 * (rows + columns),
            prepare=partial(_prepare_edit_gradients, 2048, rows, columns, 2),
        )
    for tokens in (1, 2048):
        yield from _of_tokens(tokens)
    yield Measure(
        kernel="rotate_heads",
        variant="2048 tokens, 32 heads",
        shape=(2048, 4096),
        bytes=4 * 2048 * 4096,
        prepare=partial(_prepare_heads, 2048, 32, 128),
    )


def compile_measure(index: int) -> None:
    """Run one op once, which leaves its machine code in Triton's cache.

    It stands here because a spawned process cannot import a package's `__main__`.
    """
    list(all_measures())[index].prepare().calls[0]()
    torch.cuda.synchronize()


def _of_groups(group_size: int) -> str:
    return f", groups of {group_size}" if group_size else ""


def _of_weight(rows: int, columns: int, group_size: int, given: Sequence[str], copies: int) -> Iterator[Measure]:
    variant = " + ".join(dict.fromkeys({"low_logit": "clip", "high_logit": "clip"}.get(name, name) for name in given))
    common: dict[str, Any] = {"variant": variant + _of_groups(group_size), "shape": (rows, columns), "copies": copies}
    for kernel, size, prepare in (
        ("fake_quant_weight, forward", 4, _prepare_forward),
        ("fake_quant_weight, backward", 4, _prepare_backward),
        ("encode_weight", 3, _prepare_codes),
    ):
        arguments = (rows, columns, group_size, tuple(given))
        yield Measure(kernel=kernel, bytes=size * rows * columns, prepare=partial(prepare, *arguments), **common)


def _of_tokens(tokens: int) -> Iterator[Measure]:
    for columns in (4096, 11008):
        yield Measure(
            kernel="quantize_per_token",
            variant=f"{tokens} tokens",
            shape=(tokens, columns),
            bytes=3 * tokens * columns,
            prepare=partial(_prepare_tokens, tokens, columns),
        )
    yield Measure(
        kernel="rms_norm_quantize",
        variant=f"{tokens} tokens",
        shape=(tokens, 4096),
        bytes=3 * tokens * 4096,
        prepare=partial(_prepare_norm, tokens, 4096),
    )
    yield Measure(
        kernel="silu_mul_quantize",
        variant=f"{tokens} tokens",
        shape=(tokens, 11008),
        bytes=5 * tokens * 11008,
        prepare=partial(_prepare_gate, tokens, 11008),
    )


def _weights(rows: int, columns: int, bytes_of_one: int) -> list[Tensor]:
    return [
        torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
        for _ in range(rotations(bytes_of_one * rows * columns))
    ]


def _split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of an op as its definition takes them."""
    transform = WeightTransform(*(arguments.get(name) for name in WeightTransform._fields))
    logits = {name: arguments.get(name) for name in CLIP}
    grid = {name: arguments[name] for name in ("num_bits", "group_size")}
    return logits | {"transform": transform}, grid


def _given(rows: int, columns: int, group_size: int, given: Sequence[str]) -> dict[str, Any]:
    arguments = learned(rows, columns, group_size)
    return {name: value for name, value in arguments.items() if name in (*given, "num_bits", "group_size")}


def _prepare_forward(rows: int, columns: int, group_size: int, given: Sequence[str]) -> Prepared:
    arguments = _given(rows, columns, group_size, given)
    weights = _weights(rows, columns, 4)
    calls: Calls = [partial(kernels.fake_quant_weight, w, **arguments, out_dtype=torch.bfloat16) for w in weights]
    inputs, grid = _split(arguments)
    expected = partial(definitions.fake_quant_edited_weight_ref, weights[0], **inputs, **grid, out_dtype=torch.bfloat16)

    def check() -> None:
        assert torch.equal(kernels.fake_quant_weight(weights[0], **arguments, out_dtype=torch.bfloat16), expected())

    return Prepared(calls, expected, check)


def _prepare_codes(rows: int, columns: int, group_size: int, given: Sequence[str]) -> Prepared:
    arguments = _given(rows, columns, group_size, given)
    weights = _weights(rows, columns, 3)
    calls: Calls = [partial(kernels.encode_weight, w, **arguments) for w in weights]
    inputs, grid = _split(arguments)
    expected = partial(definitions.encode_weight_ref, weights[0], **inputs, **grid)
    return Prepared(calls, expected, partial(_check_codes, calls[0], expected, 0.0))


def _prepare_encode(rows: int, columns: int, rank: int) -> Prepared:
    left, right = torch.randn(rows, rank, device="cuda") * 0.01, torch.randn(rank, columns, device="cuda") * 0.02
    weights = _weights(rows, columns, 3)
    calls: Calls = [partial(kernels.encode_weight, w, num_bits=8, left=left, right=right) for w in weights]
    transform = WeightTransform(left=left, right=right)
    expected = partial(definitions.encode_weight_ref, weights[0], transform=transform, num_bits=8)
    return Prepared(calls, expected, partial(_check_codes, calls[0], expected, WORST_CODE_SHARE))


def _check_codes(call: Callable[[], Any], expected: Callable[[], Any], allowed: float) -> None:
    """Refuse codes of which more than `allowed` differ, or one by more than one step."""
    difference = (call()[0].int() - expected()[0].int()).abs()
    assert difference.max() <= 1, "codes differ by more than a step"
    assert (difference > 0).float().mean() <= allowed, "too many codes differ"


def _prepare_backward(rows: int, columns: int, group_size: int, given: Sequence[str]) -> Prepared:
    arguments = _given(rows, columns, group_size, given)
    calls = backward_calls(rows, columns, arguments)
    grad, weight = cast("partial[WeightGradients]", calls[0]).args
    _, grid = _split(arguments)
    leaves = {name: arguments[name].detach().requires_grad_() for name in given}
    graph_inputs, _ = _split(arguments | leaves)
    fake = definitions.fake_quant_edited_weight_ref(weight, **graph_inputs, **grid)

    def expected() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fake, list(leaves.values()), grad.float(), retain_graph=True)

    def check() -> None:
        _check_gradients(calls[0](), dict(zip(leaves, expected(), strict=True)))

    return Prepared(calls, expected, check)


def _prepare_product(tokens: int, rows: int, columns: int, group_size: int) -> Prepared:
    arguments = _given(rows, columns, group_size, CLIP)
    weights = _weights(rows, columns, 2)
    grad = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    calls: Calls = [partial(kernels.reduced_weight_gradient, grad, x, weight, **arguments) for weight in weights]
    inputs, grid = _split(arguments)
    expected = partial(
        definitions.reduced_weight_gradient_ref,
        grad,
        x,
        weights[0],
        **inputs,
        **grid,
        symmetric=True,
        scale_dtype=torch.bfloat16,
    )

    def check() -> None:
        found = expected()
        _check_gradients(calls[0](), {name: getattr(found, name) for name in CLIP})

    return Prepared(calls, expected, check)


def _prepare_edit_gradients(tokens: int, rows: int, columns: int, rank: int) -> Prepared:
    left, right = torch.randn(rows, rank, device="cuda") * 0.01, torch.randn(rank, columns, device="cuda") * 0.02
    calls: Calls = edit_gradient_calls(tokens, rows, columns, left, right)
    grad, codes, _, _, scale = cast("partial[tuple[Tensor, Tensor]]", calls[0]).args
    expected = partial(definitions.low_rank_gradients_ref, grad, codes, left, right, scale)

    def check() -> None:
        for found, truth in zip(cast("tuple[Tensor, Tensor]", calls[0]()), expected(), strict=True):
            error = (found - truth).norm() / truth.norm()
            assert error < WORST_GRADIENT_ERROR, f"the gradient of a factor is off by {error:.1e}"

    return Prepared(calls, expected, check)


def _prepare_heads(tokens: int, heads: int, width: int) -> Prepared:
    calls = head_calls(tokens, heads, width)
    expected = partial(definitions.rotate_heads_ref, *cast("partial[Tensor]", calls[0]).args)

    def check() -> None:
        assert torch.equal(cast("Tensor", calls[0]()), expected())

    return Prepared(calls, expected, check)


def _check_gradients(found: Any, expected: dict[str, Tensor]) -> None:
    assert isinstance(found, WeightGradients)
    for name, truth in expected.items():
        error = (getattr(found, name) - truth).norm() / truth.norm()
        assert error < WORST_GRADIENT_ERROR, f"the gradient of {name} is off by {error:.1e}"


def _prepare_tokens(tokens: int, columns: int) -> Prepared:
    sets = [_tokens(tokens, columns) for _ in range(rotations(3 * tokens * columns))]
    calls: Calls = [partial(kernels.quantize_per_token, x) for x in sets]
    expected = partial(reference.quantize_per_token_ref, sets[0])
    return Prepared(calls, expected, partial(_check_codes, calls[0], expected, 0.0))


def _prepare_norm(tokens: int, columns: int) -> Prepared:
    weight = torch.rand(columns, device="cuda").bfloat16() + 0.5
    sets = [_tokens(tokens, columns) for _ in range(rotations(3 * tokens * columns))]
    calls: Calls = [partial(kernels.rms_norm_quantize, x, weight, 1e-5) for x in sets]
    expected = partial(definitions.rms_norm_quantize_ref, sets[0], weight, 1e-5)
    return Prepared(calls, expected, partial(_check_codes, calls[0], expected, WORST_CODE_SHARE))


def _prepare_gate(tokens: int, columns: int) -> Prepared:
    sets = [_tokens(tokens, 2 * columns).split(columns, dim=-1) for _ in range(rotations(5 * tokens * columns))]
    calls: Calls = [partial(kernels.silu_mul_quantize, gate, up) for gate, up in sets]
    expected = partial(definitions.silu_mul_quantize_ref, *sets[0])
    return Prepared(calls, expected, partial(_check_codes, calls[0], expected, WORST_CODE_SHARE))


def _tokens(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
