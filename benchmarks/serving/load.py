"""Streams at once, as many as asked for: how long their tokens take to come."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.serving.client import Reply, fetch_json, request_bytes, send
from qrealign.errors import QrealignError

_IDS = (10, 200)  # token ids that every vocabulary holds


@dataclass(frozen=True, kw_only=True)
class Level:
    """What was measured with so many streams at once; times in milliseconds."""

    streams: int
    requests: int
    prompt_tokens: int
    tokens: int
    wall_s: float
    tokens_per_s: float
    first_p50_ms: float
    first_p95_ms: float
    first_p99_ms: float
    token_p50_ms: float
    token_p95_ms: float
    token_p99_ms: float
    failed: int


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


async def measure_level(
    url: str, *, streams: int, requests: int, prompt_tokens: int, tokens: int, seed: int = 0
) -> Level:
    """Keep `streams` requests in flight until `requests` have been answered.

    Args:
        url: of the server.
        streams: at once.
        requests: in all.
        prompt_tokens: of each prompt; the ids are random, so that no prompt is another's.
        tokens: of each answer, which the model's own end does not cut.
        seed: of the prompts.

    Raises:
        QrealignError: no request was answered.
    """
    rng = random.Random(seed)
    model = (await fetch_json(url, "/v1/models"))["data"][0]["id"]
    queue = [
        request_bytes(url, "/v1/completions", _body(model, [rng.randint(*_IDS) for _ in range(prompt_tokens)], tokens))
        for _ in range(requests)
    ]
    replies: list[Reply] = []

    async def work() -> None:
        while queue:
            replies.append(await send(url, queue.pop()))

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(streams)))
    wall = time.perf_counter() - started
    whole = [reply for reply in replies if reply.complete and reply.first_s is not None]
    if not whole:
        raise QrealignError(
            f"{url} answered none of {requests} requests: {replies[0].body[-300:].decode('utf-8', 'replace')}"
        )
    first = [1000 * (reply.first_s or 0.0) for reply in whole]
    gaps = [1000 * gap for reply in whole for gap in reply.gaps_s] or [0.0]
    return Level(
        streams=streams,
        requests=requests,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        wall_s=wall,
        tokens_per_s=sum(reply.tokens for reply in whole) / wall,
        first_p50_ms=percentile(first, 50),
        first_p95_ms=percentile(first, 95),
        first_p99_ms=percentile(first, 99),
        token_p50_ms=percentile(gaps, 50),
        token_p95_ms=percentile(gaps, 95),
        token_p99_ms=percentile(gaps, 99),
        failed=requests - len(whole),
    )


def _body(model: str, prompt: list[int], tokens: int) -> bytes:
    return json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
