"""Problem details (RFC 9457): what a caller is told when a request is refused, and how it goes on.

Each refusal has a slug, a status, one of the specification's error codes and a next step. Nothing of the
request's body is repeated: it may hold secrets. Imports nothing of ours but the contract, the ledger's,
the engine's and the operations' errors.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from receiver.contract import ErrorCode, Problem
from receiver.engine import EngineUnreachable
from receiver.ledger import DeploymentUnknown, IdempotencyConflict, StateConflict
from receiver.locks import LockHeld
from receiver.operations import RestoreFailed

MEDIA_TYPE = "application/problem+json"
URN = "urn:gantry:problem:"


class Refusal(Exception):
    """The host refused the request"""

    slug: ClassVar[str] = "refused"
    status: ClassVar[int] = 400
    error_code: ClassVar[ErrorCode] = ErrorCode.TRANSFER_FAILED
    next_step: ClassVar[str] = "Correct the request and send it again."

    def __init__(
        self, detail: str | None = None, *, headers: Mapping[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(detail or self.__doc__)
        self.headers = dict(headers or {})
        self.extra = extra


class MalformedRequest(Refusal):
    """The request does not follow the contract"""

    slug, status, error_code = "malformed-request", 422, ErrorCode.DEPLOYMENT_FAILED
    next_step = "Correct the named field and send the request again."


@dataclass(frozen=True)
class Kind:
    """How an error that is not a `Refusal` is told."""

    slug: str
    status: int
    error_code: ErrorCode
    next_step: str
    headers: Mapping[str, str] = field(default_factory=dict)


KINDS: Mapping[type[Exception], Kind] = {
    DeploymentUnknown: Kind(
        "deployment-unknown",
        404,
        ErrorCode.DEPLOYMENT_FAILED,
        "Compare the deployment id with the answer to POST /api/deploy; ask the host that gave it.",
    ),
    IdempotencyConflict: Kind(
        "idempotency-conflict",
        409,
        ErrorCode.TRANSFER_FAILED,
        "Use a new Idempotency-Key for a new request.",
    ),
    StateConflict: Kind(
        "state-conflict",
        409,
        ErrorCode.DEPLOYMENT_FAILED,
        "Ask for the deployment's status; announce a new deployment when this one has ended.",
    ),
    LockHeld: Kind(
        "container-busy",
        409,
        ErrorCode.DEPLOYMENT_FAILED,
        "Wait until the other operation on this container ends, then send the request again.",
        {"Retry-After": "5"},
    ),
    EngineUnreachable: Kind(
        "engine-unreachable",
        503,
        ErrorCode.DEPLOYMENT_FAILED,
        "Start the Docker Engine on the host (systemctl start docker); the receiver reconnects by itself.",
        {"Retry-After": "5"},
    ),
    RestoreFailed: Kind(
        "restore-failed",
        500,
        ErrorCode.ROLLBACK_FAILED,
        "Look at the deployment's status, then restore the container by hand or send restore again.",
    ),
}

LOGGED: Mapping[type[Exception], Kind] = {
    sqlite3.OperationalError: Kind(
        "ledger-unavailable",
        503,
        ErrorCode.DEPLOYMENT_FAILED,
        "Look at the disk of HOOK_RECEIVER_STATE_DIR (full, or read-only) and at the receiver's log.",
        {"Retry-After": "5"},
    ),
}
"""Told to the caller, and logged with its traceback: they rise through the application."""

_UNEXPECTED = Kind(
    "internal-error",
    500,
    ErrorCode.DEPLOYMENT_FAILED,
    "Look for the correlation id in the receiver's log on the host.",
)


def respond(exc: Exception) -> Response:
    """The answer that tells `exc`; an unknown kind of error tells nothing but its correlation id."""
    if isinstance(exc, Refusal):
        kind = Kind(exc.slug, exc.status, exc.error_code, exc.next_step, exc.headers)
        return _render(kind, _first_line(exc), str(exc), exc.extra)
    for known, kind in (*KINDS.items(), *LOGGED.items()):
        if isinstance(exc, known):
            return _render(kind, _first_line(exc), str(exc), {})
    return _render(_UNEXPECTED, "The host met an unexpected error", "The request was not completed", {})


def malformed(exc: ValidationError | RequestValidationError) -> MalformedRequest:
    """Names each wrong field and what is wrong, without the values: they may be secret."""
    wrong = [_told(error) for error in exc.errors()]
    return MalformedRequest("; ".join(wrong[:5]) + ("; ..." if len(wrong) > 5 else ""))


def install(app: FastAPI) -> None:
    """Make the application answer its errors by `respond`."""
    ours: tuple[type[Exception], ...] = (Refusal, *KINDS)
    for kind in ours:
        app.add_exception_handler(kind, _answer(respond))
    app.add_exception_handler(RequestValidationError, _answer(lambda exc: respond(malformed(exc))))
    app.add_exception_handler(HTTPException, _answer(_http_error))


def _answer(tell: Callable[[Any], Response]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handler(_: Request, exc: Exception) -> Response:
        return tell(exc)

    return handler


def _http_error(exc: HTTPException) -> Response:
    """Unknown paths and methods."""
    phrase = HTTPStatus(exc.status_code).phrase
    kind = Kind(
        phrase.lower().replace(" ", "-"),
        exc.status_code,
        ErrorCode.TRANSFER_FAILED,
        "Compare method and path with the receiver's documentation.",
        exc.headers or {},
    )
    return _render(kind, phrase, str(exc.detail), {})


def _render(kind: Kind, title: str, detail: str, extra: Mapping[str, Any]) -> Response:
    problem = Problem(
        type=URN + kind.slug,
        title=title,
        status=kind.status,
        detail=detail or title,
        error_code=kind.error_code,
        next_step=kind.next_step,
        extra=dict(extra),
    )
    return Response(problem.model_dump_json(), kind.status, dict(kind.headers), MEDIA_TYPE)


def _first_line(exc: Exception) -> str:
    return (type(exc).__doc__ or type(exc).__name__).strip().splitlines()[0]


def _told(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "body"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"
