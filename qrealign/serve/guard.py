"""What stands before every request: the host, the key, the type and size of the body; and the count of responses."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from qrealign.serve.metrics import ServerMetrics
from qrealign.serve.replies import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health"})  # without a key: a page that asks for it, and what a load balancer asks
_DISCARDED = (
    8  # times the limit: so much of a body that is too large is still taken, so that the client reads the answer
)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """Lets a request through to the application, with its whole body read, or answers it with an error.

    Args:
        app: the application.
        api_key: what `Authorization: Bearer` must carry, None for nothing.
        hosts: names that the Host header may carry, None for any.
        max_body_bytes: size of a body.
        body_timeout: seconds until it must be here.
        metrics: counts the responses.
        paths: the routes, all other paths are counted as one.
    """

    def __init__(
        self,
        app: App,
        *,
        api_key: str | None,
        hosts: Sequence[str] | None,
        max_body_bytes: int,
        body_timeout: float,
        metrics: ServerMetrics,
        paths: frozenset[str],
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            try:
                body = await self._admit(scope, receive)
            except ApiError as error:
                response = JSONResponse(error.body(), error.status, {**error.headers, "Connection": "close"})
                await response(scope, receive, counted_send)
            else:
                await self._app(scope, _with_body(body, receive), counted_send)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.answered(path, status, time.monotonic() - started)

    async def _admit(self, scope: Mapping[str, Any], receive: Receive) -> bytes:
        """Return the body of a request that may pass.

        Raises:
            ApiError: it may not.
        """
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        if self._hosts is not None and _host_name(headers.get("host", b"")) not in self._hosts:
            raise ApiError(
                400, "the Host header names no host of this server: see --allowed-hosts", code="unknown_host"
            )
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, token = headers.get("authorization", b"").partition(b" ")
            if not hmac.compare_digest(token.strip(), self._key) or scheme.lower() != b"bearer":
                raise ApiError(
                    401, "the API key is missing or wrong: send it as a bearer token", code="invalid_api_key"
                )
        kind = headers.get("content-type", b"").partition(b";")[0].strip().lower()
        # A web page elsewhere can post plain text here without being asked; JSON it cannot.
        if scope["method"] == "POST" and kind != b"application/json":
            raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
        try:
            return await asyncio.wait_for(self._read(headers, receive), self._body_timeout)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not come within {self._body_timeout:g} seconds") from None

    async def _read(self, headers: Mapping[str, bytes], receive: Receive) -> bytes:
        """Return the body.

        Raises:
            ApiError: it is too large.
        """
        limit, body, size = self._max_body_bytes, bytearray(), 0
        announced = headers.get("content-length", b"")
        too_far = announced.isdigit() and int(announced) > _DISCARDED * limit
        more = not too_far
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= limit:
                body += chunk
            more = message.get("more_body", False) and size <= _DISCARDED * limit
        if too_far or size > limit:
            raise ApiError(413, f"the body is larger than the {limit} bytes allowed", code="body_too_large")
        return bytes(body)


def _host_name(header: bytes) -> str:
    """Return the name in a Host header without port and brackets, in lower case."""
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body first, then what comes: the end of the connection."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
