"""The load test measures what it says: against a tiny server, and on numbers made by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.serving.__main__ import main
from benchmarks.serving.client import request_bytes, send
from benchmarks.serving.load import measure_level, percentile
from benchmarks.serving.results import ROWS, TABLE, publish, read_rows
from tests.unit.serve_helpers import serving


@pytest.fixture(scope="module")
def running():
    with serving() as running:
        yield running


def test_percentiles_are_values_that_were_measured():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, percent) for percent in (1, 20, 50, 95, 100)] == [1.0, 1.0, 3.0, 5.0, 5.0]


def test_a_level_counts_every_token(running):
    level = asyncio.run(measure_level(running.url, streams=3, requests=5, prompt_tokens=20, tokens=12))
    assert (level.streams, level.requests, level.failed) == (3, 5, 0)
    assert level.tokens_per_s * level.wall_s == pytest.approx(5 * 12)
    assert 0 < level.first_p50_ms <= level.first_p99_ms < 1000 * level.wall_s
    assert 0 <= level.token_p50_ms <= level.token_p95_ms <= level.token_p99_ms


def test_requests_that_fail_are_counted_and_none_answered_is_an_error(running):
    with pytest.raises(Exception, match="longer than"):
        asyncio.run(measure_level(running.url, streams=1, requests=2, prompt_tokens=500, tokens=4))


def test_leaving_early_is_leaving(running):
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 100, "ignore_eos": true, "stream": true}'
    reply = asyncio.run(send(running.url, request_bytes(running.url, "/v1/completions", body), leave_after=1))
    assert reply.status in (0, 200) and not reply.complete
    running.wait_idle(5)
    whole = asyncio.run(send(running.url, request_bytes(running.url, "/v1/completions", body)))
    assert whole.complete and whole.first_s and len(whole.gaps_s) > 10


def test_rows_are_kept_by_their_settings_and_shown(running, tmp_path: Path, capsys):
    page = tmp_path / "serve.md"
    page.write_text(f"before\n<!-- {TABLE}: begin -->\n<!-- {TABLE}: end -->\nafter\n")
    command = [
        running.url,
        "--streams",
        "1",
        "2",
        "--requests",
        "1",
        "--prompt-tokens",
        "8",
        "--tokens",
        "4",
        "--label",
        "t",
    ]
    command += ["--storm", "8", "--rounds", "1", "--results", str(tmp_path), "--docs", str(page)]
    assert main(command) == 0
    assert main(command) == 0
    rows = read_rows(tmp_path)
    assert [(row["label"], row["streams"], row["scheme"]) for row in rows] == [
        ("t", "1", "float32"),
        ("t", "2", "float32"),
    ]
    assert "still answers" in capsys.readouterr().out
    assert publish(rows, None) in page.read_text() and page.read_text().startswith("before")
    assert main(["--only-report", "--results", str(tmp_path)]) == 0
    assert (tmp_path / ROWS).is_file()


def test_a_server_that_does_not_start_is_told(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.serving.__main__.sys.executable", "/bin/false")
    assert main(["--start", str(tmp_path), "--results", str(tmp_path)]) == 1
    assert "did not start" in capsys.readouterr().err
