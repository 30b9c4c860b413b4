"""Operators that torch.compile does not look into: nothing traces into a kernel launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def opaque(function: Callable[..., Any], results: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as the operator `qrealign::NAME`, NAME being its own without an underscore in front.

    Args:
        function: annotated, which gives the operator's schema; writes to none of its arguments.
        results: takes the same arguments and returns empty tensors like the function's, for the tracing.
    """
    name = f"qrealign::{function.__name__.removeprefix('_')}"
    operator = torch.library.custom_op(name, function, mutates_args=())
    operator.register_fake(results)
    return operator
