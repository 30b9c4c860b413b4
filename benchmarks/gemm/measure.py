"""Times one peer, in a process of its own: one that is missing, crashes or hangs costs itself alone.

`python -m benchmarks.gemm.measure PEER --log FILE` appends a JSON line a shape and number of tokens. It imports what it
needs, which takes seconds, then waits for a line that names the GPU: a peer is ready when the one before it has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton.testing

from benchmarks.gemm.peers import BASELINE, LARGE, PEERS, ROWS, ROWS_OF, TUNING, Peer
from benchmarks.timing import eager_seconds, graph_seconds_by_turns, rotations

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 12288))  # (K, N) of Llama-2-7B: o, gate and up, down, qkv
SWEEP_S = 0.01  # of calls between two looks at the clock


def rows_of(peer: str) -> tuple[int, ...]:
    """Return the numbers of tokens at which a peer is timed."""
    return ROWS_OF.get(peer, ROWS)


def first_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def let_tuners_measure(briefly: bool) -> None:
    """Shorten the measurements of peers that tune themselves; not `briefly`: choose by none, only compile.

    They call triton's timer, by its name.
    """
    if briefly:
        triton.testing.do_bench = functools.partial(triton.testing.do_bench, warmup=2, rep=8)
    else:
        triton.testing.do_bench = lambda call, **options: (call(), [1.0, 1.0, 1.0])[1]


def few_enough(calls: Sequence[Callable[[], Any]]) -> Sequence[Callable[[], Any]]:
    """Return as many calls as a sweep needs: two weights are out of the cache where a product takes long."""
    return calls[: max(2, math.ceil(SWEEP_S / eager_seconds(calls[0], repeats=2)))]


def baseline_calls(columns: int, outputs: int, tokens: int) -> Sequence[Callable[[], torch.Tensor]]:
    """Return calls of the baseline's product over weights that do not stay in the cache."""
    peer = PEERS[BASELINE]()
    random = functools.partial(torch.randn, device="cuda", dtype=peer.dtype)
    return [
        functools.partial(peer.multiply, random(outputs, columns) * 0.02, random(tokens, columns))
        for _ in range(rotations(columns * outputs * peer.bits // 8))
    ]


def time_product(peer: Peer, packed: list[Any], plain: torch.Tensor, tokens: int, *, by_turns: bool) -> dict[str, Any]:
    """Return one row: microseconds of one product in a CUDA graph and issued from Python, and its relative error.

    Args:
        peer: whose product.
        packed: weights as the peer packed them, `rotations` of them.
        plain: `[N, K]`, the first of them.
        tokens: M.
        by_turns: time the baseline's product by turns with it, for `baseline_us`.
    """
    inputs = [torch.randn(tokens, plain.shape[1], device="cuda", dtype=peer.dtype) for _ in packed]
    prepared = [peer.prepare(x) for x in inputs]
    calls: Sequence[Callable[[], torch.Tensor]] = [
        functools.partial(peer.multiply, *pair) for pair in zip(packed, prepared, strict=True)
    ]
    row: dict[str, Any] = {}
    if peer.scaled:
        want, got = (inputs[0] @ plain.T).float(), calls[0]().float()
        row["error"] = ((got - want).norm() / want.norm()).item()
    calls = few_enough(calls)
    row["eager_us"] = 1e6 * eager_seconds(lambda: [call() for call in calls]) / len(calls)
    works = [calls]
    if by_turns:
        works.append(few_enough(baseline_calls(plain.shape[1], plain.shape[0], tokens)))
    try:
        row |= dict(zip(("us", "baseline_us"), (1e6 * found for found in graph_seconds_by_turns(*works)), strict=False))
    except Exception as error:
        row |= {"us": row["eager_us"], "note": f"no CUDA graph: {first_line(error)}"}
    return row


@torch.no_grad()
def measure(name: str, shapes: list[tuple[int, int]], rows: list[int], log: Path) -> None:
    """Time a peer at every shape and number of tokens."""
    try:
        peer = PEERS[name]()
    except ImportError as error:
        append(log, peer=name, note=f"not installed: {error}")
        return
    for columns, outputs in shapes:
        plain = torch.randn(outputs, columns, device="cuda", dtype=peer.dtype) * 0.02
        count = rotations(columns * outputs * peer.bits // 8)
        try:
            packed = [
                peer.pack(plain.clone() if not index else torch.randn_like(plain) * 0.02) for index in range(count)
            ]
        except Exception as error:
            append(log, peer=name, K=columns, N=outputs, note=first_line(error))
            continue
        for tokens in rows:
            try:
                row = time_product(peer, packed, plain, tokens, by_turns=tokens in LARGE and name != BASELINE)
            except Exception as error:
                row = {"note": first_line(error)}
            append(log, peer=name, K=columns, N=outputs, M=tokens, **row)


@torch.no_grad()
def compile_only(name: str, shapes: list[tuple[int, int]], rows: list[int]) -> None:
    """Fill the kernel cache of a peer that tunes itself, so that it need not compile while it is timed."""
    peer = PEERS[name]()
    for columns, outputs in shapes:
        packed = peer.pack(torch.randn(outputs, columns, device="cuda", dtype=peer.dtype) * 0.02)
        for tokens in rows:
            peer.multiply(packed, peer.prepare(torch.randn(tokens, columns, device="cuda", dtype=peer.dtype)))


def append(log: Path, **row: object) -> None:
    """Add a row to the log, and show it."""
    line = json.dumps(row)
    print(line, flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm.measure", description=__doc__)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", type=int, default=list(range(len(SHAPES))), help="indices")
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--device", type=int, help="index of the GPU; without it, a line of standard input says it")
    args = parser.parse_args()
    with contextlib.suppress(ImportError):
        PEERS[args.peer]()
    device = args.device if args.device is not None else int(sys.stdin.readline())
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    shapes, rows = [SHAPES[index] for index in args.shapes], args.rows or list(rows_of(args.peer))
    if args.peer in TUNING:
        let_tuners_measure(briefly=not args.compile_only)
    if args.compile_only:
        compile_only(args.peer, shapes, rows)
    else:
        measure(args.peer, shapes, rows, args.log)


if __name__ == "__main__":
    main()
