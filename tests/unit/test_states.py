"""The workflow state machine: its table, and what the facts make of a record."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest

from receiver.contract import ErrorCode, Stage
from tasks.states import (
    TERMINAL,
    TRANSITIONS,
    TRIGGERS,
    Facts,
    StageResult,
    TransitionRefused,
    WorkflowRecord,
    WorkflowState,
    check_transition,
    fold,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
S = WorkflowState

# Written out again on purpose: a slip in the table must not repeat itself here.
SPECIFIED = {
    "PENDING": {"PACKAGING", "FAILED"},
    "PACKAGING": {"TRANSFERRING", "FAILED"},
    "TRANSFERRING": {"DEPLOYING", "FAILED"},
    "DEPLOYING": {"VALIDATING", "ROLLING_BACK", "FAILED"},
    "VALIDATING": {"COMPLETED", "ROLLING_BACK", "FAILED"},
    "ROLLING_BACK": {"ROLLBACK_COMPLETED", "FAILED"},
    "COMPLETED": set(),
    "ROLLBACK_COMPLETED": set(),
    "FAILED": set(),
}


def workflow(state: WorkflowState = S.PENDING) -> WorkflowRecord:
    return WorkflowRecord(
        workflow_id="w-1",
        correlation_id="w-1",
        container_name="shop",
        image_tag="v2",
        remote_host="target",
        remote_port=8001,
        current_state=state,
        created_at=NOW,
        updated_at=NOW,
    )


def stage(name: Stage, *, success: bool = True, code: ErrorCode | None = None) -> StageResult:
    message = None if success else f"{name} broke"
    return StageResult(
        stage=name,
        success=success,
        duration_ms=7,
        error_code=code,
        error_message=message,
        started_at=NOW,
        completed_at=NOW,
    )


@pytest.mark.parametrize(("source", "target"), list(product(WorkflowState, WorkflowState)))
def test_a_transition_is_allowed_exactly_when_the_diagram_has_its_arrow(
    source: WorkflowState, target: WorkflowState
) -> None:
    """All 81 pairs: the arrows pass, every other pair is refused by name."""
    if target in SPECIFIED[source]:
        check_transition(source, target)
    else:
        with pytest.raises(TransitionRefused, match=f"from {source} to {target}"):
            check_transition(source, target)


def test_the_machine_has_nine_states_and_every_one_can_be_reached() -> None:
    """No state is left out of the diagram."""
    assert {str(state) for state in WorkflowState} == set(SPECIFIED)
    assert {target for _, target in TRANSITIONS} == set(WorkflowState) - {S.PENDING}


def test_the_terminal_states_are_the_three_that_nothing_leaves() -> None:
    """COMPLETED, ROLLBACK_COMPLETED and FAILED end a workflow; no other state does."""
    assert {S.COMPLETED, S.ROLLBACK_COMPLETED, S.FAILED} == TERMINAL
    assert {state for state in WorkflowState if state.terminal} == TERMINAL


def test_every_transition_has_a_trigger_of_its_own() -> None:
    """A trigger's name tells which arrow was taken."""
    assert set(TRIGGERS) == TRANSITIONS
    assert len(set(TRIGGERS.values())) == len(TRIGGERS)
    named = {"start_workflow", "package_complete", "transfer_complete", "deployment_complete"}
    assert named <= set(TRIGGERS.values())


def test_facts_without_news_leave_the_record_as_it_was() -> None:
    """`None` never wipes out what was known."""
    known = replace(workflow(S.DEPLOYING), container_id="c1", retry_count=2, deployed_url="http://target:80")
    assert fold(known, S.DEPLOYING, Facts(), NOW) == known


def test_deployment_metrics_add_up_over_the_stages() -> None:
    """Each stage hands in its own duration; the earlier ones stay."""
    first = fold(workflow(), S.PENDING, Facts(deployment_metrics={"build_duration_ms": 1}), NOW)
    second = fold(first, S.PENDING, Facts(deployment_metrics={"transfer_duration_ms": 2}), NOW)
    assert second.deployment_metrics == {"build_duration_ms": 1, "transfer_duration_ms": 2}


def test_a_stage_stands_where_its_newest_result_puts_it() -> None:
    """A stage that failed and then passed is completed, and no longer failed."""
    failed = fold(workflow(S.PACKAGING), S.PACKAGING, Facts(stage=stage(Stage.PACKAGE, success=False)), NOW)
    assert (failed.stages_completed, failed.stages_failed) == ((), (Stage.PACKAGE,))
    passed = fold(failed, S.TRANSFERRING, Facts(stage=stage(Stage.PACKAGE)), NOW)
    assert (passed.stages_completed, passed.stages_failed) == ((Stage.PACKAGE,), ())


def test_the_end_carries_outcome_time_and_total_duration() -> None:
    """A terminal record says success or not, when, and how long it took in all."""
    end = NOW + timedelta(milliseconds=1234)
    done = fold(workflow(S.VALIDATING), S.COMPLETED, Facts(), end)
    assert (done.success, done.completed_at, done.total_duration_ms) == (True, end, 1234)
    failed = fold(workflow(S.VALIDATING), S.FAILED, Facts(total_duration_ms=9), end)
    assert (failed.success, failed.completed_at, failed.total_duration_ms) == (False, end, 9)


def test_a_failure_takes_its_cause_from_the_stage_that_failed() -> None:
    """Who hands in the failed stage need not repeat its code, message and name."""
    broken = stage(Stage.VALIDATE, success=False, code=ErrorCode.HEALTH_CHECK_FAILED)
    after = fold(workflow(S.VALIDATING), S.ROLLING_BACK, Facts(stage=broken), NOW)
    assert after.error_code is ErrorCode.HEALTH_CHECK_FAILED
    assert after.error_message == "health_validation broke"
    assert after.failure_stage is Stage.VALIDATE
    assert not after.rollback_performed


def test_a_finished_rollback_keeps_the_first_cause() -> None:
    """The record of a rolled-back deployment says why it was rolled back."""
    facts = Facts(error_code=ErrorCode.TIMEOUT, error_message="too slow")
    rolling = fold(workflow(S.DEPLOYING), S.ROLLING_BACK, facts, NOW)
    after = fold(rolling, S.ROLLBACK_COMPLETED, Facts(rollback_result={"success": True}), NOW)
    assert (after.error_code, after.error_message) == (ErrorCode.TIMEOUT, "too slow")
    assert after.failure_stage is Stage.DEPLOY
    assert (after.rollback_performed, after.success) == (True, False)


def test_a_failed_rollback_carries_the_code_that_calls_a_person() -> None:
    """ROLLING_BACK to FAILED is ROLLBACK_FAILED unless the facts know better."""
    rolling = replace(workflow(S.ROLLING_BACK), error_code=ErrorCode.TIMEOUT, failure_stage=Stage.DEPLOY)
    result = {"success": False, "error_message": "old image is gone"}
    after = fold(rolling, S.FAILED, Facts(rollback_result=result), NOW)
    assert (after.error_code, after.error_message) == (ErrorCode.ROLLBACK_FAILED, "old image is gone")
    assert (after.failure_stage, after.rollback_performed) == (Stage.DEPLOY, True)


def test_a_success_carries_no_error_of_an_earlier_try() -> None:
    """An error that a retry cured does not stand beside success=True."""
    tried = replace(workflow(S.VALIDATING), error_code=ErrorCode.TIMEOUT, error_message="slow")
    after = fold(tried, S.COMPLETED, Facts(), NOW)
    assert (after.error_code, after.error_message, after.failure_stage) == (None, None, None)
