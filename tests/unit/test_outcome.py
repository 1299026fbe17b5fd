"""What a host's status means for the workflow, for each state that a host can be in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from blocks.receiver_client import ReceiverRefused, ReceiverUnreachable, Refusal
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
from tasks import outcome
from tasks.delivery import Delivery, already_there
from tasks.errors import (
    ERROR_CLASSES,
    BuildFailed,
    DeploymentFailed,
    HealthCheckFailed,
    ParametersRefused,
    TransferFailed,
)
from tasks.exports import ExportFailed
from tasks.results import DeploymentResult, DeploymentUnsuccessful
from tasks.results import outcome as in_words
from tasks.states import WorkflowState
from tasks.transfer import package_gate, transfer_gates
from tasks.workflow import as_failure

BEGAN = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
WAITING = {HostState.RECEIVING, HostState.READY}
WORKING = {
    *(HostState.PREPARED, HostState.SWITCHING, HostState.VALIDATING),
    *(HostState.MOVING, HostState.DRAINING),
}
UNDONE = {HostState.RESTORED, HostState.ABORTED, HostState.REJECTED}


def operation(
    name: str, stage: Stage, seconds: float, duration_ms: int, success: bool = True
) -> OperationResult:
    """An operation that began `seconds` after the start."""
    at = BEGAN + timedelta(seconds=seconds)
    return OperationResult(name=name, stage=stage, success=success, started_at=at, duration_ms=duration_ms)


DEPLOYED = [
    operation("deploy_container", Stage.DEPLOY, 0, 1500),
    operation("stop_existing_container", Stage.DEPLOY, 2, 300),
    operation("start_container", Stage.DEPLOY, 3, 250),
]
VALIDATED = [operation("check_container_status", Stage.VALIDATE, 4, 1000)]


def status(state: HostState, **fields: Any) -> DeploymentStatus:
    """A host's status."""
    given: dict[str, Any] = {
        "deployment_id": "d1",
        "workflow_id": "w1",
        "container_name": "web",
        "image_tag": "v1",
        "state": state,
        "upload_offset": 0,
        "package_bytes": 10,
        "facts": HostFacts(),
        "operations": [],
        "health_attempts": [],
        "gates": [],
        "created_at": BEGAN,
        "updated_at": BEGAN + timedelta(seconds=9),
    }
    return DeploymentStatus.model_validate(given | fields)


@pytest.mark.parametrize("state", HostState)
def test_a_deployment_has_ended_when_it_is_kept_or_given_up(state: HostState) -> None:
    """While the host waits or works, it has not."""
    assert outcome.has_ended(status(state)) is (state not in WAITING | WORKING)


@pytest.mark.parametrize("state", HostState)
def test_stage_3_is_over_when_the_container_was_started_or_all_is_over(state: HostState) -> None:
    """The start is read from the operations, for the state may have moved on since."""
    assert outcome.started_or_ended(status(state)) is (state not in WAITING | WORKING)
    assert outcome.started_or_ended(status(state, operations=DEPLOYED))
    assert outcome.has_started(status(state, operations=DEPLOYED))
    assert not outcome.has_started(status(state, operations=DEPLOYED[:2]))


def test_a_start_that_failed_is_no_start() -> None:
    """The operation must have succeeded."""
    failed = operation("start_container", Stage.DEPLOY, 3, 250, success=False)
    assert not outcome.has_started(status(HostState.FAILED, operations=[failed]))


@pytest.mark.parametrize("code", ErrorCode)
def test_the_hosts_error_becomes_the_named_one(code: ErrorCode) -> None:
    """Class by code, text as the host said it."""
    failure = outcome.failure_of(status(HostState.FAILED, error_code=code, error_message="port 80 is taken"))
    assert type(failure) is ERROR_CLASSES[code]
    assert str(failure) == "port 80 is taken"


@pytest.mark.parametrize("state", HostState)
def test_an_end_without_a_cause_names_the_hosts_state(state: HostState) -> None:
    """An abort, for one, has no error code."""
    failure = outcome.failure_of(status(state))
    assert type(failure) is DeploymentFailed
    assert state.value in str(failure)


def test_a_stage_is_what_the_host_journalled_of_it() -> None:
    """Only its own operations and gates; from the first one's start to the last one's end."""
    gates = [
        QualityGate(name="no_port_conflicts", stage=Stage.DEPLOY, passed=True),
        QualityGate(name="health_endpoint_responding", stage=Stage.VALIDATE, passed=True),
    ]
    told = status(HostState.KEPT, operations=DEPLOYED + VALIDATED, gates=gates)
    deploy = outcome.stage_result(told, Stage.DEPLOY)
    assert deploy.success
    assert deploy.operations == tuple(DEPLOYED)
    assert deploy.gates == (gates[0],)
    assert (deploy.started_at, deploy.completed_at) == (BEGAN, BEGAN + timedelta(seconds=3.25))
    assert deploy.duration_ms == 3250
    assert (deploy.error_code, deploy.error_message) == (None, None)
    validate = outcome.stage_result(told, Stage.VALIDATE)
    assert (validate.operations, validate.gates) == (tuple(VALIDATED), (gates[1],))
    assert validate.duration_ms == 1000


def test_a_failed_stage_carries_code_and_cause() -> None:
    """As the records and the report show them."""
    failed = outcome.stage_result(
        status(HostState.RESTORED, operations=VALIDATED), Stage.VALIDATE, HealthCheckFailed("answered 500")
    )
    assert not failed.success
    assert (failed.error_code, failed.error_message) == (ErrorCode.HEALTH_CHECK_FAILED, "answered 500")


def test_a_stage_that_did_nothing_took_no_time() -> None:
    """The host refused before its first operation."""
    result = outcome.stage_result(status(HostState.REJECTED), Stage.DEPLOY, DeploymentFailed("refused"))
    assert (result.duration_ms, result.operations) == (0, ())
    assert result.started_at == result.completed_at == BEGAN + timedelta(seconds=9)


@pytest.mark.parametrize("state", HostState)
def test_a_rollback_succeeded_when_the_host_has_nothing_left_to_undo(state: HostState) -> None:
    """Restored, aborted or rejected; every other state is told as the error."""
    result = outcome.rollback_result(status(state))
    assert result["success"] is (state in UNDONE)
    assert (result["error_message"] is None) is (state in UNDONE)
    assert (result["previous_container_restored"], result["rollback_duration_ms"]) == (False, 0)
    assert result["host_state"] == state.value


def test_a_rollback_says_how_long_it_took_and_what_came_back() -> None:
    """The fields of the specification, from the host's facts."""
    facts = HostFacts(previous_container_restored=True, rollback_duration_ms=1234)
    result = outcome.rollback_result(status(HostState.RESTORED, facts=facts, operations=DEPLOYED))
    assert result == {
        "success": True,
        "previous_container_restored": True,
        "rollback_duration_ms": 1234,
        "error_message": None,
        "host_state": "restored",
        "switched": True,
    }


def test_a_rollback_that_failed_gives_the_hosts_cause() -> None:
    """A person has to look, and reads where."""
    cause = "the previous container could not be restored: gone"
    assert (
        outcome.rollback_result(status(HostState.RESTORE_FAILED, error_message=cause))["error_message"]
        == cause
    )


def test_health_is_told_in_the_words_of_the_specification() -> None:
    """None where the host never looked."""
    attempt = HealthAttempt(attempt=1, checked_at=BEGAN, status="failed", status_code=500, duration_ms=3)
    facts = HostFacts(container_running=True, health_endpoint_accessible=False)
    told = status(HostState.FAILED, facts=facts, health_attempts=[attempt])
    assert outcome.health_status(told) == {
        "container_running": True,
        "health_endpoint_accessible": False,
        "service_registered": None,
        "attempts": 1,
    }


def test_the_interruption_is_a_figure_only_where_something_was_interrupted() -> None:
    """0 ms is a figure, none is none."""
    assert outcome.host_metrics(status(HostState.KEPT)) == {}
    measured = status(HostState.KEPT, facts=HostFacts(service_interruption_ms=0))
    assert outcome.host_metrics(measured) == {"service_interruption_ms": 0}


# -- the same in a few words -----------------------------------------------------------------------


def result(state: WorkflowState, rollback: DeploymentStatus | None = None, **fields: Any) -> DeploymentResult:
    """A result that ended in `state`."""
    given: dict[str, Any] = dict.fromkeys(DeploymentResult.model_fields) | {
        "success": state is WorkflowState.COMPLETED,
        "workflow_id": "w1",
        "container_name": "web",
        "image_tag": "v2",
        "remote_host": "host-a",
        "state": state,
        "total_duration_ms": 1,
        "stages_completed": [],
        "stages_failed": [],
        "health_status": {},
        "deployment_metrics": {},
        "rollback_performed": rollback is not None,
        "rollback_result": outcome.rollback_result(rollback) if rollback else None,
    }
    return DeploymentResult.model_validate(given | fields)


RESTORED = HostFacts(previous_container_restored=True)
FAILED, ROLLED_BACK = WorkflowState.FAILED, WorkflowState.ROLLBACK_COMPLETED


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (result(WorkflowState.COMPLETED), "web:v2 serves"),
        (
            result(ROLLED_BACK, status(HostState.RESTORED, facts=RESTORED, operations=DEPLOYED)),
            "the previous container serves",
        ),
        (result(ROLLED_BACK, status(HostState.RESTORED, operations=DEPLOYED)), "none ran before"),
        (result(ROLLED_BACK, status(HostState.RESTORED, operations=DEPLOYED[:1])), "was not touched"),
        (result(ROLLED_BACK, status(HostState.ABORTED)), "was not touched"),
        (result(FAILED, status(HostState.RESTORE_FAILED, operations=DEPLOYED)), "a person has to look"),
        (result(FAILED, status(HostState.KEPT, operations=DEPLOYED)), "the host keeps the new container"),
        (result(FAILED, stages_failed=[Stage.TRANSFER]), "nothing on the host was touched"),
        (result(FAILED, stages_failed=[Stage.VALIDATE]), "left as it is, as asked"),
    ],
)
def test_the_end_is_told_by_what_serves_now(ended: DeploymentResult, words: str) -> None:
    """An operator reads it first; it must not claim what is not so."""
    assert words in in_words(ended)


def test_a_deployment_without_success_says_code_cause_and_what_serves_on_one_line() -> None:
    """It is the message of the flow run."""
    ended = result(
        ROLLED_BACK,
        status(HostState.RESTORED, facts=RESTORED),
        error_code=ErrorCode.HEALTH_CHECK_FAILED,
        error_message="answered 500",
    )
    assert str(DeploymentUnsuccessful(ended)) == (
        "HEALTH_CHECK_FAILED: answered 500; rolled back: the previous container serves"
    )


@pytest.mark.parametrize("cause", ["broke\noff", "gone"])
def test_a_rollback_of_which_the_host_said_nothing_has_the_fields_of_the_specification(cause: str) -> None:
    """No success, and the cause on one line."""
    told = outcome.not_rolled_back(cause)
    assert (told["success"], told["error_message"]) == (False, " ".join(cause.split()))
    assert set(told) < set(outcome.rollback_result(status(HostState.RESTORED)))


# -- errors of the control side ----------------------------------------------------------------------


def refusal(status: int, error_code: ErrorCode | None = None) -> ReceiverRefused:
    """An answer of the receiver that is no success."""
    told = Refusal("GET /x", status, "about:blank", "Refused", "not so", "Do this.", error_code)
    return ReceiverRefused(told)


@pytest.mark.parametrize(
    ("error", "stage", "code", "text"),
    [
        (BuildFailed("exit 1"), Stage.VALIDATE, "BUILD_FAILED", "exit 1"),
        (ValueError("two\nlines"), Stage.PACKAGE, "BUILD_FAILED", "ValueError: two lines"),
        (ValueError("odd"), Stage.DEPLOY, "DEPLOYMENT_FAILED", "ValueError: odd"),
        (ValueError("odd"), Stage.VALIDATE, "HEALTH_CHECK_FAILED", "ValueError: odd"),
        (TimeoutError(), Stage.DEPLOY, "TIMEOUT", "stage deployment_execution took longer than 7 s"),
        (
            ReceiverUnreachable("http://b:8001/health", "refused"),
            Stage.TRANSFER,
            "REMOTE_ENDPOINT_UNREACHABLE",
            "Cannot connect to remote hook receiver at http://b:8001/health: refused",
        ),
        (refusal(401), Stage.TRANSFER, "TRANSFER_FAILED", "Refused: not so"),
        (refusal(401), Stage.VALIDATE, "HEALTH_CHECK_FAILED", "Refused: not so"),
        (refusal(409, ErrorCode.DEPLOYMENT_FAILED), Stage.TRANSFER, "DEPLOYMENT_FAILED", "Refused: not so"),
    ],
    ids=repr,
)
def test_any_error_of_a_stage_becomes_a_named_one(
    error: Exception, stage: Stage, code: str, text: str
) -> None:
    """The code of the specification, and the cause on one line."""
    failure = as_failure(error, stage, 7)
    assert (failure.error_code, str(failure)) == (code, text)


@pytest.mark.parametrize(
    ("error", "next_step"),
    [
        (refusal(401), "Do this."),
        (ParametersRefused("a", "is wrong", "write b"), "write b"),
        (TransferFailed("no", next_step="Look there."), "Look there."),
    ],
)
def test_the_next_step_of_an_error_is_kept(error: Exception, next_step: str) -> None:
    """Whoever raised it knew best."""
    assert as_failure(error, Stage.TRANSFER).next_step == next_step


CONNECTED = {"establish_connection"}
ANNOUNCED = CONNECTED | {"send_deployment_request"}
AWAY = ReceiverUnreachable("http://b:8001", "refused")


@pytest.mark.parametrize(
    ("done", "error", "passed"),
    [
        (ANNOUNCED | {"verify_transfer"}, None, (True, True, True)),
        (set(), AWAY, (False, False, False)),
        (CONNECTED, refusal(401), (True, False, False)),
        (CONNECTED, refusal(403), (True, False, False)),
        (CONNECTED, refusal(409), (True, False, True)),
        (ANNOUNCED, AWAY, (True, False, True)),
        (ANNOUNCED, TransferFailed("the host says rejected"), (True, False, True)),
        (ANNOUNCED, TimeoutError(), (True, False, True)),
        (set(), TransferFailed("no engine"), (False, False, False)),
    ],
)
def test_a_gate_of_stage_2_is_passed_when_something_proved_it(
    done: set[str], error: Exception | None, passed: tuple[bool, bool, bool]
) -> None:
    """Reached, acknowledged, authenticated; one that is not passed says why."""
    gates = transfer_gates(done, error)
    assert tuple(gate.passed for gate in gates) == passed
    assert [gate.name for gate in gates] == [
        *("remote_endpoint_reachable", "transfer_acknowledged", "hmac_authentication_successful"),
    ]
    assert all(bool(gate.message) is not gate.passed for gate in gates)


def test_a_package_is_complete_but_for_the_layers_that_the_host_has() -> None:
    """The gate says how many were sent, or why there is no package."""
    sent = package_gate(Delivery(way="archive", layers_known=3, layers_sent=1))
    assert (sent.passed, sent.message) == (True, "by archive: 1 of 4 layers")
    assert package_gate(already_there(["a"])).message == "the host has the image"
    failed = package_gate(ExportFailed("it lacks sha256:abc"))
    assert (failed.passed, failed.message) == (False, "it lacks sha256:abc")
