"""The benchmark of the CUDA extension: what it writes, and that it needs the extension only to measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cuda import __main__ as command
from benchmarks.cuda.__main__ import Timing
from qrealign_kernels import cuda


def test_a_run_writes_what_a_report_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(command, "measure", lambda *layer: Timing(*layer, bf16_us=16.0, triton_us=10.0, cuda_us=8.0))
    docs, output = tmp_path / "cpu.md", tmp_path / "cuda.csv"
    docs.write_text("<!-- cuda table: begin -->\n<!-- cuda table: end -->\n", encoding="utf-8")
    assert command.main(["--output", str(output)]) == 0
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "no toolkit")
    assert command.main(["--only-report", "--output", str(output), "--docs", str(docs)]) == 0
    text = docs.read_text(encoding="utf-8")
    assert "| w8a8 | 11008x4096 | 16 | 16.0 | 10.0 | 8.0 | 2.00 |" in text
    assert "| w4a16_g128 | all, mean | 1 |  | 1.25 x |  | 2.00 |" in text


def test_measuring_without_the_extension_names_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "no toolkit")
    assert command.main(["--output", str(tmp_path / "cuda.csv")]) == 1
    assert capsys.readouterr().err == "error: no toolkit\n"
