"""The workflow state machine as a table, what a workflow is, and the facts that move it.

Pure: imports the wire's words and the named errors; no SQL, no clock, no Prefect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from receiver.contract import ErrorCode, HealthAttempt, OperationResult, QualityGate, Stage
from tasks.errors import GantryError


class WorkflowState(StrEnum):
    """Where a workflow stands; the value is what the records and the events carry."""

    PENDING = "PENDING"
    PACKAGING = "PACKAGING"
    TRANSFERRING = "TRANSFERRING"
    DEPLOYING = "DEPLOYING"
    VALIDATING = "VALIDATING"
    COMPLETED = "COMPLETED"
    ROLLING_BACK = "ROLLING_BACK"
    ROLLBACK_COMPLETED = "ROLLBACK_COMPLETED"
    FAILED = "FAILED"

    @property
    def terminal(self) -> bool:
        """True when no transition leads out of this state."""
        return self in TERMINAL


_S = WorkflowState

TRIGGERS: Mapping[tuple[WorkflowState, WorkflowState], str] = MappingProxyType(
    {
        (_S.PENDING, _S.PACKAGING): "start_workflow",
        (_S.PACKAGING, _S.TRANSFERRING): "package_complete",
        (_S.TRANSFERRING, _S.DEPLOYING): "transfer_complete",
        (_S.DEPLOYING, _S.VALIDATING): "deployment_complete",
        (_S.VALIDATING, _S.COMPLETED): "validation_complete",
        (_S.VALIDATING, _S.ROLLING_BACK): "validation_failed",
        (_S.DEPLOYING, _S.ROLLING_BACK): "deployment_failed",
        (_S.ROLLING_BACK, _S.ROLLBACK_COMPLETED): "rollback_complete",
        (_S.ROLLING_BACK, _S.FAILED): "rollback_failed",
        # Nothing on the host was touched yet, so there is nothing to roll back.
        (_S.PENDING, _S.FAILED): "start_failed",
        (_S.PACKAGING, _S.FAILED): "package_failed",
        (_S.TRANSFERRING, _S.FAILED): "transfer_failed",
        # Only for rollback_on_failure=False: the user asked to keep the failed container.
        (_S.DEPLOYING, _S.FAILED): "deployment_failed_without_rollback",
        (_S.VALIDATING, _S.FAILED): "validation_failed_without_rollback",
    }
)
TRANSITIONS: frozenset[tuple[WorkflowState, WorkflowState]] = frozenset(TRIGGERS)
TERMINAL = frozenset(WorkflowState) - {source for source, _ in TRANSITIONS}
STAGE_OF: Mapping[WorkflowState, Stage] = MappingProxyType(
    {
        _S.PACKAGING: Stage.PACKAGE,
        _S.TRANSFERRING: Stage.TRANSFER,
        _S.DEPLOYING: Stage.DEPLOY,
        _S.VALIDATING: Stage.VALIDATE,
    }
)


class TransitionRefused(GantryError):
    """The workflow's state machine holds no such transition"""

    next_step = "This is a fault in the caller: compare it with the state diagram and report it."


def check_transition(from_state: WorkflowState, to_state: WorkflowState) -> None:
    """Raise `TransitionRefused` unless the table holds the pair."""
    if (from_state, to_state) not in TRANSITIONS:
        targets = sorted(target for source, target in TRANSITIONS if source == from_state)
        raise TransitionRefused(
            f"No transition leads from {from_state} to {to_state}; "
            + (f"allowed: {', '.join(targets)}" if targets else f"{from_state} is a terminal state")
        )


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """How one of the four stages ended."""

    stage: Stage
    success: bool
    duration_ms: int
    operations: tuple[OperationResult, ...] = ()
    gates: tuple[QualityGate, ...] = ()
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    error_code: ErrorCode | None = None
    error_message: str | None = None
    started_at: datetime
    completed_at: datetime


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What became known; `None` means "no news", so the record keeps what it had.

    `deployment_metrics` adds to the keys already there; every other value replaces the old one.
    `health_attempts` become one event each: hand in only those not handed in before.
    """

    deployment_id: str | None = None
    container_id: str | None = None
    image_id: str | None = None
    image_size_bytes: int | None = None
    deployed_url: str | None = None
    total_duration_ms: int | None = None
    health_status: Mapping[str, Any] | None = None
    deployment_metrics: Mapping[str, Any] | None = None
    rollback_performed: bool | None = None
    rollback_result: Mapping[str, Any] | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None
    failure_stage: Stage | None = None
    retry_count: int | None = None
    reason: str | None = None
    stage: StageResult | None = None
    health_attempts: tuple[HealthAttempt, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WorkflowRecord:
    """One workflow as the records hold it; `request` is redacted, `event_sequence` the last one used."""

    workflow_id: str
    correlation_id: str
    container_name: str
    image_tag: str
    remote_host: str
    remote_port: int
    current_state: WorkflowState
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None = None
    deployment_id: str | None = None
    stages_completed: tuple[Stage, ...] = ()
    stages_failed: tuple[Stage, ...] = ()
    total_duration_ms: int | None = None
    success: bool | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None
    failure_stage: Stage | None = None
    retry_count: int = 0
    container_id: str | None = None
    image_id: str | None = None
    image_size_bytes: int | None = None
    deployed_url: str | None = None
    health_status: Mapping[str, Any] | None = None
    deployment_metrics: Mapping[str, Any] | None = None
    rollback_performed: bool = False
    rollback_result: Mapping[str, Any] | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    flow_run_id: str | None = None
    event_sequence: int = 0


_COPIED = (
    *("deployment_id", "container_id", "image_id", "image_size_bytes", "deployed_url", "total_duration_ms"),
    *("health_status", "rollback_performed", "rollback_result", "error_code", "error_message"),
    *("failure_stage", "retry_count"),
)


def fold(workflow: WorkflowRecord, to_state: WorkflowState, facts: Facts, at: datetime) -> WorkflowRecord:
    """The record after `facts` in `to_state` (the same state for a note); counts no events."""
    changes: dict[str, Any] = {"current_state": to_state, "updated_at": at}
    if to_state is not workflow.current_state:
        changes |= _derived(workflow, to_state, facts, at)
    changes |= {name: value for name in _COPIED if (value := getattr(facts, name)) is not None}
    if facts.deployment_metrics is not None:
        changes["deployment_metrics"] = {**(workflow.deployment_metrics or {}), **facts.deployment_metrics}
    if facts.stage is not None:
        changes |= _stage_lists(workflow, facts.stage)
    return replace(workflow, **changes)


def _derived(workflow: WorkflowRecord, to_state: WorkflowState, facts: Facts, at: datetime) -> dict[str, Any]:
    """What the transition itself says, under whatever the facts say."""
    changes: dict[str, Any] = {}
    if to_state in {_S.ROLLING_BACK, _S.FAILED}:
        changes |= _failure(workflow, facts)
    if workflow.current_state is _S.ROLLING_BACK:
        changes["rollback_performed"] = True
    if to_state is _S.COMPLETED:
        changes |= {"error_code": None, "error_message": None, "failure_stage": None}
    if to_state.terminal:
        elapsed_ms = round((at - workflow.created_at).total_seconds() * 1000)
        total_ms = workflow.total_duration_ms if workflow.total_duration_ms is not None else elapsed_ms
        changes |= {"completed_at": at, "success": to_state is _S.COMPLETED, "total_duration_ms": total_ms}
    return changes


def _failure(workflow: WorkflowRecord, facts: Facts) -> dict[str, Any]:
    """Cause and place of a failure, when the facts leave them to the stage or to the state."""
    stage = facts.stage if facts.stage is not None and not facts.stage.success else None
    code = stage.error_code if stage else None
    message = stage.error_message if stage else None
    if workflow.current_state is _S.ROLLING_BACK:
        # The alert on a failed rollback reads this code; the first cause stays in the events.
        code = code or ErrorCode.ROLLBACK_FAILED
        message = message or (facts.rollback_result or {}).get("error_message")
    place = stage.stage if stage else workflow.failure_stage or STAGE_OF.get(workflow.current_state)
    return {
        "error_code": code or workflow.error_code,
        "error_message": message or facts.reason or workflow.error_message,
        "failure_stage": place,
    }


def _stage_lists(workflow: WorkflowRecord, result: StageResult) -> dict[str, Any]:
    """A stage stands in one of the two lists: where its newest result puts it."""
    completed = set(workflow.stages_completed) - {result.stage}
    failed = set(workflow.stages_failed) - {result.stage}
    (completed if result.success else failed).add(result.stage)
    in_order = [stage for stage in Stage if stage in completed | failed]
    return {
        "stages_completed": tuple(stage for stage in in_order if stage in completed),
        "stages_failed": tuple(stage for stage in in_order if stage in failed),
    }
