"""What a host's status means for the workflow: stage results, failures, rollback result. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from receiver.contract import SETTLED, DeploymentStatus, ErrorCode, HostState, OperationResult, Stage
from tasks.errors import ERROR_CLASSES, DeploymentLost, GantryError
from tasks.states import StageResult

LOST = "unknown"
_SWITCHES = frozenset({"stop_existing_container", "switch_traffic"})
_UNDONE = frozenset({HostState.FAILED, HostState.RESTORING, HostState.RESTORED, HostState.RESTORE_FAILED})


def has_started(status: DeploymentStatus) -> bool:
    """True when the new container was started, whatever came after."""
    return any(done.name == "start_container" and done.success for done in status.operations)


def has_ended(status: DeploymentStatus) -> bool:
    """True when the deployment is kept, or failed and is being undone."""
    return status.state.settled or status.state in _UNDONE


def started_or_ended(status: DeploymentStatus) -> bool:
    """True when stage 3 is over, either way."""
    return has_started(status) or has_ended(status)


def failure_of(status: DeploymentStatus) -> GantryError:
    """The host's own error as a named one."""
    code = status.error_code or ErrorCode.DEPLOYMENT_FAILED
    cause = status.error_message or f"the host ended the deployment as {status.state}"
    return ERROR_CLASSES[code](cause)


def stage_result(status: DeploymentStatus, stage: Stage, failure: GantryError | None = None) -> StageResult:
    """One host-side stage as the host journalled it; `failure` when it is the one that failed."""
    done = tuple(found for found in status.operations if found.stage == stage)
    began, ended = _span(done, status)
    return StageResult(
        stage=stage,
        success=failure is None,
        duration_ms=int((ended - began).total_seconds() * 1000),
        operations=done,
        gates=tuple(gate for gate in status.gates if gate.stage == stage),
        error_code=failure.error_code if failure else None,
        error_message=str(failure) if failure else None,
        started_at=began,
        completed_at=ended,
    )


def _span(done: tuple[OperationResult, ...], status: DeploymentStatus) -> tuple[datetime, datetime]:
    if not done:
        return status.updated_at, status.updated_at
    return done[0].started_at, done[-1].started_at + timedelta(milliseconds=done[-1].duration_ms)


def health_status(status: DeploymentStatus) -> dict[str, Any]:
    """The specification's `health_status`."""
    facts = status.facts
    return {
        "container_running": facts.container_running,
        "health_endpoint_accessible": facts.health_endpoint_accessible,
        "service_registered": facts.service_registered,
        "attempts": len(status.health_attempts),
    }


def host_metrics(status: DeploymentStatus) -> dict[str, int]:
    """Figures that only the host knows: milliseconds in which nothing served."""
    silent_ms = status.facts.service_interruption_ms
    return {} if silent_ms is None else {"service_interruption_ms": silent_ms}


def not_rolled_back(cause: str) -> dict[str, Any]:
    """The specification's `rollback_result` where the host itself said nothing of it."""
    return {
        "success": False,
        "previous_container_restored": False,
        "rollback_duration_ms": 0,
        "error_message": " ".join(cause.split()),
    }


def broke_off(error: object) -> dict[str, Any]:
    """The rollback result when the rollback itself broke off; a deployment that is lost is never settled."""
    told = not_rolled_back(f"the rollback broke off: {error}")
    return {**told, "host_state": LOST} if isinstance(error, DeploymentLost) else told


def is_final(rollback: Mapping[str, Any]) -> bool:
    """True when the host has said how it ended, or that it will never know."""
    said = rollback.get("host_state")
    return said == LOST or said in SETTLED


def rollback_result(status: DeploymentStatus) -> dict[str, Any]:
    """The specification's `rollback_result`, the host's state, and whether the old one was ever stopped."""
    undone = status.state in {HostState.RESTORED, HostState.ABORTED, HostState.REJECTED}
    cause = status.error_message or f"the host is {status.state}"
    if status.state is HostState.KEPT:
        cause = "the host had found the new container healthy and keeps it"
    return {
        "success": undone,
        "previous_container_restored": bool(status.facts.previous_container_restored),
        "rollback_duration_ms": status.facts.rollback_duration_ms or 0,
        "error_message": None if undone else cause,
        "host_state": status.state.value,
        "switched": any(done.name in _SWITCHES for done in status.operations),
    }
