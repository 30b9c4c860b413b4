"""The settings of a server and its command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

from qrealign.deploy import CACHE_BITS, HEAD_BITS
from qrealign.errors import ConfigError

KEY_VARIABLE = "QREALIGN_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DTYPES = ("float32", "bfloat16", "float16")
_EPILOG = f"""\
The model is a folder or Hub id, packed (compressed-tensors) or plain; with neither --api-key nor {KEY_VARIABLE} anyone
who reaches the port may use it. docs/serve.md describes the protocol, the limits and the metrics.

exit status: 0 shut down, 2 bad input, 1 the server failed
"""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve a model; see the command line's help for the meaning of each field.

    Raises:
        ConfigError: a value is out of its range.
    """

    model: str
    served_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] | None = None
    device: str = "auto"
    dtype: str | None = None
    max_slots: int | None = None
    max_length: int | None = None
    cache_bits: int | None = None
    head_bits: int | None = None
    embedding_on_host: bool = False
    cuda_graphs: bool = True
    max_queue: int = 256
    max_body_bytes: int = 1 << 20
    body_timeout: float = 30.0
    request_timeout: float = 300.0
    grace: float = 20.0

    def __post_init__(self) -> None:
        for name, least in (
            ("port", 0),
            ("max_slots", 1),
            ("max_queue", 0),
            ("max_body_bytes", 256),
            ("grace", 0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:  # NaN is neither
                raise ConfigError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
        for name in ("request_timeout", "body_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        if self.port > 65535:
            raise ConfigError(f"--port must be 65535 or less, got {self.port}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key == self.api_key.strip() != ""):
            raise ConfigError("the API key must be ASCII text that is not blank, with no white space around it")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOOPBACK

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """The names in the Host header that are answered, None for all: a web page must not reach a loopback server."""
        return self.allowed_hosts or (LOOPBACK if self.is_loopback else None)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. Flags left out are absent, so the defaults of `ServeOptions` hold."""
    parser = argparse.ArgumentParser(
        prog="python -m qrealign.serve",
        description="Serve a model with OpenAI's protocol, and a page to try it at /.",
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    default = {field.name: field.default for field in fields(ServeOptions)}
    group = parser.add_argument_group("address")
    group.add_argument("--host", metavar="ADDRESS", help=f"default: {default['host']}, this machine alone")
    group.add_argument("--port", type=int, metavar="N", help=f"default: {default['port']}; 0 takes a free one")
    group.add_argument("--served-name", metavar="NAME", help="the model's name in requests (default: its folder's)")
    group.add_argument(
        "--api-key", metavar="KEY", help=f"required of every request; better in {KEY_VARIABLE}, which ps does not show"
    )
    group.add_argument(
        "--allowed-hosts",
        nargs="+",
        metavar="NAME",
        help="Host headers answered (default: loopback names there, else all)",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--device", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument("--dtype", choices=DTYPES, metavar="NAME", help=f"{', '.join(DTYPES)} (default: the device's)")
    group.add_argument(
        "--max-slots", type=int, metavar="N", help="sequences at once (default: 32, fewer if memory is short)"
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a prompt and its answer (default: the model's, up to 4096)",
    )
    group.add_argument(
        "--cache-bits",
        type=int,
        choices=CACHE_BITS,
        metavar="N",
        help="8 keeps keys and values as int8 codes: twice the tokens in the same memory (default: the model's dtype)",
    )
    group.add_argument(
        "--head-bits", type=int, choices=HEAD_BITS, metavar="N", help="8 rounds a packed model's head to int8"
    )
    group.add_argument(
        "--embedding-on-host", action="store_true", help="keep a packed model's embedding in the host's memory"
    )
    group.add_argument(
        "--cuda-graphs", action=argparse.BooleanOptionalAction, help="replay prompts and steps on a GPU (default: yes)"
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-queue", type=int, metavar="N", help=f"waiting sequences (default: {default['max_queue']})"
    )
    group.add_argument("--max-body-bytes", type=int, metavar="N", help=f"default: {default['max_body_bytes']}")
    group.add_argument(
        "--body-timeout", type=float, metavar="S", help=f"to receive a body (default: {default['body_timeout']:g})"
    )
    group.add_argument(
        "--request-timeout", type=float, metavar="S", help=f"for an answer (default: {default['request_timeout']:g})"
    )
    group.add_argument(
        "--grace", type=float, metavar="S", help=f"for running requests on shutdown (default: {default['grace']:g})"
    )
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> ServeOptions:
    """Return the options of a command line; the API key may come from the environment.

    Raises:
        ConfigError: an option is wrong.
    """
    flags = vars(build_parser().parse_args(arguments))
    flags.setdefault("api_key", os.environ.get(KEY_VARIABLE) or None)
    if "allowed_hosts" in flags:
        flags["allowed_hosts"] = tuple(flags["allowed_hosts"])
    return ServeOptions(**flags)
