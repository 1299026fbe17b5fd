"""A workflow as its log tells it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from receiver.contract import ErrorCode, HealthAttempt, Stage
from tasks.narration import attempt_line, end_line, lines_of
from tasks.results import DeploymentResult
from tasks.states import Facts, StageResult
from tasks.states import WorkflowState as S

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def stage(which: Stage, error_message: str | None = None) -> StageResult:
    """A stage of 3.2 s."""
    return StageResult(
        stage=which,
        success=error_message is None,
        duration_ms=3240,
        error_message=error_message,
        started_at=NOW,
        completed_at=NOW,
    )


def told(from_state: S, to_state: S, **facts: Any) -> list[str]:
    """The lines of a change of state."""
    return list(lines_of(from_state, to_state, Facts(**facts)))


def test_a_stage_is_told_when_it_begins_and_with_its_time_when_it_ends() -> None:
    """One line each, with what it made."""
    assert told(S.PENDING, S.PACKAGING) == ["1 package: begun (PENDING -> PACKAGING)"]
    assert told(S.PACKAGING, S.TRANSFERRING, stage=stage(Stage.PACKAGE), image_size_bytes=4_210_000) == [
        "1 package: done in 3.2 s, the image has 4.2 MB",
        "2 transfer: begun (PACKAGING -> TRANSFERRING)",
    ]
    sent = {"transfer_duration_ms": 3240, "transferred_bytes": 0}
    assert told(S.TRANSFERRING, S.DEPLOYING, stage=stage(Stage.TRANSFER), deployment_metrics=sent) == [
        "2 transfer: done in 3.2 s, nothing had to be sent",
        "3 deploy: begun (TRANSFERRING -> DEPLOYING)",
    ]


def test_a_failed_stage_says_why_and_what_follows() -> None:
    """The cause stands where it happened, then the way back."""
    failed = stage(Stage.VALIDATE, "HTTP 404, expected 200")
    code = ErrorCode.HEALTH_CHECK_FAILED
    assert told(S.VALIDATING, S.ROLLING_BACK, stage=failed, error_code=code) == [
        "4 validate: failed after 3.2 s: HTTP 404, expected 200",
        "VALIDATING -> ROLLING_BACK: HEALTH_CHECK_FAILED",
    ]
    assert told(S.ROLLING_BACK, S.ROLLBACK_COMPLETED) == ["ROLLING_BACK -> ROLLBACK_COMPLETED"]


def test_health_attempts_that_were_not_told_yet_come_before_the_end_of_their_stage() -> None:
    """With what the container answered."""
    attempt = HealthAttempt(attempt=1, checked_at=NOW, status="passed", status_code=200, duration_ms=12)
    assert told(S.VALIDATING, S.COMPLETED, stage=stage(Stage.VALIDATE), health_attempts=(attempt,)) == [
        "health attempt 1 passed: HTTP 200 in 12 ms",
        "4 validate: done in 3.2 s",
        "VALIDATING -> COMPLETED",
    ]


def test_an_attempt_without_an_answer_says_why() -> None:
    """The message of the attempt."""
    silent = {"attempt": 2, "checked_at": NOW, "status": "failed", "duration_ms": 5000}
    assert attempt_line(HealthAttempt(**silent, message="connection refused")) == (
        "health attempt 2 failed: connection refused in 5.0 s"
    )
    assert attempt_line(HealthAttempt(**silent)) == "health attempt 2 failed: no answer in 5.0 s"


def result(**fields: Any) -> DeploymentResult:
    """A deployment that serves; fields replace."""
    given: dict[str, Any] = dict.fromkeys(DeploymentResult.model_fields) | {
        "success": True,
        "workflow_id": "w1",
        "container_name": "web",
        "image_tag": "v2",
        "remote_host": "host-a",
        "state": S.COMPLETED,
        "deployed_url": "http://10.0.0.7:8060",
        "total_duration_ms": 7900,
        "stages_completed": list(Stage),
        "stages_failed": [],
        "health_status": {},
        "deployment_metrics": {"service_interruption_ms": 900},
        "rollback_performed": False,
    }
    return DeploymentResult.model_validate(given | fields)


def test_the_end_says_what_serves_where() -> None:
    """With the URL, the whole time and the time without service; after a failure, what serves instead."""
    assert end_line(result()) == (
        "web:v2 serves on host-a at http://10.0.0.7:8060, after 7.9 s; 900 ms without service"
    )
    undone = {"success": True, "previous_container_restored": True}
    failed = result(
        success=False,
        state=S.ROLLBACK_COMPLETED,
        rollback_result=undone,
        deployment_metrics={},
        deployed_url=None,
    )
    assert end_line(failed) == "rolled back: the previous container serves on host-a, after 7.9 s"
