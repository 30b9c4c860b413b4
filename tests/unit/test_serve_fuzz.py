"""What no client should send, and what no client should do: the server answers, and nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.serving.storm import malformed_body, run_storm
from tests.unit.serve_helpers import http, served_model, serving

_CHECKS = (not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance)


@pytest.fixture(scope="module")
def running():
    # Few tokens fit, so that what the fuzzer asks for by accident is soon over.
    with serving(served_model(max_length=48), slots=8, max_queue=300, request_timeout=20.0) as running:
        yield running
        running.wait_idle()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_the_openapi_page_says_what_the_server_does(running, mode):
    schema = schemathesis.openapi.from_dict(http.get(f"{running.url}/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/models", "/v1/completions", "/v1/chat/completions"}
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method != "post":
            continue  # there is nothing to get wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=4, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        def ask(case):
            if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
                # Or every request would end as "not served here", and some would take long.
                case.body |= {"model": "tiny", "max_tokens": 2}
                case.body.pop("max_completion_tokens", None)
            case.call_and_validate(base_url=running.url, checks=_CHECKS)

        ask()


def test_no_malformed_body_is_a_server_error(running):
    rng = random.Random(0)
    for _ in range(150):
        body = malformed_body(rng, "tiny")
        path = rng.choice(("/v1/completions", "/v1/chat/completions"))
        response = http.post(running.url + path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code != 200:
            error = response.json()["error"]
            assert error["message"] and error["type"] == "invalid_request_error", (body, error)


def test_a_storm_of_clients_leaves_no_trace(running):
    storm = asyncio.run(run_storm(running.url, clients=60, rounds=4))
    assert storm.answers and storm.running == storm.waiting == 0
    assert 200 in storm.statuses and 0 in storm.statuses and 400 in storm.statuses
    assert not set(storm.statuses) - {0, 200, 400, 404, 429}, storm.statuses
    assert storm.resident[-1] - storm.resident[1] < 12 << 20, storm.resident  # the first round warms allocators up
    assert running.server.engine._rows == [] and not running.server.engine._waiting


def test_lengths_of_http_that_lie_are_survived(running):
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    for length in (b"-1", b"abc", b"1" * 30, b"0x10"):
        raw = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        reply = asyncio.run(_send(running.url, raw + length + b"\r\nConnection: close\r\n\r\n" + body))
        assert reply[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b""), reply[:80]
    assert http.get(f"{running.url}/health").json()["status"] == "ok"


async def _send(url: str, raw: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    try:
        return await asyncio.wait_for(reader.read(4096), 5)
    except ConnectionError:
        return b""
    finally:
        writer.close()
