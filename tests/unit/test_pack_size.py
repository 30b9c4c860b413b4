"""Sizes are known before anything is written, and the disk and the output folder are checked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qrealign.errors import ConfigError, QrealignError
from qrealign.models.checkpoint import WeightFiles, find_weight_files
from qrealign.pack.size import check_output_folder, estimate_packed_bytes, require_free_disk
from tests.unit.pack_helpers import fitted, open_tiny, quantized, write


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a16", "w4a16_asym", "w4a16_channel", "w4a4"])
def test_the_estimate_is_what_is_written(tmp_path: Path, name: str) -> None:
    source = open_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    scheme = fitted(name, source)
    directory = write(source, scheme, quantized(source, scheme), tmp_path / "out")
    assert estimate_packed_bytes(source, scheme) == WeightFiles(find_weight_files(directory)).total_bytes


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert require_free_disk(tmp_path / "not" / "yet", 0) == pytest.approx(free, rel=0.2)
    with pytest.raises(QrealignError, match=r"has .* GiB free and 1048576\.0 GiB are needed"):
        require_free_disk(tmp_path, 2**50)


def test_output_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output_folder(tmp_path / "new" / "deep", marker="run.json")
    check_output_folder(tmp_path, marker="run.json")
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds something else \(0\.txt, 1\.txt, 2\.txt, \.\.\.\)"):
        check_output_folder(tmp_path, marker="run.json")
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    check_output_folder(tmp_path, marker="run.json")
    with pytest.raises(ConfigError, match="is a file"):
        check_output_folder(tmp_path / "0.txt", marker="run.json")
    with pytest.raises(ConfigError, match=r"0\.txt is a file"):
        check_output_folder(tmp_path / "0.txt" / "deep", marker="run.json")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_output_folder(tmp_path, marker="run.json")
