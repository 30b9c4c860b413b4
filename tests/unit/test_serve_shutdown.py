"""The end of a server: running requests finish or are cut, new ones are refused, nothing hangs."""

from __future__ import annotations

import json
import signal
import time

from tests.unit.serve_helpers import http, serving

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}


def slow_down(running, seconds: float) -> None:
    runner = running.server.engine._runner
    decode = runner.decode
    runner.decode = lambda *arguments: (time.sleep(seconds), decode(*arguments))[1]


def events(stream) -> list[str]:
    return [line for line in stream.iter_lines() if line]


def test_running_requests_finish_and_new_ones_are_refused():
    with serving(grace=20.0) as running:
        slow_down(running, 0.01)
        with http.stream("POST", f"{running.url}/v1/completions", json=BODY) as stream:
            running.listening.handle_exit(signal.SIGTERM, None)
            refused = http.post(f"{running.url}/v1/completions", json=BODY)
            assert refused.status_code == 503 and refused.headers["Retry-After"]
            assert refused.json()["error"]["message"] == "the server is shutting down"
            health = http.get(f"{running.url}/health")
            assert health.status_code == 503 and health.json()["status"] == "the server is shutting down"
            assert events(stream)[-1] == "data: [DONE]"
        running.thread.join(timeout=10)
        assert not running.thread.is_alive()


def test_requests_that_outlast_the_grace_are_cut_and_told():
    with serving(grace=0.2, slots=1) as running:
        slow_down(running, 0.05)
        with http.stream("POST", f"{running.url}/v1/completions", json=BODY) as stream:
            lines = stream.iter_lines()
            assert next(lines)
            running.listening.handle_exit(signal.SIGINT, None)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopped"
        running.thread.join(timeout=10)
        assert not running.thread.is_alive()


def test_a_second_signal_does_not_wait():
    with serving(grace=60.0) as running:
        slow_down(running, 0.05)
        with http.stream("POST", f"{running.url}/v1/completions", json=BODY) as stream:
            started = time.monotonic()
            running.listening.handle_exit(signal.SIGTERM, None)
            running.listening.handle_exit(signal.SIGTERM, None)
            assert '"code": "stopped"' in events(stream)[-1]
        running.thread.join(timeout=10)
        assert time.monotonic() - started < 2


def test_an_idle_server_ends_at_once():
    with serving(grace=60.0) as running:
        assert http.get(f"{running.url}/health").status_code == 200
        running.listening.handle_exit(signal.SIGTERM, None)
        running.thread.join(timeout=5)
        assert not running.thread.is_alive() and not running.server.engine._thread.is_alive()
