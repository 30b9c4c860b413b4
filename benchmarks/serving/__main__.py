"""`python -m benchmarks.serving`: a server under load.

    python -m benchmarks.serving http://127.0.0.1:8000
    python -m benchmarks.serving --start out/demo/model
    python -m benchmarks.serving --start llama-2-7b:w4a16      (random weights of a model's size)

Measures streams at once, level by level, then lets a storm of clients loose that leave or send what is no request.
Rows go into benchmarks/results/serving.csv, from which the table of docs/serve.md is written anew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serving.load import measure_level
from benchmarks.serving.results import DOCUMENT, RESULTS, describe_storm, publish, read_rows, row_of, store
from benchmarks.serving.storm import run_storm
from benchmarks.summary import provenance
from qrealign.errors import ConfigError, QrealignError
from qrealign.status import exit_status

_ADDRESS = re.compile(r"at (http://[^\s/]+)/")


def main(arguments: list[str] | None = None) -> int:
    """Measure and publish; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", help="a server that runs already")
    parser.add_argument("--start", metavar="MODEL", help="start one on this machine: a folder, or GEOMETRY:WEIGHTS")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 16, 64], metavar="N", help="levels of load")
    parser.add_argument("--requests", type=int, default=4, metavar="N", help="per stream (default: 4)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer")
    parser.add_argument("--storm", type=int, default=200, metavar="N", help="clients of the storm, 0 for none")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of the storm")
    parser.add_argument("--label", help="name of the rows (default: the model's)")
    parser.add_argument(
        "--flags", nargs="*", default=[], metavar="FLAG", help="further flags of the started server, without --"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the rows are kept")
    parser.add_argument("--docs", type=Path, metavar="FILE", help=f"also write the table of {DOCUMENT.name} there")
    parser.add_argument("--only-report", action="store_true", help="measure nothing; the table of what is there")
    options = parser.parse_args(arguments)
    if [options.url is not None, options.start is not None, options.only_report].count(True) != 1:
        parser.error("give the address of a server, --start MODEL or --only-report")
    return exit_status(lambda: _run(options), interrupted="the rows that were measured are kept")


def _run(options: argparse.Namespace) -> int:
    if options.start is not None:
        with started(options.start, [f"--{flag}" for flag in options.flags]) as url:
            asyncio.run(_measure(url, options))
    elif not options.only_report:
        asyncio.run(_measure(options.url, options))
    print(publish(read_rows(options.results), options.docs))
    return 0


async def _measure(url: str, options: argparse.Namespace) -> None:
    """Run the levels and the storm."""
    stamp = provenance()  # before the first row is written: from then on the tree is another
    try:
        warm_up = {"streams": 2, "requests": 2, "prompt_tokens": options.prompt_tokens, "tokens": 4, "seed": 1}
        await measure_level(url, **warm_up)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no server answers at {url} ({error}): start one, or name its address") from error
    for streams in options.streams:
        level = await measure_level(
            url,
            streams=streams,
            requests=streams * options.requests,
            prompt_tokens=options.prompt_tokens,
            tokens=options.tokens,
        )
        store(options.results, await row_of(url, options.label, level, stamp))
        print(
            f"{streams} streams: {level.tokens_per_s:.1f} tokens/s, first {level.first_p50_ms:.0f} ms, "
            f"next {level.token_p50_ms:.1f} ms",
            flush=True,
        )
    if options.storm:
        storm = await run_storm(url, clients=options.storm, rounds=options.rounds)
        print(describe_storm(storm), flush=True)
        if not storm.answers or storm.running or storm.waiting or storm.statuses.get(500):
            raise QrealignError("the server did not come through the storm")


@contextmanager
def started(model: str, flags: list[str]) -> Iterator[str]:
    """Start a server and yield its address; it ends with the block.

    Raises:
        QrealignError: it does not come up.
    """
    geometry, _, weights = model.partition(":")
    command = (
        ["benchmarks.serving.synthetic", geometry, weights] if weights else ["qrealign.serve", model, "--port", "0"]
    )
    process = subprocess.Popen(
        [sys.executable, "-m", *command, *flags], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line.rstrip())
            if found := _ADDRESS.search(line):
                yield found[1]
                return
        raise QrealignError(f"the server did not start: {' / '.join(lines[-3:])}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
