"""`python -m benchmarks.gemm`: time quantized products at the shapes of Llama-2-7B beside other projects' in one run.

Tokens are quantized inside the timed call, weights rotate past the L2 cache, times are medians of one product in a CUDA
graph (`us`) and issued from Python (`eager_us`). Where products are so large that the GPU is at its power limit, each
peer takes turns with the baseline (`baseline_us`): a chip that has warmed up runs at lower clocks. Peers that are not
installed are named in the table. Nothing is timed unless the products' tests pass here first.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import summary
from benchmarks.docs import put_table, split_document
from benchmarks.gemm.figures import figures, from_csv, table, to_csv
from benchmarks.gemm.measure import SHAPES
from benchmarks.gemm.peers import BASELINE, PEERS, ROWS, TUNING
from qrealign.errors import ConfigError, DeviceError
from qrealign.files import write_text
from qrealign.status import exit_status

DOCS_NAME = "gemm sweep"
RESULTS = Path(__file__).parents[1] / "results"
TESTS = Path(__file__).parents[2] / "tests" / "kernels" / "test_packed_linear.py"
LARGEST_TUNED = 256  # tokens; gemlite takes one tuning for this and all larger numbers
SECONDS = 240  # of one peer; then it is stopped and what it has measured stands


def require_green_tests() -> None:
    """Run the products' tests on this GPU; end the program if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton or routes", str(TESTS)]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{TESTS.name} does not pass on this GPU, so nothing is timed")


class Child:
    """`benchmarks.gemm.measure` for a peer in a process of its own, which has started and waits for its turn."""

    def __init__(self, peer: str, log: Path, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.gemm.measure", peer, "--log", str(log), *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True)

    def run(self, device: int, seconds: float) -> str | None:
        """Let it work on a GPU; return why it did not end well, or None."""
        try:
            _, errors = self._process.communicate(f"{device}\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return f"stopped after {seconds:.0f} s"
        lines, status = errors.strip().splitlines(), self._process.returncode
        return (lines[-1][:200] if lines else f"exit status {status}") if status else None


def compile_tuners(peers: Sequence[str], rows: Sequence[int], seconds: float, device: int) -> None:
    """Fill the kernel caches of peers that tune themselves on all cores; what fails here fails again when timed."""
    end = time.monotonic() + seconds
    jobs = [(peer, m, shape) for m in rows if m <= LARGEST_TUNED for peer in peers for shape in range(len(SHAPES))]

    def compile_one(job: tuple[str, int, int]) -> None:
        peer, m, shape = job
        arguments = ["--compile-only", "--shapes", str(shape), "--rows", str(m)]
        if (left := end - time.monotonic()) > 0:
            Child(peer, Path(os.devnull), arguments).run(device, left)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))


def measure_all(
    peers: Sequence[str], rows: Sequence[int] | None, seconds: float, devices: int, tuning: Sequence[str] = ()
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of one peer after the other.

    With several GPUs, as many peers are timed at once, and the last GPU first compiles for those that are `tuning`. One
    process more than there are GPUs has started, so that a peer is imported while another one is timed.
    """
    arguments = [] if rows is None else ["--rows", *map(str, rows)]
    free: queue.Queue[int] = queue.Queue()
    for device in range(devices - 1):
        free.put(device)

    def compile_first() -> None:
        compile_tuners(tuning, rows or ROWS, seconds, devices - 1)
        free.put(devices - 1)

    def measure(peer: str) -> list[dict[str, Any]]:
        if peer in tuning:
            compiling.result()
        log = Path(folder, f"{peers.index(peer)}.jsonl")
        log.touch()
        child = Child(peer, log, arguments)
        device = free.get()
        print(f"timing {peer}", flush=True)
        why = child.run(device, seconds)
        free.put(device)
        found = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        return found + ([] if why is None else [{"peer": peer, "note": why}])

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(devices + 1) as pool:
        compiling = pool.submit(compile_first)
        yield from pool.map(measure, peers)


def record(rows: list[dict[str, Any]], output: Path) -> None:
    """Write the rows so far, and the figures that they give."""
    rows.sort(key=lambda row: list(PEERS).index(row["peer"]))
    write_text(output / "gemm.csv", to_csv(rows))
    for section, values in figures(rows).items():
        summary.record(section, values, path=output / summary.SUMMARY.name)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return from_csv(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): measure first, or name its folder") from error


def report(rows: list[dict[str, Any]], docs: Path | None) -> None:
    """Show the table, and put it into the document."""
    print(table(rows))
    if docs is not None:
        put_table(docs, DOCS_NAME, table(rows))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm", description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="PEER")
    parser.add_argument("--rows", nargs="+", type=int, help=f"numbers of tokens; default: {ROWS} and what peers add")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for one peer (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of gemm.csv and summary.json")
    parser.add_argument("--docs", type=Path, help="document that holds the table, such as docs/products.md")
    parser.add_argument("--only-report", action="store_true", help="time nothing: render what gemm.csv holds")
    parser.add_argument("--skip-compile", action="store_true", help="what peers tune is in Triton's cache already")
    parser.add_argument("--skip-tests", action="store_true", help="the tests have just passed on this GPU")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    return exit_status(lambda: _run(args), interrupted="the rows that were measured are kept")


def _run(args: argparse.Namespace) -> int:
    if args.docs is not None:
        split_document(args.docs, DOCS_NAME)  # before hours of measuring
    if args.only_report:
        report(_read_rows(args.output / "gemm.csv"), args.docs)
        return 0
    if not torch.cuda.is_available():  # found before rows that were measured elsewhere are replaced
        raise DeviceError("the products are timed on a GPU, and this machine shows none: run this where one is")
    if not args.skip_tests:
        require_green_tests()
    args.output.mkdir(parents=True, exist_ok=True)
    peers = list(dict.fromkeys([BASELINE, *args.peers]))
    stamp, rows = summary.provenance(), []
    compiling = [] if args.skip_compile else [peer for peer in peers if peer in TUNING]
    for found in measure_all(peers, args.rows, args.seconds, torch.cuda.device_count(), compiling):
        rows += [row | stamp for row in found]
        record(rows, args.output)
    report(rows, args.docs)
    for section, values in figures(rows).items():
        print(section, values)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
