"""The benchmark of whole models: random checkpoints that load as files do, rows, tables and figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.calibration.geometries import find_geometry
from benchmarks.decode import __main__ as command
from benchmarks.decode import measure, quality, results
from benchmarks.decode.synthetic import random_source
from qrealign.config import parse_scheme
from qrealign.deploy.load import deploy_model
from qrealign.pack.size import packed_linear_bytes
from qrealign.pack.source import PackedSource
from qrealign.status import BAD_INPUT
from tests.unit.pack_helpers import open_tiny, quantized, write

TINY = find_geometry("tiny")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w4a16_asym", "w8a16"])
def test_random_checkpoints_load_as_packed_ones_do(scheme: str) -> None:
    source = random_source(TINY, scheme)
    assert isinstance(source, PackedSource)
    for name, shape in source.linear_shapes().items():
        stored = [info.num_bytes for key, info in source.files.tensors.items() if key.startswith(f"{name}.")]
        assert sum(stored) == packed_linear_bytes(shape, source.schemes[name], 2)
    with torch.no_grad():
        logits = deploy_model(source, torch.device("cpu"), torch.float32)(torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all() and logits.std() > 0


@pytest.fixture(scope="module")
def measured() -> measure.Row:
    model, sizes = measure.load(TINY, None, torch.device("cpu"))
    settings = measure.Settings(cache_tokens=16, prompt_tokens=4, steps=3)
    row, _ = measure.measure(model, TINY, None, settings, sizes)
    return row


def test_rows_are_kept_once_and_become_figures(tmp_path: Path, measured: measure.Row) -> None:
    row = replace(measured, geometry="llama-2-7b", compiled=False, step_ms=4.0)
    assert row.tokens_per_s > 0 and row.prefill_tokens_per_s > 0 and row.cache_bytes == 2 * 2 * 2 * 16 * 32 * 2
    packed = replace(row, weights="w4a16", step_ms=1.6, peak_bytes=4_000_000_000)
    results.store_rows(tmp_path, [row, replace(packed, step_ms=9.0)])
    results.store_rows(tmp_path, [packed, replace(packed, batch=8)])
    rows = results.read_rows(tmp_path)
    assert len(rows) == 3
    document = tmp_path / "deploy.md"
    document.write_text("a\n<!-- decode: begin -->\n<!-- decode: end -->\nb\n")
    text = results.publish(rows, tmp_path, document)
    assert text in document.read_text() and "| 2.50 |" in text
    figures = json.loads((tmp_path / "summary.json").read_text())["serving"]
    assert figures["decode_7b_w4a16_vs_bf16"]["value"] == 2.5
    assert figures["memory_7b_w4a16_gb"]["value"] == 4.0


def test_figures_are_of_the_row_in_little_memory_where_there_is_one(tmp_path: Path, measured: measure.Row) -> None:
    row = replace(measured, geometry="llama-2-7b", step_ms=4.0)
    packed = replace(row, weights="w4a16", step_ms=1.6, peak_bytes=4_000_000_000)
    small = replace(packed, small=True, prompt_piece=256, step_ms=2.0, peak_bytes=3_000_000_000)
    results.store_rows(tmp_path, [row, packed, small])
    text = results.publish(results.read_rows(tmp_path), tmp_path)
    assert "| w4a16, in little memory | 1 | plain | 256 |" in text and "| w4a16 | 1 | plain | all |" in text
    figures = json.loads((tmp_path / "summary.json").read_text())["serving"]
    assert {name: figure["value"] for name, figure in figures.items()} == {
        "decode_7b_w4a16_vs_bf16": 2.0,
        "memory_7b_w4a16_gb": 3.0,
        "decode_7b_w4a16_plain_vs_bf16": 2.5,
        "memory_7b_w4a16_plain_gb": 4.0,
    }


def test_other_geometries_give_no_figures(tmp_path: Path, measured: measure.Row) -> None:
    results.store_rows(tmp_path, [measured])
    assert results.headline(results.read_rows(tmp_path)) is None
    assert results.read_rows(tmp_path / "absent") == []


def test_kernels_of_a_step_are_written(tmp_path: Path, measured: measure.Row) -> None:
    results.store_profile(tmp_path, measured, {"gemv": (12.5, 32)})
    text = (tmp_path / "decode-profile-tiny-bf16-1-plain.csv").read_text()
    assert text == "kernel,us_a_step,launches\ngemv,12.50,32\n"
    results.store_profile(
        tmp_path, measured, {"x_gemv": (12.5, 32), "cudnn_sdpa": (3.0, 1), "fused_rsqrt": (2.0, 2), "copy": (1.0, 1)}
    )
    assert "| tiny-bf16-1-plain | 3 | 12 | 2 | 1 | 18 | 36 |" in results.publish([], tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    short = measure.Settings
    monkeypatch.setattr(measure, "Settings", lambda **given: short(**given, cache_tokens=16, prompt_tokens=4, steps=3))
    flags = ["--geometry", "tiny", "--device", "cpu", "--no-compile", "--batches", "2", "--results", str(tmp_path)]
    assert command.main([*flags, "--weights", "w4a16"]) == 0
    assert "| tiny | w4a16 | 2 | plain |" in capsys.readouterr().out
    assert command.main([*flags, "--only-report"]) == 0
    assert "| tiny | w4a16 | 2 | plain |" in capsys.readouterr().out
    assert command.main(["--geometry", "unknown"]) == BAD_INPUT
    assert "unknown geometry" in capsys.readouterr().err


def test_quality_is_measured_through_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_tiny(tmp_path / "tuned")
    folder = write(source, parse_scheme("w8a8"), quantized(source, parse_scheme("w8a8")), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "tuned" / name).read_bytes())
    text, document = tmp_path / "text.jsonl", tmp_path / "deploy.md"
    text.write_text(json.dumps({"text": "A fox ran over the hill and did not come back. " * 3}))
    document.write_text("<!-- quality: begin -->\n<!-- quality: end -->\n")
    flags = ["--results", str(tmp_path), "--docs", str(document)]
    measured = [str(folder), "--text", str(text), "--tokens", "100", "--device", "cpu", "--label", "tiny"]
    assert quality.main([*measured, *flags]) == 0
    (row,) = quality.read_rows(tmp_path)
    plain = float(row["plain"])
    assert all(0 < abs(float(row[name]) / plain - 1) < 0.05 for name in ("int8 cache", "int8 cache and head"))
    assert f"| tiny | 100 | {plain:.3f} |" in document.read_text()
    assert quality.main([str(tmp_path / "absent"), "--text", str(text)]) == BAD_INPUT
    assert "error:" in capsys.readouterr().err
