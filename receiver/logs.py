"""Log lines: one per fact, as text or as JSON, each with the correlation id of its request.

Owns the format, the correlation id and the line per request. Never logs headers, queries or bodies.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from receiver import contract, problems
from receiver.metrics import Metrics

log = logging.getLogger(__name__)
FIELDS = (
    "correlation_id",
    "deployment_id",
    "container_name",
    "remote_host",
    "state",
    "method",
    "path",
    "status",
    "duration_ms",
    "peer",
)
"""What may stand beside a message; given by `extra=`."""

_correlation_id: ContextVar[str | None] = ContextVar("correlation_id", default=None)
CORRELATION = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def configure(log_format: str, level: str) -> None:
    """Send all log lines to stderr in `log_format` (`text` or `json`)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "docker", "urllib3", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    given = {name: record.__dict__[name] for name in FIELDS if record.__dict__.get(name) is not None}
    correlation_id = _correlation_id.get()
    return {"correlation_id": correlation_id, **given} if correlation_id else given


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Time, level, message, then `name=value` pairs; control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and its traceback when it has one."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        pairs = " ".join(f"{name}={value}" for name, value in _facts(record).items())
        line = f"{moment} {record.levelname} {record.getMessage()} {pairs}".rstrip()
        line = line.encode("unicode_escape").decode("ascii")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class RequestLog:
    """ASGI middleware, outermost: correlation id, one line per request, and the answer to a crash.

    An error that nobody expected is logged once, with its traceback; the caller gets the correlation id.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(contract.CORRELATION_HEADER, "")
        correlation_id = given if CORRELATION.fullmatch(given) else str(uuid.uuid4())
        token = _correlation_id.set(correlation_id)
        try:
            await self._serve(scope, receive, _Answer(send, correlation_id))
        finally:
            _correlation_id.reset(token)

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        began = time.monotonic()
        try:
            await self.app(scope, receive, answer)
        except Exception as exc:
            log.exception("unexpected error")
            if answer.status is None:
                await problems.respond(exc)(scope, receive, answer)
        self.metrics.count_request(answer.status)
        log.log(_level(scope, answer.status), "request", extra=_request_facts(scope, answer, began))


class _Answer:
    """`send` that adds the correlation id and remembers the status."""

    def __init__(self, send: Send, correlation_id: str) -> None:
        self._send = send
        self._correlation_id = correlation_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[contract.CORRELATION_HEADER] = self._correlation_id
        await self._send(message)


def _request_facts(scope: Scope, answer: _Answer, began: float) -> dict[str, object]:
    peer = scope.get("client")
    return {
        "method": scope["method"],
        "path": (scope.get("raw_path") or scope["path"].encode()).decode("latin-1"),
        "status": answer.status or "gone",
        "duration_ms": int((time.monotonic() - began) * 1000),
        "peer": peer[0] if peer else None,
    }


def _level(scope: Scope, status: int | None) -> int:
    """Polling of health, metrics and a deployment's status is no news while it goes well."""
    polled = scope["path"] in {contract.HEALTH_PATH, contract.METRICS_PATH}
    quiet = (polled or scope["path"].endswith("/status")) and status == 200
    return logging.DEBUG if quiet else logging.INFO
