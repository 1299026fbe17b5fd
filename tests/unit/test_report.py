"""The report in Markdown: what an operator sees first, and what must never be in it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from receiver.contract import (
    DeploymentStatus,
    ErrorCode,
    HealthAttempt,
    HostFacts,
    HostState,
    OperationResult,
    QualityGate,
    Stage,
)
from tasks.report import fenced, render_report
from tasks.results import DeploymentResult
from tasks.states import StageResult, WorkflowState

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
SECRET = "hunter2-hunter2"


def result(**fields: Any) -> DeploymentResult:
    """A failed deployment that was rolled back; fields replace."""
    given: dict[str, Any] = dict.fromkeys(DeploymentResult.model_fields) | {
        "success": False,
        "workflow_id": "w1",
        "container_name": "web",
        "image_tag": "v2",
        "remote_host": "host-a",
        "state": WorkflowState.ROLLBACK_COMPLETED,
        "total_duration_ms": 12_340,
        "stages_completed": [Stage.PACKAGE, Stage.TRANSFER, Stage.DEPLOY],
        "stages_failed": [Stage.VALIDATE],
        "health_status": {},
        "deployment_metrics": {},
        "rollback_performed": True,
        "rollback_result": {"success": True, "previous_container_restored": True},
        "error_code": ErrorCode.HEALTH_CHECK_FAILED,
        "error_message": "answered 500",
    }
    return DeploymentResult.model_validate(given | fields)


def stage(message: str = "", *, success: bool = False) -> StageResult:
    """Stage 4 with one operation and one gate that tell `message`."""
    return StageResult(
        stage=Stage.VALIDATE,
        success=success,
        duration_ms=700,
        operations=(
            OperationResult(
                name="validate_health_endpoint",
                stage=Stage.VALIDATE,
                success=success,
                started_at=NOW,
                duration_ms=650,
                message=message,
            ),
        ),
        gates=(
            QualityGate(
                name="health_endpoint_responding", stage=Stage.VALIDATE, passed=success, message=message
            ),
        ),
        started_at=NOW,
        completed_at=NOW,
    )


def status(log_tail: str = "", **fields: Any) -> DeploymentStatus:
    """What the host said last; fields replace."""
    given: dict[str, Any] = {
        "deployment_id": "d1",
        "workflow_id": "w1",
        "container_name": "web",
        "image_tag": "v2",
        "state": HostState.RESTORED,
        "upload_offset": 0,
        "package_bytes": 3_000_000,
        "facts": HostFacts(log_tail=log_tail, service_interruption_ms=900),
        "operations": [],
        "health_attempts": [],
        "gates": [],
        "created_at": NOW,
        "updated_at": NOW,
    }
    return DeploymentStatus.model_validate(given | fields)


def rows(report: str) -> list[str]:
    """The lines of the report's tables."""
    return [line for line in report.splitlines() if line.startswith("|")]


def test_the_outcome_comes_first() -> None:
    """What, where, how it ended, and what serves now, before any table."""
    lines = render_report(result(), [stage()]).splitlines()
    assert lines[0] == "# ✗ web:v2 on host-a: ROLLBACK_COMPLETED"
    assert lines[2] == "**rolled back: the previous container serves** after 12.3 s"
    assert lines[4] == "**Cause**: `HEALTH_CHECK_FAILED`: answered 500"


def test_a_success_says_where_the_service_answers() -> None:
    """And shows no log tail, though there is one."""
    done = result(
        success=True,
        state=WorkflowState.COMPLETED,
        deployed_url="http://10.0.0.7:8060",
        rollback_result=None,
        error_code=None,
        error_message=None,
    )
    report = render_report(done, [stage(success=True)], status("listening"))
    assert report.startswith("# ✓ web:v2 on host-a: COMPLETED\n")
    link = "[http://10.0.0.7:8060](http://10.0.0.7:8060)"
    assert f"**web:v2 serves** after 12.3 s, at {link}" in report
    assert "listening" not in report
    assert "failed" not in report


def test_the_operation_that_failed_stands_out_with_its_message() -> None:
    """Stage and operation with their times, and the gate."""
    assert rows(render_report(result(), [stage("answered 500")])) == [
        "| Summary | |",
        "|---|---|",
        "| Rollback | ✓ in 0 ms |",
        "| Stage | Operation | Took | |",
        "|---|---|---:|---|",
        "| **4\u00a0validate** | | **700\u00a0ms** | ✗ **failed** |",
        "| | validate_health_endpoint | 650\u00a0ms | ✗ **failed** answered 500 |",
        "| Quality gate | | |",
        "|---|---|---|",
        "| health_endpoint_responding | ✗ **failed** | answered 500 |",
    ]


def test_the_next_step_and_the_containers_last_words_are_shown() -> None:
    """The log as it came, in a block of its own."""
    report = render_report(result(), [], status("boot\n  boom | <b>\n\n"), next_step="Check the port.")
    assert "\n**Next**: Check the port.\n" in report
    assert "\n```text\nboot\n  boom | <b>\n```\n" in report


@pytest.mark.parametrize(
    ("sent_bytes", "told"),
    [
        (3_000_000, "3.0 MB sent"),
        (1_200_000, "1.2 MB sent, 1.8 MB reused: the host had them"),
        (0, "0 B sent, 3.0 MB reused: the host had them"),
    ],
)
def test_the_summary_says_what_travelled_and_how_long_nothing_served(sent_bytes: int, told: str) -> None:
    """Size of the image, bytes sent and reused, and the time without service."""
    measured = result(
        image_size_bytes=4_210_000,
        image_id="sha256:" + "a" * 64,
        deployment_metrics={"transferred_bytes": sent_bytes},
    )
    assert rows(render_report(measured, [], status()))[2:5] == [
        f"| Image | 4.2 MB, `sha256:{'a' * 12}` |",
        f"| Transferred | {told} |",
        "| Without service | 900 ms |",
    ]


def test_the_summary_says_which_way_was_taken_and_what_was_left_out() -> None:
    """Layers sent of all, bytes before and after compression; nothing of a package where none was made."""
    metrics = {"transferred_bytes": 9, "transfer_way": "archive", "layers_known": 3, "layers_sent": 1}
    metrics |= {"unpacked_bytes": 4_210_000, "package_bytes": 1_300_000}
    report = render_report(result(deployment_metrics=metrics), [], status())
    assert "| Package | by archive: 1 of 4 layers, 4.2 MB in 1.3 MB |" in report
    none = render_report(result(deployment_metrics={**metrics, "transfer_way": "none"}), [], status())
    assert "| Package |" not in none


def test_a_rollback_by_hand_sends_nothing() -> None:
    """There is no package to count against."""
    kept = result(deployment_metrics={"transferred_bytes": 0}, rollback_result=None)
    report = render_report(kept, [], status(package_bytes=None))
    assert "| Transferred | nothing had to be sent |" in report


def test_each_health_attempt_is_a_row() -> None:
    """Its number, verdict, answer, time and moment; one without an answer says why."""
    attempts = [
        HealthAttempt(attempt=1, checked_at=NOW, status="failed", duration_ms=5000, message="no answer"),
        HealthAttempt(attempt=2, checked_at=NOW, status="passed", status_code=200, duration_ms=12),
    ]
    report = render_report(result(), [], status(health_attempts=attempts))
    assert rows(report)[-2:] == [
        "| 1 | ✗ **failed** | no answer | 5.0\u00a0s | 2026-11-23 12:00 UTC |",
        "| 2 | ✓ | HTTP 200 | 12\u00a0ms | 2026-11-23 12:00 UTC |",
    ]


@pytest.mark.parametrize(
    "text", ["a | b", "a \\| b", "ends with \\", "two\nlines\r\n| x |", "x" * 299 + "||", "|" * 400]
)
def test_no_message_breaks_the_table(text: str) -> None:
    """Every row keeps its cells, whatever a builder or a host said."""
    told = [line for line in rows(render_report(result(), [stage(text)])) if "✗" in line]
    assert len(told) == 3
    for line in told:
        bare = line.replace("\\\\", "").replace("\\|", "")
        assert bare.count("|") in {4, 5}, line
        assert line.endswith(" |")
        assert not bare.endswith("\\|")


def test_a_message_cannot_bring_html_into_the_page() -> None:
    """A proxy's error page is shown as text."""
    report = render_report(
        result(error_message="<img src=x>"), [stage("<script>alert(1)</script>")], next_step="<b>"
    )
    assert "<" not in report


@pytest.mark.parametrize("text", ["```", "a\n```\nb", "````\n# heading"])
def test_no_text_ends_its_own_block(text: str) -> None:
    """The fence is longer than any in the text."""
    first, *inner, last = fenced("text", text).splitlines()
    assert inner == text.splitlines()
    assert last == first.removesuffix("text")
    assert last not in inner


def test_no_secret_is_shown() -> None:
    """Neither from the log, nor from messages, the error or the next step."""
    leak = f"DB_PASSWORD={SECRET} and postgres://app:{SECRET}@db/app"
    report = render_report(result(error_message=leak), [stage(leak)], status(leak), next_step=leak)
    assert SECRET not in report
    assert report.count("DB_PASSWORD=***") == 5


@pytest.mark.parametrize("leak", [f"password={SECRET}", f"postgres://a:{SECRET}@db"])
def test_a_secret_at_the_end_of_a_cell_is_not_shown_in_part(leak: str) -> None:
    """Masked before it is cut."""
    report = render_report(result(), [stage("x" * 278 + f" {leak}")])
    assert SECRET[:4] not in report


def test_a_deployment_that_ended_before_its_first_stage_has_a_report() -> None:
    """Empty tables, the cause, and the workflow's id to look it up."""
    report = render_report(result(state=WorkflowState.FAILED, rollback_result=None, stages_failed=[]), [])
    assert "nothing on the host was touched" in report
    assert report.rstrip().endswith("Workflow `w1`")
