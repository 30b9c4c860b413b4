"""Clients at their worst: hundreds at once, some leave, some send what is no request. The server must not mind."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.client import fetch, fetch_json, request_bytes, send

_JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    [-1],
    "5",
)
_FIELDS = (
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "logprobs",
    "top_logprobs", "stream_options", "echo", "tools", "logit_bias", "user",
)  # fmt: skip
_PATHS = ("/v1/completions", "/v1/chat/completions")
_RSS = re.compile(rb"^process_resident_memory_bytes ([\d.e+]+)", re.MULTILINE)
_IDLE_S = 30.0  # for the last slots to become free


@dataclass(frozen=True, kw_only=True)
class Storm:
    """How a storm went.

    Attributes:
        statuses: status -> how often; 0 for connections that were left or closed without one.
        resident: bytes of the server after each round.
        running, waiting: sequences that are left at the end.
        answers: whether the server still completes a request.
    """

    statuses: dict[int, int]
    resident: list[int]
    running: int
    waiting: int
    answers: bool


def malformed_body(rng: random.Random, model: str) -> bytes:
    """Return a body that is broken somewhere, or perhaps only odd."""
    chat = rng.random() < 0.5
    body: dict[str, Any] = {"model": model, "max_tokens": 2}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    if kind == 1:
        return b"[" * rng.randrange(1, 3000)
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(_FIELDS)] = rng.choice(_JUNK)
    if kind == 2 and chat:
        body["messages"] = [{"role": rng.choice(("user", "tool", 5)), "content": rng.choice(_JUNK)}]
    text = json.dumps(body).encode()
    return text[: rng.randrange(len(text))] if kind == 3 else text


async def _one_client(url: str, model: str, rng: random.Random) -> int:
    """Do one thing to the server and return the status that came of it."""
    path = rng.choice(_PATHS)
    kind = rng.randrange(7)
    if kind <= 1:
        return (await send(url, request_bytes(url, path, malformed_body(rng, model)))).status
    body = {"model": model, "max_tokens": rng.randint(1, 60), "ignore_eos": True, "stream": rng.random() < 0.8}
    body |= {"seed": rng.randrange(100), "n": rng.choice((1, 1, 2))}
    body |= (
        {"prompt": "x" * rng.randint(1, 60)} if path == _PATHS[0] else {"messages": [{"role": "user", "content": "hi"}]}
    )
    raw = request_bytes(url, path, json.dumps(body).encode())
    if kind == 2:  # a part of a request, and away
        return (await send(url, raw[: rng.randrange(1, len(raw))], leave_after=0)).status
    if kind == 3:  # a whole request, and away
        return (await send(url, raw, leave_after=0)).status
    if kind == 4:  # away in the middle of a stream
        return (await send(url, raw, leave_after=rng.randint(1, 5))).status
    return (await send(url, raw)).status


async def run_storm(url: str, *, clients: int, rounds: int, seed: int = 0) -> Storm:
    """Let `clients` loose on a server at once, `rounds` times, and see what is left.

    Args:
        url: of the server.
        clients: at once.
        rounds: how often.
        seed: of what they do.
    """
    rng = random.Random(seed)
    model = (await fetch_json(url, "/v1/models"))["data"][0]["id"]
    statuses: Counter[int] = Counter()
    resident = []
    for _ in range(rounds):
        seeds = [rng.randrange(2**32) for _ in range(clients)]
        statuses.update(await asyncio.gather(*(_one_client(url, model, random.Random(one)) for one in seeds)))
        health = await _settled(url)
        resident.append(int(float(found[1])) if (found := _RSS.search(await fetch(url, "/metrics"))) else 0)
    last = await send(
        url, request_bytes(url, _PATHS[0], json.dumps({"model": model, "prompt": "x", "max_tokens": 1}).encode())
    )
    return Storm(
        statuses=dict(sorted(statuses.items())),
        resident=resident,
        running=health["running"],
        waiting=health["waiting"],
        answers=last.status == 200,
    )


async def _settled(url: str) -> dict[str, Any]:
    """Return the server's health once nothing runs or waits, or when the time for that is over."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _IDLE_S
    while (health := await fetch_json(url, "/health"))["running"] + health["waiting"] and loop.time() < deadline:
        await asyncio.sleep(0.05)
    return dict(health)
