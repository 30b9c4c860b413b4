"""From a command line to a listening server, and from a signal to its orderly end."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from qrealign.errors import ConfigError, DeviceError
from qrealign.models.device import choose_device
from qrealign.serve.app import build_app
from qrealign.serve.engine import Engine
from qrealign.serve.loading import ServedModel, load_served
from qrealign.serve.options import KEY_VARIABLE, ServeOptions
from qrealign.serve.runner import Runner, fitting_slots

Say = Callable[[str], None]

_DEFAULT_SLOTS = 32
_LAST_BYTES_S = 5  # for responses to reach their clients once no job is left
_IDLE_CONNECTION_S = 30


class DrainingServer(uvicorn.Server):
    """Ends in order: the first signal refuses new requests and lets running ones finish, a second one ends them too.

    Args:
        config: uvicorn's.
        engine: whose jobs are waited for.
        grace: seconds that running requests have.
        ready: called when the server listens.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine = engine
        self._grace = grace
        self._ready = ready
        self._drain_until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at the second signal, end now."""
        if self._drain_until is not None:
            self._drain_until = 0.0
            self.force_exit = sig == signal.SIGINT
            return
        self._drain_until = time.monotonic() + self._grace
        self._engine.drain()

    async def on_tick(self, counter: int) -> bool:
        """Tell, ten times a second, whether it is time to go."""
        if self._drain_until is not None and not self.should_exit:
            load = self._engine.load()
            if not load.running + load.waiting or time.monotonic() > self._drain_until:
                self._engine.stop()
                self.should_exit = True
        return await super().on_tick(counter)


def serve(options: ServeOptions, say: Say) -> None:
    """Load the model and serve it until a signal ends the server.

    Raises:
        QrealignError: the model, the device or the address cannot be used.
    """
    device = choose_device(options.device)
    # First the address: minutes of loading must not end in a port that is taken.
    with listen(options.host, options.port) as listener:
        say(f"loading {options.model} on {device}")
        served = load_served(
            options.model,
            device=device,
            dtype=options.dtype,
            max_length=options.max_length,
            name=options.served_name,
            head_bits=options.head_bits,
            embedding_on_host=options.embedding_on_host,
        )
        run_server(served, options, listener, say)


def run_server(served: ServedModel, options: ServeOptions, listener: socket.socket, say: Say) -> None:
    """Serve a loaded model on a socket until a signal ends the server.

    Raises:
        DeviceError: its slots do not fit into the memory.
        UnsupportedArchitectureError: it cannot be batched.
    """
    runner = open_runner(served, options)
    app = build_app(served, runner, options)
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )

    def ready() -> None:
        for line in _greeting(served, runner, options, listener):
            say(line)

    DrainingServer(config, app.state.server.engine, options.grace, ready).run(sockets=[listener])
    say("shut down")


def open_runner(served: ServedModel, options: ServeOptions) -> Runner:
    """Return the model's slots, checked on two prompts.

    Raises:
        DeviceError: they do not fit into the memory.
        UnsupportedArchitectureError: the model cannot be batched.
    """
    length = served.encoder.max_length
    fitting = fitting_slots(served.model, length, options.max_slots or _DEFAULT_SLOTS, options.cache_bits)
    if options.max_slots is not None and fitting < options.max_slots:
        raise DeviceError(
            f"{options.max_slots} slots of {length} tokens do not fit into the free memory, {fitting} do: lower "
            "--max-slots or --max-length"
        )
    runner = Runner(
        served.model,
        slots=fitting,
        max_length=length,
        cache_bits=options.cache_bits,
        cuda_graphs=options.cuda_graphs,
    )
    runner.check()
    runner.warm_up()
    return runner


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # the latter: no host can have such a name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host} port {port} ({reason}): choose another") from error


def _greeting(served: ServedModel, runner: Runner, options: ServeOptions, listener: socket.socket) -> list[str]:
    """Return what an operator should know at the start."""
    host, port = (f"[{options.host}]" if ":" in options.host else options.host), listener.getsockname()[1]
    verdict = served.verdict
    lines = [
        f"serving {served.name} ({served.scheme}, {runner.slots} slots of {runner.max_length} tokens, {runner.device}) "
        f"at http://{host}:{port}/",
        "report: none beside the folder, so nothing is known of the model's safety"
        if verdict is None
        else f"report: {'passed' if verdict.passed else 'NOT PASSED'}, {verdict.headline}",
        *served.encoder.notes,
    ]
    if not options.is_loopback and options.api_key is None:
        lines.append(f"warning: anyone who reaches {options.host} may use this server: set {KEY_VARIABLE}")
    return lines
