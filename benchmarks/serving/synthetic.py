"""A server over random weights of a real model's size: what it answers means nothing, how fast it does is the same."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from benchmarks.calibration.geometries import find_geometry
from benchmarks.decode.measure import load
from qrealign.models.device import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `size` ids, each of them a word, so that every token is seen in a stream."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main() -> None:
    """Serve a geometry until a signal ends the server."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.synthetic", description=__doc__)
    parser.add_argument("geometry")
    parser.add_argument("weights", help="bf16, or a scheme")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer decoder blocks than the model has")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-slots", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--small", action="store_true", help="an int8 head and cache, and the embedding on the host")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    options = parser.parse_args()
    from qrealign.data.encode import ChatEncoder
    from qrealign.serve.loading import ServedModel
    from qrealign.serve.options import ServeOptions
    from qrealign.serve.server import listen, run_server

    geometry, device = find_geometry(options.geometry, options.layers), choose_device(options.device)
    model, _ = load(geometry, None if options.weights == "bf16" else options.weights, device, small=options.small)
    encoder = ChatEncoder(word_tokenizer(geometry.vocabulary), max_length=options.max_length)
    served = ServedModel(
        name=geometry.name,
        model=model,
        encoder=encoder,
        stop_ids=frozenset(),
        scheme=options.weights + (" in less memory" if options.small else ""),
        verdict=None,
    )
    settings = ServeOptions(
        model=geometry.name,
        port=0,
        max_slots=options.max_slots,
        max_length=options.max_length,
        cache_bits=8 if options.small else None,
        cuda_graphs=not options.no_cuda_graphs,
        max_queue=1024,
    )
    with listen(settings.host, settings.port) as listener:
        run_server(served, settings, listener, lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()
