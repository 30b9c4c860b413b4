"""qrealign: a fine-tuned language model in, a quantized, realigned, servable checkpoint and its proof out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrealign.deploy.load import load_packed

__version__ = "0.1.0"
__all__ = ["__version__", "load_packed"]


def __getattr__(name: str) -> object:
    """Import `load_packed` when it is asked for: importing the package alone loads neither torch nor transformers."""
    if name == "load_packed":
        from qrealign.deploy.load import load_packed

        return load_packed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
