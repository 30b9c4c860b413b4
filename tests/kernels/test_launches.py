"""Launch tables: what is asked for, and what stands in for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qrealign_kernels import launches


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tables = {
        "default": {"product": {"default": {"BLOCK_M": 16}, "small": {"BLOCK_M": 8}}},
        "sm90": {"product": {"small": {"BLOCK_M": 64}}},
    }
    for name, table in tables.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    monkeypatch.setattr(launches, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    launches.gpu_class.cache_clear()
    launches.table.cache_clear()
    yield
    launches.gpu_class.cache_clear()
    launches.table.cache_clear()


def test_a_known_gpu_uses_its_own_table_first(tables: None) -> None:
    assert launches.choice("product", "small", torch.device("cuda:0")) == {"BLOCK_M": 64}
    assert launches.choice("product", "large", torch.device("cuda:0")) == {"BLOCK_M": 16}


def test_unknown_gpus_and_the_cpu_use_the_safe_default(tables: None) -> None:
    assert launches.choice("product", "small", torch.device("cuda:1")) == {"BLOCK_M": 8}
    assert launches.choice("product", "small", torch.device("cpu")) == {"BLOCK_M": 8}


def test_a_key_with_suffixes_falls_back_to_the_key_without(tables: None) -> None:
    assert launches.choice("product", "small-wide", torch.device("cuda:0")) == {"BLOCK_M": 64}
    assert launches.choice("product", "large-wide-few", torch.device("cpu")) == {"BLOCK_M": 16}


def test_wide_and_long_weights_have_keys_of_their_own() -> None:
    shapes = ((8192, 8192), (11008, 4096), (4096, 11008), (11008, 11008))
    assert [launches.by_shape("m8", *shape) for shape in shapes] == ["m8", "m8-wide", "m8-long", "m8-wide"]


def test_a_kernel_without_an_entry_is_an_error(tables: None) -> None:
    with pytest.raises(KeyError, match="no launch table has a choice for other"):
        launches.choice("other", "small")


def test_a_forced_choice_ends_with_its_block(tables: None) -> None:
    with pytest.raises(RuntimeError), launches.forced("product", {"BLOCK_M": 1}):
        assert launches.choice("product", "small") == {"BLOCK_M": 1}
        raise RuntimeError
    assert launches.choice("product", "small") == {"BLOCK_M": 8}
