"""A client that costs little: it counts the events of a stream as they arrive and parses none of them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_EVENT = b"data: {"
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_TAIL = 2048  # bytes of a stream that are kept: the usage stands in the last event


@dataclass
class Reply:
    """What came back for one request.

    Attributes:
        status: of HTTP, 0 where the connection ended without one.
        first_s: from sending to the first event of a stream, or to the end of the head.
        gaps_s: seconds per event behind it; events that arrive together share the time since the last arrival.
        tokens: generated, as the usage says.
        body: the end of it.
    """

    status: int = 0
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    body: bytes = b""

    @property
    def complete(self) -> bool:
        """Whether a stream came to its end."""
        return self.status == 200 and b"[DONE]" in self.body


def request_bytes(url: str, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    """Return a POST request."""
    given = {"Host": urlsplit(url).netloc, "Content-Type": "application/json", "Connection": "close", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in {**given, "Content-Length": str(len(body))}.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def send(url: str, raw: bytes, *, leave_after: int | None = None) -> Reply:
    """Send a request and read its response to the end.

    Args:
        url: of the server.
        raw: the request, whole or a part.
        leave_after: close the connection after so many arrivals of data.
    """
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    reply, events, arrivals, started = Reply(), 0, 0, time.perf_counter()
    last = started
    try:
        writer.write(raw)
        await writer.drain()
        while arrivals != leave_after and (data := await reader.read(1 << 16)):
            now = time.perf_counter()
            arrivals += 1
            if reply.status == 0:
                reply.status = int(data.split(b" ", 2)[1])
            # An event's beginning may be cut by the end of an arrival, so its first bytes are kept for the next search.
            kept = reply.body[-len(_EVENT) + 1 :]
            fresh = (kept + data).count(_EVENT)
            reply.body = (reply.body + data)[-_TAIL:]
            if fresh and reply.first_s is None:
                reply.first_s, fresh = now - started, fresh - 1
            elif fresh:
                reply.gaps_s += [(now - last) / fresh] * fresh
            events += fresh
            last = now
    except (ConnectionError, IndexError, ValueError):
        pass  # the server closed what it would not read
    finally:
        writer.close()
    if found := _USAGE.findall(reply.body):
        reply.tokens = int(found[-1])
    return reply


async def fetch_json(url: str, path: str) -> Any:
    """Return the JSON at a path, whatever the status."""
    return json.loads(await fetch(url, path))


async def fetch(url: str, path: str) -> bytes:
    """Return the body at a path."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n".encode())
    data = await reader.read(-1)
    writer.close()
    return data.partition(b"\r\n\r\n")[2]
