"""Who may call the HTTP API: bearer token, size and patience. Pure ASGI; nothing parses a byte before it.

Owns the order of the checks, the correlation id and the log line of a request. Knows no route but the
open ones it is given. Never logs headers, queries or bodies.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api_problems import Refusal, Unavailable, respond
from deployments.api_tokens import TokenStore, TokensUnreadable
from receiver.contract import CORRELATION_HEADER
from receiver.logs import CORRELATION

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 1024 * 1024
BODY_PATIENCE_SECONDS = 30.0
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_BEARER = re.compile(r"(?i:bearer) +([\x21-\x7e]{1,512})")
_LENGTH = re.compile(r"[0-9]{1,18}")


class Unauthenticated(Refusal):
    """Authentication failed"""

    slug, status = "invalid-token", 401
    next_step = (
        "Make a token (python -m deployments.api token create NAME); send Authorization: Bearer TOKEN."
    )


class ForeignName(Refusal):
    """The API without tokens answers to loopback names only"""

    slug, status = "host-not-allowed", 403
    next_step = "Call it as 127.0.0.1 or localhost; or make a token and start it without --insecure-no-token."


class BodyTooLarge(Refusal):
    """The body is too large"""

    slug, status = "body-too-large", 413
    next_step = "A deployment's request needs far less; files belong into the build context."


class BodyTooSlow(Refusal):
    """The body did not arrive in time"""

    slug, status = "body-too-slow", 408
    next_step = "Send the whole body with the request."


class ClientGone(Exception):
    """The client closed the connection before its body was whole"""


@dataclass(frozen=True)
class Access:
    """ASGI middleware: token, then length, then the body as a whole; then the application.

    `tokens` None lets everybody in who calls it by a loopback name: else a web page could make a browser
    call it under a name of its own (DNS rebinding).
    """

    app: ASGIApp
    tokens: TokenStore | None
    open_paths: Collection[str]
    body_patience_seconds: float = BODY_PATIENCE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._admit(scope, receive, send)
        except Refusal as refusal:
            await respond(refusal)(scope, receive, send)
        except ClientGone:
            return

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if self.tokens is None:
            _check_name(headers)
        elif scope["path"] not in self.open_paths:
            scope.setdefault("state", {})["caller"] = self._caller(self.tokens, headers)
        body = await self._read_body(headers, receive)
        await self.app(scope, _replay(body, receive), send)

    def _caller(self, tokens: TokenStore, headers: Headers) -> str:
        """The name of the token that the request carries."""
        given = headers.getlist("authorization")
        offered = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
        if offered is None:
            raise Unauthenticated(
                "Authentication failed: no bearer token",
                headers={"WWW-Authenticate": 'Bearer realm="gantry"'},
            )
        try:
            name = tokens.identify(offered[1])
        except TokensUnreadable as exc:
            log.error("%s", exc)
            raise Unavailable("the API cannot read its tokens") from exc
        if name is None:
            challenge = 'Bearer realm="gantry", error="invalid_token"'
            raise Unauthenticated(
                "Authentication failed: unknown token", headers={"WWW-Authenticate": challenge}
            )
        return name

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        length = headers.get("content-length", "0")
        if not _LENGTH.fullmatch(length) or int(length) > MAX_BODY_BYTES:
            raise _too_large()
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.body_patience_seconds):
                while more:
                    piece, more = _piece(await receive())
                    body += piece
                    if len(body) > MAX_BODY_BYTES:
                        raise _too_large()
        except TimeoutError as exc:
            raise BodyTooSlow(headers={"Connection": "close"}) from exc
        return bytes(body)


class RequestLog:
    """ASGI middleware, outermost: correlation id, one line per request, and the answer to a crash."""

    def __init__(self, app: ASGIApp, quiet_paths: Collection[str] = ()) -> None:
        self.app = app
        self._quiet_paths = quiet_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; the id is the caller's own when it is one, and in the answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(CORRELATION_HEADER, "")
        correlation_id = given if CORRELATION.fullmatch(given) else str(uuid.uuid4())
        scope.setdefault("state", {})["correlation_id"] = correlation_id
        answer, began = _Answer(send, correlation_id), time.monotonic()
        try:
            await self.app(scope, receive, answer)
        except Exception as exc:
            log.exception("unexpected error", extra={"correlation_id": correlation_id})
            if answer.status is None:
                await respond(exc)(scope, receive, answer)
        quiet = answer.status == 200 and scope["path"] in self._quiet_paths
        facts = _facts(scope, answer.status, began)
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra=facts)


class _Answer:
    """`send` that adds the correlation id and remembers the status."""

    def __init__(self, send: Send, correlation_id: str) -> None:
        self._send = send
        self._correlation_id = correlation_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[CORRELATION_HEADER] = self._correlation_id
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)


def _facts(scope: Scope, status: int | None, began: float) -> dict[str, object]:
    peer = scope.get("client")
    return {
        "correlation_id": scope["state"]["correlation_id"],
        "method": scope["method"],
        "path": (scope.get("raw_path") or scope["path"].encode()).decode("latin-1"),
        "status": status or "gone",
        "duration_ms": int((time.monotonic() - began) * 1000),
        "peer": peer[0] if peer else None,
    }


def _check_name(headers: Headers) -> None:
    name = re.sub(r":[0-9]*$", "", headers.get("host", ""))
    if name not in LOOPBACK_NAMES:
        raise ForeignName


def _piece(message: Message) -> tuple[bytes, bool]:
    """The bytes of one message, and whether more are to come."""
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


def _too_large() -> BodyTooLarge:
    # What follows is not read, so the connection cannot be used again.
    return BodyTooLarge(f"a body may have {MAX_BODY_BYTES} bytes", headers={"Connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for the application: the whole body at once, then what the server says."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
