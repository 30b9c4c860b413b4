"""The sweep of products: rows become headline figures and a table; what is missing is said."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.docs import markers
from benchmarks.gemm import __main__ as sweep
from benchmarks.gemm import figures, measure, peers


def row(peer: str, m: int, us: float, shape: tuple[int, int] = (64, 32)) -> dict[str, object]:
    stamp = {"device": "a GPU", "torch": "2", "triton": "3", "commit": "abc", "date": "today"}
    return {"peer": peer, "K": shape[0], "N": shape[1], "M": m, "us": us, "eager_us": 2 * us} | stamp


def test_figures_are_geometric_means_over_shapes_and_tokens() -> None:
    rows = [
        row(peers.BASELINE, 1, 8.0),
        row("ours w4a16", 1, 4.0),
        row(peers.BASELINE, 1, 9.0, (96, 32)),
        row("ours w4a16", 1, 1.125, (96, 32)),
    ]
    assert figures.figures(rows) == {"serving": {"w4a16_m1_vs_bf16": 4.0}}  # of 2 and 8


def test_a_baseline_that_took_turns_with_a_peer_is_what_it_is_compared_with() -> None:
    rows = [row(peers.BASELINE, m, 8.0) for m in peers.LARGE]
    rows += [row("ours w8a8", m, 4.0) | {"baseline_us": 10.0} for m in peers.LARGE]
    assert figures.figures(figures.from_csv(figures.to_csv(rows))) == {"serving": {"w8a8_large_m_vs_bf16": 2.5}}
    assert f"| 64 x 32 | {peers.LARGE[0]} | 8.0 | 2.50 |" in figures.table(rows)


def test_a_figure_without_all_its_rows_is_left_out() -> None:
    complete = [row(name, m, 1.0) for name in (peers.BASELINE, "ours w8a8") for m in (1, 8, 16)]
    assert set(figures.figures(complete)["serving"]) == {"w8a8_small_m_vs_bf16"}
    assert figures.figures(complete[:-1]) == {}


def test_table_says_who_is_missing() -> None:
    rows = [row(peers.BASELINE, 1, 8.0), row("ours w8a8", 1, 4.0), {"peer": "torchao w8a8", "note": "not installed: x"}]
    lines = figures.table(rows).splitlines()
    assert lines[:2] == ["a GPU, torch 2, triton 3, commit abc, today.", ""]
    assert lines[2] == "| K x N | M | torch bf16, µs | ours w8a8 | torchao w8a8 |"
    assert lines[4] == "| 64 x 32 | 1 | 8.0 | 2.00 | - |"
    assert lines[-1] == "- torchao w8a8: not installed: x"


def test_csv_keeps_every_row() -> None:
    rows = [row("ours w8a8", 1, 4.0) | {"error": 0.012345678}, {"peer": "gemlite w8a8", "note": "stopped after 5 s"}]
    found = list(csv.DictReader(io.StringIO(figures.to_csv(rows))))
    assert figures.table(figures.from_csv(figures.to_csv(rows))) == figures.table(rows)
    assert [(line["us"], line["error"], line["note"]) for line in found] == [
        ("4", "0.01235", ""),
        ("", "", "stopped after 5 s"),
    ]


def test_our_products_and_the_library_s_are_what_they_claim() -> None:
    """The peers that need no other package, on the CPU: errors as small as their bits allow."""
    plain, x = torch.randn(48, 128) * 0.02, torch.randn(40, 128)
    want = x @ plain.T
    for name, bound in {"torch bf16": 1e-6, "ours w8a8": 0.02, "ours w4a16": 0.15, "ours w4a8": 0.15}.items():
        peer = peers.PEERS[name]()
        got = peer.multiply(peer.pack(plain), peer.prepare(x))
        assert (got - want).norm() / want.norm() < bound, name
    forward, library = peers.ours_int8_forward(), peers.torch_int_mm()
    prepared = forward.prepare(x)
    scaled = library.multiply(library.pack(plain), library.prepare(x)) * prepared.scale * forward.pack(plain)[1].T
    torch.testing.assert_close(forward.multiply(forward.pack(plain), prepared), scaled)
    assert library.prepare(x[:3]).shape == (32, 128)


def test_a_missing_package_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gemlite", "torchao", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.helper", None)
        monkeypatch.setitem(sys.modules, f"{package}.quantization", None)
        monkeypatch.setitem(sys.modules, f"{package}.functional", None)
    log = tmp_path / "rows.jsonl"
    names = ["gemlite w8a8", "gemlite w4a16", "torchao w8a8", "bitsandbytes w8a8", "bitsandbytes nf4"]
    for name in names:
        measure.measure(name, [(64, 32)], [1], log)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [found["peer"] for found in rows] == names
    assert all(found["note"].startswith("not installed") for found in rows)


def test_a_peer_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (rows,) = sweep.measure_all(["torch bf16"], [1], 60.0, 1)
    assert rows[-1]["peer"] == "torch bf16"
    assert "us" not in rows[-1] and rows[-1]["note"]
    docs = tmp_path / "products.md"
    docs.write_text("\n".join(markers(sweep.DOCS_NAME)))
    sweep.record(rows, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(sys, "argv", ["gemm", "--only-report", "--output", str(tmp_path), "--docs", str(docs)])
    assert sweep.main() == 0
    assert f"- torch bf16: {rows[-1]['note']}" in docs.read_text()
    assert sweep.Child("torch bf16", tmp_path / "log", []).run(0, 0.01) == "stopped after 0 s"
