"""The HTTP API of the control host: its routes, and how the application is put together.

Endpoints trust what reaches them: `deployments.api_access` has let the request in. Work is done elsewhere:
this file says what is asked for under which path, and what the answers are.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import ValidationError

from deployments import api_docs, api_problems, metrics
from deployments.api_access import Access, RequestLog
from deployments.api_health import Health, version
from deployments.api_models import (
    EXAMPLE_ID,
    PREFIX,
    DeploymentRequest,
    HealthAnswer,
    HistoryAnswer,
    ListAnswer,
    ListOptions,
    StageView,
    StatusAnswer,
    TriggerAnswer,
    TriggerOptions,
    WorkflowView,
    status_path,
)
from deployments.api_problems import ApiProblem, FieldError, Malformed, NotJson
from deployments.api_queries import Cursor, CursorRefused, WorkflowFilter, read_page
from deployments.api_services import Services
from deployments.api_tokens import TokenStore
from deployments.api_trigger import trigger
from deployments.api_workflows import NotBegun, Workflows
from receiver.contract import HEALTH_PATH, IDEMPOTENCY_HEADER, METRICS_PATH

log = logging.getLogger(__name__)
ANSWERS = (TriggerAnswer, ListAnswer, StatusAnswer, HistoryAnswer, HealthAnswer, ApiProblem)
OPEN_PATHS = frozenset({HEALTH_PATH, "/docs", "/openapi.json"})
DESCRIPTION = (
    "Trigger deployments of containers to remote hosts, and follow them.\n\n"
    "Every call but /health, /docs and /openapi.json needs the header Authorization: Bearer TOKEN. "
    "A refusal is told as problem details (RFC 9457) with the next step. X-Correlation-ID is taken over "
    "when given, is in every answer, and is a tag of the flow run that a request starts."
)


@dataclass(frozen=True)
class Parts:
    """What the endpoints use."""

    services: Services
    workflows: Workflows
    health: Health


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


def _problems(**told: str) -> dict[int | str, dict[str, Any]]:
    """Documentation of a call's refusals, by `p<status>`."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ApiProblem"}}}
    return {int(name[1:]): {"description": text, "content": content} for name, text in told.items()}


TheParts = Annotated[Parts, Depends(_parts)]
IdempotencyKey = Annotated[
    str | None,
    Header(alias=IDEMPOTENCY_HEADER, description="A request with the same key is the same deployment."),
]
_UNAUTHENTICATED, _DOWN = "No token, or an unknown one.", "The records or Prefect do not answer."
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/DeploymentRequest"}}},
    }
}
router = APIRouter()


@router.post(
    f"{PREFIX}/trigger",
    summary="Start a deployment",
    response_model=TriggerAnswer,
    openapi_extra=_BODY,
    responses={
        200: {"description": "The deployment has ended: success or failed (with wait=true)."},
        202: {
            "description": "Started: accepted; or running when the wait is over.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TriggerAnswer"}}},
        },
        **_problems(
            p401=_UNAUTHENTICATED,
            p409="The Idempotency-Key belongs to another request.",
            p415="The body is not announced as JSON.",
            p422="A field is wrong; nothing was started.",
            p503=_DOWN,
        ),
    },
)
async def trigger_deployment(
    request: Request,
    response: Response,
    parts: TheParts,
    options: Annotated[TriggerOptions, Query()],
    idempotency_key: IdempotencyKey = None,
) -> TriggerAnswer:
    """Start a deployment through Prefect; with `wait=true` answer when it has ended.

    `workflow_id` is the id of Prefect's flow run. A run that Prefect ended before it began is told as failed.
    """
    started = await trigger(
        parts.services,
        await _read(request),
        key=idempotency_key,
        correlation_id=request.state.correlation_id,
        caller=getattr(request.state, "caller", None),
    )
    _log_started(request, started.workflow_id, is_repetition=started.is_repetition)
    answer = TriggerAnswer.started(started.workflow_id, "accepted")
    if options.wait:
        answer = await _wait(parts.workflows, started.workflow_id, options.wait_seconds, request)
    response.headers["Location"] = status_path(started.workflow_id)
    response.status_code = 202 if answer.status in {"accepted", "running"} else 200
    return answer


@router.get(
    PREFIX,
    summary="List deployments",
    responses=_problems(p401=_UNAUTHENTICATED, p422="A filter is wrong.", p503=_DOWN),
)
async def list_deployments(parts: TheParts, options: Annotated[ListOptions, Query()]) -> ListAnswer:
    """Deployments that have begun, newest first; page on with `cursor`.

    Pages are stable: deployments that start meanwhile neither repeat rows nor hide any.
    """
    wanted = WorkflowFilter(
        container_name=options.container_name,
        remote_host=options.remote_host,
        states=tuple(options.state),
        success=options.success,
        since=options.since,
        until=options.until,
    )
    after = _cursor(options.cursor)
    async with parts.services.records() as records:
        rows = await read_page(records, wanted, after, options.limit + 1)
    page = rows[: options.limit]
    more = Cursor(page[-1].created_at, page[-1].workflow_id).text() if len(rows) > len(page) else None
    return ListAnswer.of(page, more)


@router.get(
    f"{PREFIX}/status/{{workflow_id}}",
    summary="Status of a deployment",
    responses=_problems(p401=_UNAUTHENTICATED, p404="Nobody knows this workflow id.", p503=_DOWN),
)
async def tell_status(workflow_id: str, parts: TheParts) -> StatusAnswer:
    """Where a deployment stands, and how its stages so far ended.

    A run that no worker has taken yet is PENDING, with Prefect's state beside it.
    """
    found = await parts.workflows.find(workflow_id)
    if isinstance(found, NotBegun):
        return StatusAnswer(workflow_state=WorkflowView.of(found), stage_results=[])
    async with parts.services.records() as records:
        stages = await records.stages(workflow_id)
    return StatusAnswer(
        workflow_state=WorkflowView.of(found), stage_results=[StageView.of(stage) for stage in stages]
    )


@router.get(
    f"{PREFIX}/{{workflow_id}}/history",
    summary="History of a deployment",
    responses=_problems(p401=_UNAUTHENTICATED, p404="Nobody knows this workflow id.", p503=_DOWN),
)
async def tell_history(workflow_id: str, parts: TheParts) -> HistoryAnswer:
    """Everything that is recorded of a deployment: request, transitions, stages, events.

    Values of environment variables and build arguments are masked.
    """
    found = await parts.workflows.find(workflow_id)
    if isinstance(found, NotBegun):
        return HistoryAnswer(workflow=WorkflowView.of(found))
    async with parts.services.records() as records:
        return HistoryAnswer.of(
            found,
            await records.transitions(workflow_id),
            await records.stages(workflow_id),
            await records.outbox(workflow_id),
        )


@router.get(
    HEALTH_PATH,
    summary="Health of the API and of the services behind it",
    responses={
        503: {
            "description": "The records or Prefect do not answer.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/HealthAnswer"}}},
        }
    },
)
async def tell_health(response: Response, parts: TheParts) -> HealthAnswer:
    """Every service, asked at the same time for two seconds at most; needs no token."""
    answer = await parts.health.ask()
    response.status_code = 503 if answer.status == "unhealthy" else 200
    return answer


@router.get(
    METRICS_PATH,
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}},
        **_problems(p401="No token, unless GANTRY_METRICS_OPEN=1.", p503="The records do not answer."),
    },
)
async def tell_metrics(parts: TheParts) -> Response:
    """Every metric, computed from the records."""
    async with parts.services.records() as records:
        return Response(await metrics.render(records), media_type=metrics.CONTENT_TYPE)


def create_app(services: Services, tokens: TokenStore | None, *, metrics_are_open: bool = False) -> FastAPI:
    """The application; opens nothing before its first request. `tokens` None lets every caller in."""
    app = FastAPI(
        title="Gantry",
        version=version(),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.parts = Parts(services, Workflows(services), Health(services))
    app.include_router(router)
    _document(app)
    api_problems.install(app)
    open_paths = OPEN_PATHS | {METRICS_PATH} if metrics_are_open else OPEN_PATHS
    app.add_middleware(Access, tokens=tokens, open_paths=open_paths)
    app.add_middleware(RequestLog, quiet_paths={HEALTH_PATH, METRICS_PATH})
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    parts: Parts = app.state.parts
    try:
        yield
    finally:
        await parts.services.close()


async def _wait(
    workflows: Workflows, workflow_id: str, limit_seconds: float, request: Request
) -> TriggerAnswer:
    found = await workflows.wait(workflow_id, limit_seconds, request.is_disconnected)
    return TriggerAnswer.of(found) if found else TriggerAnswer.started(workflow_id, "running")


async def _read(request: Request) -> DeploymentRequest:
    """The body by pydantic's own parser, which also refuses texts that no database can hold."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # It also keeps web pages out: a browser asks first before it sends JSON to another site.
        raise NotJson
    try:
        return DeploymentRequest.model_validate_json(await request.body())
    except ValidationError as exc:
        raise api_problems.malformed(exc) from None  # its cause would carry the values into the log


def _cursor(text: str | None) -> Cursor | None:
    try:
        return Cursor.parse(text) if text is not None else None
    except CursorRefused as exc:
        raise Malformed(f"cursor: {exc}", errors=[FieldError(field="cursor", message=str(exc))]) from exc


def _log_started(request: Request, workflow_id: str, *, is_repetition: bool) -> None:
    caller = getattr(request.state, "caller", None)
    log.info(
        "workflow %s %s by %s",
        workflow_id,
        "asked for again" if is_repetition else "triggered",
        f"token {caller}" if caller else "a caller without a token",
        extra={"correlation_id": request.state.correlation_id},
    )


def _document(app: FastAPI) -> None:
    """Serve the description as `/openapi.json`, which FastAPI does, and as the page `/docs`."""
    described = api_docs.describe(app, asked=[DeploymentRequest], answered=ANSWERS, open_paths=OPEN_PATHS)
    accepted = TriggerAnswer.started(EXAMPLE_ID, "accepted").model_dump(mode="json")
    told = described["paths"][f"{PREFIX}/trigger"]["post"]["responses"]["202"]
    told["content"]["application/json"]["example"] = accepted
    app.openapi = lambda: described  # type: ignore[method-assign]  # as FastAPI's manual has it

    async def tell_docs() -> HTMLResponse:
        headers = {"Content-Security-Policy": api_docs.CONTENT_SECURITY_POLICY}
        return HTMLResponse(api_docs.render(described), headers=headers)

    app.add_api_route("/docs", tell_docs, include_in_schema=False)
