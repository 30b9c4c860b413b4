"""Makes every test deterministic and the Triton kernels runnable without a GPU."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this when a kernel is decorated, so it must stand before qrealign_kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Compute on one thread: results do not depend on the machine, and workers do not fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def frozen_modules() -> Iterator[None]:
    """Leave what importing the tests made out of garbage collections: they took a quarter of the runs' time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def untraced_kernels() -> Iterator[None]:
    """Interpret Triton kernels without the trace function of coverage, under which that takes over twice as long.

    The coverage leaves their bodies out, see pyproject.toml: on a GPU no Python runs them. A debugger's trace stays.
    """
    coverage = sys.modules.get("coverage")
    if HAS_GPU or find_spec("triton") is None or coverage is None or coverage.Coverage.current() is None:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def untraced(self: Any, *args: Any, **kwargs: Any) -> None:
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            run(self, *args, **kwargs)
        finally:
            sys.settrace(trace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", untraced)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
