"""Pure ASGI middleware: request id, log, metrics, last resort for defects, body limits, security headers."""

import asyncio
import contextlib
import itertools
import re
import secrets
import time
from collections.abc import Callable, Mapping

import structlog
from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import internal, render, too_large

log = structlog.get_logger("gateway.access")
REQUESTS = Counter("clawplane_gateway_requests_total", "HTTP requests", ("route", "method", "status"))
SECONDS = Histogram("clawplane_gateway_request_seconds", "Time to answer", ("route", "method"))

DRAIN_BYTES = 16 * 1024 * 1024
DRAIN_S = 2.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z", re.ASCII)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_PREFIX = secrets.token_hex(6)
_numbers = itertools.count(1)

Templates = Callable[[object], str]


class Observe:
    """Gives each request an id, logs and counts it, and turns an unexpected exception into a 500 that tells only the id."""

    def __init__(self, app: ASGIApp, template: Templates) -> None:
        self._app = app
        self._template = template

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _REQUEST_ID.match(sent) else f"{_PREFIX}-{next(_numbers)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        started = time.perf_counter()
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or 499
        except Exception:
            log.exception("request_failed", request_id=request_id)
            if not status:
                await render(internal(request_id))(scope, receive, send_with_id)
        finally:
            self._record(scope, request_id, status or 499, time.perf_counter() - started)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = self._template(scope.get("endpoint"))
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        REQUESTS.labels(route, method, str(status)).inc()
        SECONDS.labels(route, method).observe(seconds)
        # The template, never the address: ids of checkout pages are as good as passwords, and queries may hold e-mail addresses.
        log.info("http", method=method, route=route, status=status, ms=round(seconds * 1000, 1), request_id=request_id)


class BodyLimit:
    """Refuses larger bodies with 413: at once where the length is announced, otherwise when the count passes the limit."""

    def __init__(self, app: ASGIApp, default_bytes: int, by_prefix: Mapping[str, int]) -> None:
        self._app = app
        self._default_bytes = default_bytes
        self._by_prefix = dict(by_prefix)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = next((limit for prefix, limit in self._by_prefix.items() if scope["path"].startswith(prefix)), self._default_bytes)
        length = Headers(scope=scope).get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 16) or int(length) > limit:
            await drain(receive)
            await render(too_large(limit))(scope, receive, send)
            return
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > limit:
                await drain(receive)
                raise too_large(limit)
            return message

        await self._app(scope, counted, send)


async def drain(receive: Receive) -> None:
    """Reads on for a while and forgets it: a client that is still sending when the connection closes never sees the answer."""
    left = DRAIN_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


class SecurityHeaders:
    """Sets what every answer carries; a page that needs something else sets its own."""

    def __init__(self, app: ASGIApp, https: bool) -> None:
        self._app = app
        self._headers = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
            "Cache-Control": "no-store",
        }
        if https:
            self._headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
