"""`python -m benchmarks.decode`: prefill, decode and memory of whole models, packed against plain.

    python -m benchmarks.decode --geometry llama-2-7b

Needs no files: weights are random. One GPU; some minutes, most of them compiling. Every measured row replaces the one
of the same settings in the results, and the tables of the documentation are written anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.calibration.geometries import GEOMETRIES
from benchmarks.decode.results import DOCUMENT, RESULTS, publish, read_rows, store_profile, store_rows
from qrealign.status import exit_status

WEIGHTS = ("bf16", "w8a8", "w4a16")


def main(arguments: list[str] | None = None) -> int:
    """Measure and publish; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", default="llama-2-7b", metavar="NAME", help=f"one of {', '.join(GEOMETRIES)}")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer decoder blocks than the model has")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), metavar="NAME", help="bf16, or a scheme")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N", help="sequences (default: 1 8)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the steps that torch.compile has fused")
    parser.add_argument(
        "--small", action="store_true", help="packed weights with an int8 head and cache, and the embedding on the host"
    )
    parser.add_argument(
        "--prompt-piece", type=int, metavar="N", help="read prompts N tokens at a time, recorded (default: whole)"
    )
    parser.add_argument("--profile", action="store_true", help="also write the kernels of a step with their times")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the rows are kept")
    parser.add_argument("--docs", type=Path, metavar="FILE", help=f"also write the tables of {DOCUMENT.name} there")
    parser.add_argument(
        "--only-report", action="store_true", help="measure nothing; tables and figures of what is there"
    )
    options = parser.parse_args(arguments)
    if min([*options.batches, options.prompt_piece or 1]) < 1:
        parser.error("--batches and --prompt-piece must be 1 or more")
    return exit_status(lambda: _run(options), interrupted="the rows that were measured are kept")


def _run(options: argparse.Namespace) -> int:
    if not options.only_report:
        _measure(options)
    print(publish(read_rows(options.results), options.results, options.docs))
    return 0


def _measure(options: argparse.Namespace) -> None:
    from benchmarks.calibration.geometries import find_geometry
    from benchmarks.decode.measure import Settings, load, measure, profile_steps, random_prompt
    from qrealign.models.device import choose_device

    geometry, device = find_geometry(options.geometry, options.layers), choose_device(options.device)
    for name in options.weights:
        scheme = None if name == "bf16" else name
        small = options.small and scheme is not None
        model, sizes = load(geometry, scheme, device, small=small)
        for compiled in (False,) if options.no_compile else (False, True):
            for batch in options.batches:
                settings = Settings(batch=batch, compiled=compiled, small=small, prompt_piece=options.prompt_piece)
                row, decoder = measure(model, geometry, scheme, settings, sizes)
                store_rows(options.results, [row])
                print(f"{name} batch {batch} {'compiled' if compiled else 'plain'}: {row.step_ms:.3f} ms", flush=True)
                if options.profile and device.type == "cuda":
                    kernels = profile_steps(decoder, random_prompt(geometry, settings, device))
                    store_profile(options.results, row, kernels)
                del decoder
        del model


if __name__ == "__main__":
    sys.exit(main())
