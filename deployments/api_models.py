"""What the HTTP API takes and tells: models with examples, and what of a record is told.

Values of environment variables and build arguments are never told, whatever their names: the records mask
what looks like a secret, and here the reader may be somebody else. Imports no SQL and no Prefect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from deployments.api_queries import WorkflowRow
from deployments.api_workflows import Found, NotBegun
from receiver.contract import ErrorCode, OperationResult, QualityGate, Stage
from tasks.events import MASK
from tasks.parameters import DeploymentParameters
from tasks.records import OutboxRow, StageResult, TransitionRow, WorkflowRecord, WorkflowState

PREFIX = "/api/v1/deployments"
DEFAULT_WAIT_SECONDS = 300
MAX_WAIT_SECONDS = 900
MAX_PAGE = 200
_HIDDEN = frozenset({"environment_variables", "build_args"})
EXAMPLE_ID = "6f1c7d2e-0f0e-4b7e-9d5b-2f6a3c9d1e10"
_AT = "2026-01-31T12:00:00Z"

WEB: dict[str, Any] = {
    "container_name": "web",
    "remote_host": "host-b",
    "image_tag": "v1.2.0",
    "build_options": {"build_context": "/srv/web"},
    "deployment_config": {
        "environment_variables": {"DATABASE_URL": "secret://web-database"},
        "port_mappings": [{"host_port": 8080, "container_port": 8080}],
    },
    "health_check_config": {"health_endpoint": "/health"},
}
"""The example of a request's body."""


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [values]})


class DeploymentRequest(DeploymentParameters):
    """What is deployed, where and how: `container_name` and `remote_host` are required."""

    model_config = _example(**WEB)


class TriggerOptions(BaseModel):
    """Query of `POST /api/v1/deployments/trigger`."""

    model_config = ConfigDict(extra="forbid")

    wait: Annotated[bool, Field(description="Answer when the deployment has ended.")] = False
    wait_seconds: Annotated[
        int, Field(ge=1, le=MAX_WAIT_SECONDS, description="How long to wait at most; then 202, 'running'.")
    ] = DEFAULT_WAIT_SECONDS


class ListOptions(BaseModel):
    """Query of `GET /api/v1/deployments`; times need their zone, and a '+' in them is written %2B."""

    model_config = ConfigDict(extra="forbid")

    container_name: str | None = None
    remote_host: str | None = None
    state: Annotated[list[WorkflowState], Field(description="One or more states.")] = []
    success: Annotated[bool | None, Field(description="Only those that ended so.")] = None
    since: Annotated[AwareDatetime | None, Field(description="Created at this time or later.")] = None
    until: Annotated[AwareDatetime | None, Field(description="Created before this time.")] = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50
    cursor: Annotated[str | None, Field(max_length=500, description="next_cursor of the page before.")] = None


class TriggerAnswer(BaseModel):
    """How a triggered deployment stands; durations in milliseconds."""

    model_config = _example(
        status="success",
        workflow_id=EXAMPLE_ID,
        deployment_id="0d3b9f3e-7a42-4d43-8a1e-7f5d0f6f2c11",
        deployed_url="http://10.0.0.7:8080",
        duration_ms=41250,
        error_code=None,
        error_message=None,
        status_url=f"{PREFIX}/status/{EXAMPLE_ID}",
    )

    status: Literal["accepted", "running", "success", "failed"]
    workflow_id: str
    deployment_id: str | None = None
    deployed_url: str | None = None
    duration_ms: int | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None
    status_url: str

    @classmethod
    def started(cls, workflow_id: str, status: Literal["accepted", "running"]) -> TriggerAnswer:
        """Of a run that was started, and of which no more is known."""
        return cls(status=status, workflow_id=workflow_id, status_url=status_path(workflow_id))

    @classmethod
    def of(cls, found: Found) -> TriggerAnswer:
        """Of a deployment that was waited for."""
        url = status_path(found.workflow_id)
        if isinstance(found, NotBegun):
            status: Literal["failed", "running"] = "failed" if found.ended else "running"
            return cls(
                status=status,
                workflow_id=found.workflow_id,
                error_message=found.error_message,
                status_url=url,
            )
        ended: Literal["success", "failed"] = "success" if found.success else "failed"
        return cls(
            status=ended if found.current_state.terminal else "running",
            workflow_id=found.workflow_id,
            deployment_id=found.deployment_id,
            deployed_url=found.deployed_url,
            duration_ms=found.total_duration_ms,
            error_code=found.error_code,
            error_message=found.error_message,
            status_url=url,
        )


class WorkflowView(BaseModel):
    """Where a deployment stands; `success` and `total_duration_ms` are null until its end."""

    model_config = ConfigDict(from_attributes=True)

    workflow_id: str
    current_state: WorkflowState
    stages_completed: list[Stage] = []
    stages_failed: list[Stage] = []
    total_duration_ms: int | None = None
    success: bool | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None
    failure_stage: Stage | None = None
    deployment_id: str | None = None
    container_name: str | None
    image_tag: str
    remote_host: str | None
    deployed_url: str | None = None
    rollback_performed: bool = False
    prefect_state: Annotated[
        str | None, Field(description="Prefect's state of a run that no worker has begun; else null.")
    ] = None
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None = None

    @classmethod
    def of(cls, found: Found) -> WorkflowView:
        """Of a record, or of a run without one."""
        view = cls.model_validate(found)
        if isinstance(found, NotBegun) and found.ended:
            return view.model_copy(update={"success": False})
        return view


class StageView(BaseModel):
    """How one of the four stages ended."""

    stage_number: int
    stage_name: Stage
    success: bool
    duration_ms: int
    operations: list[OperationResult]
    gates: list[QualityGate]
    error_code: ErrorCode | None
    error_message: str | None
    started_at: datetime
    completed_at: datetime

    @classmethod
    def of(cls, result: StageResult) -> StageView:
        """Of a stage in the records."""
        names = ("success", "duration_ms", "error_code", "error_message", "started_at", "completed_at")
        return cls(
            stage_number=result.stage.number,
            stage_name=result.stage,
            operations=list(result.operations),
            gates=list(result.gates),
            **{name: getattr(result, name) for name in names},
        )


_STATE_EXAMPLE: dict[str, Any] = {
    "workflow_id": EXAMPLE_ID,
    "current_state": "TRANSFERRING",
    "stages_completed": ["package_preparation"],
    "container_name": "web",
    "image_tag": "v1.2.0",
    "remote_host": "host-b",
    "created_at": _AT,
    "updated_at": _AT,
}
_STAGE_EXAMPLE: dict[str, Any] = {
    "stage_number": 1,
    "stage_name": "package_preparation",
    "success": True,
    "duration_ms": 14200,
    "operations": [
        {
            "name": "build_docker_image",
            "stage": "package_preparation",
            "success": True,
            "started_at": _AT,
            "duration_ms": 12900,
        }
    ],
    "gates": [],
    "error_code": None,
    "error_message": None,
    "started_at": _AT,
    "completed_at": _AT,
}


class StatusAnswer(BaseModel):
    """The specification's two parts: where the deployment stands, and its stages so far."""

    model_config = _example(workflow_state=_STATE_EXAMPLE, stage_results=[_STAGE_EXAMPLE])

    workflow_state: WorkflowView
    stage_results: list[StageView]


class TransitionView(BaseModel):
    """One change of state."""

    model_config = ConfigDict(from_attributes=True)

    sequence: int
    from_state: WorkflowState
    to_state: WorkflowState
    reason: str
    at: datetime


class EventView(BaseModel):
    """One event of the outbox; `sent_at` is null until the broker has it."""

    event_id: str
    sequence: int
    topic: str
    event_type: str
    payload: dict[str, Any]
    created_at: datetime
    sent_at: datetime | None

    @classmethod
    def of(cls, row: OutboxRow) -> EventView:
        """Of a row, its values hidden."""
        names = ("event_id", "sequence", "topic", "event_type", "created_at", "sent_at")
        payload = hide_values(json.loads(row.message).get("payload", {}))
        return cls(payload=payload, **{name: getattr(row, name) for name in names})


class HistoryAnswer(BaseModel):
    """Everything that the records hold of one deployment, oldest first."""

    model_config = _example(
        workflow=_STATE_EXAMPLE,
        request=WEB,
        transitions=[
            {
                "sequence": 1,
                "from_state": "PENDING",
                "to_state": "PACKAGING",
                "reason": "start_workflow",
                "at": _AT,
            }
        ],
        stages=[_STAGE_EXAMPLE],
        events=[],
    )

    workflow: WorkflowView
    request: dict[str, Any] = {}
    health_status: dict[str, Any] | None = None
    deployment_metrics: dict[str, Any] | None = None
    rollback_result: dict[str, Any] | None = None
    transitions: list[TransitionView] = []
    stages: list[StageView] = []
    events: list[EventView] = []

    @classmethod
    def of(
        cls,
        record: WorkflowRecord,
        transitions: Iterable[TransitionRow],
        stages: Iterable[StageResult],
        events: Iterable[OutboxRow],
    ) -> HistoryAnswer:
        """Of a record with its rows."""
        maps = ("health_status", "deployment_metrics", "rollback_result")
        return cls(
            workflow=WorkflowView.of(record),
            request=hide_values(record.request),
            transitions=[TransitionView.model_validate(row) for row in transitions],
            stages=[StageView.of(stage) for stage in stages],
            events=[EventView.of(row) for row in events],
            **{name: getattr(record, name) for name in maps},
        )


class ListedWorkflow(BaseModel):
    """One deployment in the list."""

    model_config = ConfigDict(from_attributes=True)

    workflow_id: str
    deployment_id: str | None
    container_name: str
    image_tag: str
    remote_host: str
    current_state: WorkflowState
    success: bool | None
    error_code: ErrorCode | None
    error_message: str | None
    failure_stage: Stage | None
    deployed_url: str | None
    total_duration_ms: int | None
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None


class ListAnswer(BaseModel):
    """One page, newest first; `next_cursor` is null on the last one."""

    model_config = _example(
        deployments=[
            {name: _STATE_EXAMPLE.get(name) for name in ListedWorkflow.model_fields},
        ],
        next_cursor="WyIyMDI2LTAxLTMxVDEyOjAwOjAwKzAwOjAwIiwgIjZmMWM3ZDJlIl0",
    )

    deployments: list[ListedWorkflow]
    next_cursor: str | None

    @classmethod
    def of(cls, rows: Iterable[WorkflowRow], next_cursor: str | None) -> ListAnswer:
        """Of the rows of one page."""
        return cls(deployments=[ListedWorkflow.model_validate(row) for row in rows], next_cursor=next_cursor)


class ServiceHealth(BaseModel):
    """One service behind the API."""

    status: Literal["healthy", "unhealthy", "not_configured"]
    detail: str
    latency_ms: int | None = None


class HealthAnswer(BaseModel):
    """`unhealthy` (503) without records or Prefect; `degraded` (200) without Docker or Kafka."""

    model_config = _example(
        status="healthy",
        version="0.1.0",
        services={
            "records": {"status": "healthy", "detail": "sqlite", "latency_ms": 1},
            "prefect": {"status": "healthy", "detail": "answers", "latency_ms": 8},
            "docker": {"status": "healthy", "detail": "answers", "latency_ms": 6},
            "kafka": {"status": "not_configured", "detail": "no broker is named"},
        },
    )

    status: Literal["healthy", "degraded", "unhealthy"]
    version: str
    services: dict[str, ServiceHealth]


def status_path(workflow_id: str) -> str:
    """Where a deployment's status is asked for."""
    return f"{PREFIX}/status/{workflow_id}"


def hide_values(value: Any) -> Any:
    """A copy in which every environment variable and build argument is masked, but for references."""
    if isinstance(value, Mapping):
        return {
            name: _hidden(inner) if name in _HIDDEN else hide_values(inner) for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [hide_values(inner) for inner in value]
    return value


def _hidden(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return MASK
    return {name: value if str(value).startswith("secret://") else MASK for name, value in values.items()}
