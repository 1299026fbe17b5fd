"""Problem details (RFC 9457) of the HTTP API: what a caller is told, and how it goes on.

Every refusal has a slug, a status and a next step. Nothing of the request's body is repeated: it may hold
secrets. Knows the errors of the records, nothing of Prefect.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException

from tasks.events import clean_text
from tasks.records import RecordsUnreachable, WorkflowUnknown

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
URN = "urn:gantry:problem:"
MAX_FIELDS = 20


class FieldError(BaseModel):
    """One wrong field, without its value."""

    field: str
    message: str


class ApiProblem(BaseModel):
    """RFC 9457 problem details with the caller's next step; `errors` names wrong fields."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:gantry:problem:workflow-unknown",
                    "title": "No deployment has this workflow id",
                    "status": 404,
                    "detail": "neither the records nor Prefect know workflow 'abc'",
                    "next_step": "Compare the id with GET /api/v1/deployments.",
                    "errors": [],
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    detail: str
    next_step: str
    errors: list[FieldError] = []


class Refusal(Exception):
    """The request was refused"""

    slug: ClassVar[str] = "refused"
    status: ClassVar[int] = 400
    next_step: ClassVar[str] = "Correct the request and send it again."

    def __init__(
        self,
        detail: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        errors: list[FieldError] | None = None,
    ) -> None:
        super().__init__(detail or _title(type(self)))
        self.headers = dict(headers or {})
        self.errors = errors or []


class Malformed(Refusal):
    """The request does not follow the documentation"""

    slug, status = "malformed-request", 422
    next_step = "Correct the named fields and send the request again; /docs lists what each call takes."


class NotJson(Refusal):
    """The body is not announced as JSON"""

    slug, status = "not-json", 415
    next_step = "Send the header Content-Type: application/json."


class WorkflowNotFound(Refusal):
    """No deployment has this workflow id"""

    slug, status = "workflow-unknown", 404
    next_step = "Compare the id with GET /api/v1/deployments; records that were pruned are gone."


class KeyReused(Refusal):
    """The Idempotency-Key belongs to another request"""

    slug, status = "idempotency-conflict", 409
    next_step = "Use a new Idempotency-Key for a new request; repeat a request with exactly its own body."


class Unavailable(Refusal):
    """A service behind the API does not answer"""

    slug, status = "service-unavailable", 503
    next_step = "Ask GET /health which service it is, and send the request again when it answers."

    def __init__(self, detail: str = "", *, retry_after_seconds: int = 5) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_seconds)})


class RecordsUnavailable(Unavailable):
    """The records do not answer"""

    slug = "records-unavailable"
    next_step = RecordsUnreachable.next_step


class Unexpected(Refusal):
    """The API met an unexpected error"""

    slug, status = "internal-error", 500
    next_step = "Look for the answer's X-Correlation-ID in the API's log."


def respond(exc: Exception) -> Response:
    """The answer that tells `exc`; an unknown kind of error tells nothing."""
    told = _as_refusal(exc)
    problem = ApiProblem(
        type=URN + told.slug,
        title=_title(type(told)),
        status=told.status,
        detail=clean_text(str(told)),
        next_step=told.next_step,
        errors=told.errors,
    )
    return Response(problem.model_dump_json(), told.status, told.headers, MEDIA_TYPE)


def malformed(exc: ValidationError | RequestValidationError) -> Malformed:
    """Names each wrong field and what is wrong, without the values: they may be secret."""
    errors = [_field(error) for error in exc.errors()[:MAX_FIELDS]]
    return Malformed("; ".join(f"{error.field}: {error.message}" for error in errors[:5]), errors=errors)


def install(app: FastAPI) -> None:
    """Make the application answer its errors by `respond`."""
    for kind in (Refusal, WorkflowUnknown, RecordsUnreachable):
        app.add_exception_handler(kind, _answer)
    for foreign in (RequestValidationError, HTTPException):
        app.add_exception_handler(foreign, _answer)


async def _answer(request: Request, exc: Exception) -> Response:
    response = respond(exc)
    if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        correlation_id = getattr(request.state, "correlation_id", None)
        log.warning("%s", clean_text(str(exc)), extra={"correlation_id": correlation_id})
    return response


def _as_refusal(exc: Exception) -> Refusal:
    if isinstance(exc, Refusal):
        return exc
    if isinstance(exc, WorkflowUnknown):
        return WorkflowNotFound(str(exc))
    if isinstance(exc, RecordsUnreachable):
        return RecordsUnavailable()
    if isinstance(exc, RequestValidationError):
        return malformed(exc)
    if isinstance(exc, HTTPException):
        return _http_error(exc)
    return Unexpected("the request was not completed")


def _http_error(exc: HTTPException) -> Refusal:
    """Unknown paths and methods, as a refusal of their own kind."""
    phrase = HTTPStatus(exc.status_code).phrase
    words = {
        "__doc__": phrase,
        "slug": phrase.lower().replace(" ", "-"),
        "status": exc.status_code,
        "next_step": "Compare method and path with /docs.",
    }
    kind: type[Refusal] = type("HttpRefusal", (Refusal,), words)
    return kind(str(exc.detail), headers=exc.headers)


def _title(kind: type[Exception]) -> str:
    return (kind.__doc__ or kind.__name__).strip().splitlines()[0]


def _field(error: Mapping[str, Any]) -> FieldError:
    where = [str(part) for part in error["loc"] if part not in {"query", "body", "path"}]
    return FieldError(field=".".join(where) or "body", message=error["msg"].removeprefix("Value error, "))
