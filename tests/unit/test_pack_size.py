"""Sizes are known before anything is written, and the disk is checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qrealign.errors import QrealignError
from qrealign.models.checkpoint import WeightFiles, find_weight_files
from qrealign.pack.size import estimate_packed_bytes, require_free_disk
from tests.unit.pack_helpers import fitted, open_tiny, quantized, write


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a16", "w4a16_asym", "w4a16_channel", "w4a4"])
def test_the_estimate_is_what_is_written(tmp_path: Path, name: str) -> None:
    source = open_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    scheme = fitted(name, source)
    directory = write(source, scheme, quantized(source, scheme), tmp_path / "out")
    assert estimate_packed_bytes(source, scheme) == WeightFiles(find_weight_files(directory)).total_bytes


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert require_free_disk(tmp_path / "not" / "yet", 0) == pytest.approx(free, rel=0.2)
    with pytest.raises(QrealignError, match=r"has .* GiB free and 1048576\.0 GiB are needed"):
        require_free_disk(tmp_path, 2**50)
