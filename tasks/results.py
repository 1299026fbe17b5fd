"""What a deployment ends in: the specification's result, and the error that carries it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from receiver.contract import ErrorCode, HostState, Stage
from tasks.states import WorkflowRecord, WorkflowState


class DeploymentResult(BaseModel):
    """The result of `deploy-container`; durations in milliseconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True)

    success: bool
    workflow_id: str
    deployment_id: str | None
    container_name: str
    image_tag: str
    remote_host: str
    state: WorkflowState
    container_id: str | None
    image_id: str | None
    image_size_bytes: int | None
    deployed_url: str | None
    total_duration_ms: int
    stages_completed: list[Stage]
    stages_failed: list[Stage]
    health_status: dict[str, Any]
    deployment_metrics: dict[str, Any]
    rollback_performed: bool
    rollback_result: dict[str, Any] | None
    error_code: ErrorCode | None
    error_message: str | None

    @classmethod
    def of(cls, record: WorkflowRecord) -> DeploymentResult:
        """The result as the records have it."""
        return cls(
            success=bool(record.success),
            state=record.current_state,
            total_duration_ms=record.total_duration_ms or 0,
            stages_completed=list(record.stages_completed),
            stages_failed=list(record.stages_failed),
            health_status=dict(record.health_status or {}),
            deployment_metrics=dict(record.deployment_metrics or {}),
            rollback_result=dict(record.rollback_result) if record.rollback_result else None,
            **{name: getattr(record, name) for name in _SAME},
        )


_SAME = (
    *("workflow_id", "deployment_id", "container_name", "image_tag", "remote_host", "container_id"),
    *("image_id", "image_size_bytes", "deployed_url", "rollback_performed", "error_code", "error_message"),
)


class DeploymentUnsuccessful(Exception):
    """The deployment did not succeed; `result` says how far it came and what was undone"""

    def __init__(self, result: DeploymentResult, next_step: str = "") -> None:
        super().__init__(result, next_step)
        self.result = result
        self.next_step = next_step

    def __str__(self) -> str:
        told = self.result
        return f"{told.error_code}: {told.error_message}; {outcome(told)}"


def outcome(result: DeploymentResult) -> str:
    """What serves now, in a few words."""
    undone = result.rollback_result or {}
    if result.success:
        return f"{result.container_name}:{result.image_tag} serves"
    if result.state is WorkflowState.ROLLBACK_COMPLETED:
        return f"rolled back: {_undone(undone)}"
    if undone.get("host_state") == HostState.KEPT:
        return "not rolled back: the host keeps the new container, which it had found healthy"
    if undone:
        return "the rollback failed too: a person has to look"
    return "nothing on the host was touched" if not _touched(result) else "left as it is, as asked"


def _undone(undone: Mapping[str, Any]) -> str:
    if undone.get("previous_container_restored"):
        return "the previous container serves"
    return "none ran before" if undone.get("switched", True) else "what ran before was not touched"


def _touched(result: DeploymentResult) -> bool:
    return bool({Stage.DEPLOY, Stage.VALIDATE} & {*result.stages_failed})
