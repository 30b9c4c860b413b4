"""`python -m qrealign.serve MODEL`: a model behind OpenAI's protocol."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from qrealign.errors import ConfigError
from qrealign.serve.options import ServeOptions, parse_options
from qrealign.status import exit_status

_EXTRA = {"fastapi", "uvicorn", "prometheus_client", "pydantic", "starlette"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; return 0, or another exit status after one sentence on standard error."""
    return exit_status(lambda: _run(arguments), interrupted="the model was not loaded yet")


def _run(arguments: Sequence[str] | None) -> int:
    options = parse_options(arguments)
    serve = _import_serve()
    serve(options, lambda line: print(line, file=sys.stderr, flush=True))
    return 0


def _import_serve() -> Callable[[ServeOptions, Callable[[str], None]], None]:
    """Return the function that serves.

    Raises:
        ConfigError: what the server needs beyond the project is not installed.
    """
    try:
        from qrealign.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise ConfigError(f"the server needs {error.name}: install it with pip install 'qrealign[serve]'") from error
    return serve


if __name__ == "__main__":
    sys.exit(main())
