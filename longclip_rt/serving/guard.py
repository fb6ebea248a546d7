"""Before any route: the key, the bounds, the body, the time; and an error's form, whatever went wrong behind it."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longclip_rt.serving.bounds import Bounds, Refusal
from longclip_rt.serving.metrics import Metrics

logger = logging.getLogger("longclip_rt")

OPEN = ("/", "/health", "/ready", "/docs", "/openapi.json", "/page.js", "/page.css")
"""Paths that need no key and no place among the connections: they hold no data and cost nothing."""

# Bodies that are held at a time, in units of the largest one.
_BODIES = 8


class _Gone(Exception):
    """The client has hung up."""


class Guard:
    """ASGI middleware around all routes.

    Args:
        app: What answers.
        bounds: The limits.
        key: What `Authorization: Bearer` must hold; empty: nothing is asked for.
        metrics: What is told of requests.
        check_room: Raises a `Refusal` where the queue has no room, before a body is read.
    """

    def __init__(
        self, app: ASGIApp, bounds: Bounds, key: str, metrics: Metrics, check_room: Callable[[], None]
    ) -> None:
        self.app, self.bounds, self.metrics = app, bounds, metrics
        self._key = key.encode()
        self._check_room = check_room
        self._requests = 0
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request; passes on what is none."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0
        code = "internal_error"
        started = time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                if scope["path"] in OPEN:
                    await self.app(scope, receive, watched)
                else:
                    async with asyncio.timeout(self.bounds.seconds):
                        await self._guarded(scope, receive, watched)
            except TimeoutError:
                message = f"The request took longer than {self.bounds.seconds:g} seconds."
                raise Refusal(503, message, "timeout", retry_after=1) from None
            except (Refusal, _Gone):
                raise
            except Exception as error:
                logger.exception("a request to %s failed", scope["path"])
                raise Refusal(500, "The server failed; its log says why.", "internal_error") from error
        except Refusal as refusal:
            code = refusal.code
            if not status:
                close = {"Connection": "close"} if refusal.status in (408, 413, 429, 503) else {}
                await JSONResponse(refusal.body, refusal.status, refusal.headers | close)(scope, receive, watched)
        except _Gone:
            status, code = 499, "client_gone"
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(time.monotonic() - started)
        if status >= 400:
            self.metrics.errors.labels(scope.get("longclip.code", code)).inc()

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._check_key(headers.get(b"authorization", b""))
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self._requests >= self.bounds.connections:
            message = f"{self._requests} requests are being answered, and no more are taken. Try again later."
            raise Refusal(503, message, "too_many_requests", retry_after=1)
        self._check_room()
        claimed = self._claim(headers.get(b"content-length", b""))
        self._requests += 1
        self._held += claimed
        try:
            await self._answered(scope, await self._body(receive), receive, send)
        finally:
            self._requests -= 1
            self._held -= claimed

    def _claim(self, length: bytes) -> int:
        """The bytes that a body may take."""
        claimed = int(length[:16]) if length.isdigit() else self.bounds.body_bytes
        if claimed > self.bounds.body_bytes:
            raise self._too_large()
        if self._held + claimed > _BODIES * self.bounds.body_bytes:
            raise Refusal(503, "Too much is being received. Try again later.", "busy", retry_after=1)
        return claimed

    def _check_key(self, authorization: bytes) -> None:
        if self._key and not hmac.compare_digest(authorization, b"Bearer " + self._key):
            message = "The API key is absent or wrong. Send it as: Authorization: Bearer KEY"
            raise Refusal(401, message, "invalid_api_key")

    def _too_large(self) -> Refusal:
        message = f"The body is larger than {self.bounds.body_bytes} bytes. Send less at a time."
        return Refusal(413, message, "body_too_large")

    async def _body(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.bounds.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _answered(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Runs the route on a body that is whole; a client that hangs up ends it."""
        read = whole = False

        async def watched(message: Message) -> None:
            nonlocal whole
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        async def replay() -> Message:
            nonlocal read
            if not read:
                read = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        async def hung_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answer = asyncio.ensure_future(self.app(scope, replay, watched))
        watch = asyncio.ensure_future(hung_up())
        try:
            await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not whole:
                raise _Gone
            await answer
        finally:
            for task in (answer, watch):
                task.cancel()
            await asyncio.gather(answer, watch, return_exceptions=True)
