"""Events of a workflow: which, in what order, with what in them, and what never."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count

import pytest

from receiver.contract import ErrorCode, HealthAttempt, Stage
from tasks.events import TOPICS, Event, EventType, clean_text, events_for, jsonable, redact
from tasks.states import TRANSITIONS, Facts, StageResult, WorkflowRecord, WorkflowState, fold

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
S = WorkflowState


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
        request={"deployment_config": {"environment_variables": {"DB_PASSWORD": "hunter2"}}},
    )


def stage(name: Stage, *, success: bool = True) -> StageResult:
    return StageResult(stage=name, success=success, duration_ms=70, started_at=NOW, completed_at=NOW)


def attempts(*outcomes: str) -> tuple[HealthAttempt, ...]:
    return tuple(
        HealthAttempt.model_validate({"attempt": n, "checked_at": NOW, "status": status, "duration_ms": 5})
        for n, status in enumerate(outcomes, start=1)
    )


def tell(before: WorkflowRecord, to_state: WorkflowState, facts: Facts | None = None) -> list[Event]:
    numbers = count(1)
    new_id = lambda: f"event-{next(numbers)}"  # noqa: E731
    return events_for(before, before.current_state, to_state, facts or Facts(), at=NOW, new_id=new_id)


def kinds(events: list[Event]) -> list[str]:
    return [event.event_type.removeprefix("DEPLOYMENT_") for event in events]


def test_the_topics_are_the_eight_of_the_specification() -> None:
    """Seven for the life of a deployment, one for dead letters."""
    names = ("started", "stage-completed", "health-check", "completed", "failed")
    more = ("rollback-initiated", "rollback-completed", "dlq")
    assert list(TOPICS) == [f"dev.omninode-bridge.deployment.{name}.v1" for name in names + more]


ENDINGS = {
    "PACKAGING": ["STARTED"],
    "COMPLETED": ["COMPLETED"],
    "ROLLING_BACK": ["ROLLBACK_INITIATED"],
    "ROLLBACK_COMPLETED": ["ROLLBACK_COMPLETED", "FAILED", "DLQ"],
    "FAILED": ["FAILED", "DLQ"],
}


@pytest.mark.parametrize(("source", "target"), sorted(TRANSITIONS))
def test_each_transition_tells_what_the_specification_says(
    source: WorkflowState, target: WorkflowState
) -> None:
    """Every arrow of the diagram, without facts, gives its own events and no others."""
    assert kinds(tell(workflow(source), target)) == ENDINGS.get(target, [])


def test_a_successful_deployment_tells_its_story_in_order() -> None:
    """Start, four stages, each health attempt before the stage that it decides, then the end."""
    story: list[Event] = []
    record = workflow()
    steps = [
        (S.PACKAGING, Facts()),
        (S.TRANSFERRING, Facts(stage=stage(Stage.PACKAGE))),
        (S.DEPLOYING, Facts(stage=stage(Stage.TRANSFER), deployment_id="d-1")),
        (S.VALIDATING, Facts(stage=stage(Stage.DEPLOY))),
        (S.COMPLETED, Facts(stage=stage(Stage.VALIDATE), health_attempts=attempts("failed", "passed"))),
    ]
    for to_state, facts in steps:
        story += tell(record, to_state, facts)
        record = replace(fold(record, to_state, facts, NOW), event_sequence=len(story))
    stages = ["STAGE_COMPLETED"]
    health = ["HEALTH_CHECK", "HEALTH_CHECK"]
    assert kinds(story) == ["STARTED", *stages * 3, *health, *stages, "COMPLETED"]
    assert [event.sequence for event in story] == list(range(1, 9))
    named = [event.payload["stage_name"] for event in story if "stage_name" in event.payload]
    assert named == list(Stage)
    assert story[-1].deployment_id == "d-1"


def test_a_stage_is_announced_once_even_when_its_result_is_handed_in_again() -> None:
    """A repeated note cannot make five stages of four."""
    noted = fold(workflow(S.PACKAGING), S.PACKAGING, Facts(stage=stage(Stage.PACKAGE)), NOW)
    assert tell(noted, S.TRANSFERRING, Facts(stage=stage(Stage.PACKAGE))) == []


def test_a_failed_stage_is_not_announced_as_completed() -> None:
    """Its failure is told by the transition."""
    facts = Facts(stage=stage(Stage.PACKAGE, success=False))
    assert kinds(tell(workflow(S.PACKAGING), S.FAILED, facts)) == ["FAILED", "DLQ"]


def test_a_note_tells_its_facts_without_a_transition() -> None:
    """Health attempts stream out while the state stays."""
    events = tell(workflow(S.VALIDATING), S.VALIDATING, Facts(health_attempts=attempts("failed", "passed")))
    assert [(event.event_type, event.payload["status"]) for event in events] == [
        (EventType.DEPLOYMENT_HEALTH_CHECK, "failed"),
        (EventType.DEPLOYMENT_HEALTH_CHECK, "passed"),
    ]


def test_a_message_has_the_envelope_that_consumers_filter_on() -> None:
    """`correlation_id` is the workflow's id; ids and times come from the caller."""
    before = replace(workflow(), event_sequence=4, deployment_id="d-1")
    (event,) = tell(before, S.PACKAGING)
    assert json.loads(event.message()) == {
        "envelope": {
            "event_id": "event-1",
            "event_type": "DEPLOYMENT_STARTED",
            "event_version": "1.0.0",
            "correlation_id": "w-1",
            "deployment_id": "d-1",
            "sequence": 5,
            "timestamp": "2026-01-02T03:04:05+00:00",
            "source": "gantry",
        },
        "payload": {
            "container_name": "shop",
            "image_tag": "v2",
            "remote_host": "target",
            "remote_port": 8001,
        },
    }


def test_a_failure_carries_what_the_monitors_of_the_specification_read() -> None:
    """Code, message, stage and retries; the dead letter also the request, without its secrets."""
    facts = Facts(error_code=ErrorCode.TRANSFER_FAILED, error_message="link down", retry_count=2)
    failed, dead = (json.loads(event.message()) for event in tell(workflow(S.TRANSFERRING), S.FAILED, facts))
    for message in (failed, dead):
        payload = message["payload"]
        assert payload["error_code"] == "TRANSFER_FAILED"
        assert payload["error_message"] == "link down"
        assert payload["failure_stage"] == "transfer_initiation"
        assert payload["retry_count"] == 2
        assert payload["container_name"] == "shop"
        assert payload["rollback_performed"] is False
    assert dead["payload"]["request"] == {
        "deployment_config": {"environment_variables": {"DB_PASSWORD": "***"}}
    }
    assert "hunter2" not in json.dumps([failed, dead])


def test_a_failure_without_a_cause_still_has_a_message() -> None:
    """A monitor that prints the message prints a sentence, not `None`."""
    failed = tell(workflow(S.PACKAGING), S.FAILED)[0]
    assert failed.payload["error_message"] == "no cause was recorded"


def test_a_rolled_back_deployment_tells_its_end_as_a_failure() -> None:
    """Who waits for completed or failed is not left waiting after a rollback."""
    result = {"success": True, "previous_container_restored": True, "rollback_duration_ms": 900}
    before = replace(workflow(S.ROLLING_BACK), error_code=ErrorCode.HEALTH_CHECK_FAILED, error_message="503")
    rolled_back, failed, _ = tell(before, S.ROLLBACK_COMPLETED, Facts(rollback_result=result))
    assert result.items() <= rolled_back.payload.items()
    assert failed.payload["rollback_performed"] is True
    assert failed.payload["error_message"] == "503"


@pytest.mark.parametrize(
    "name",
    [
        "PASSWORD",
        "db_password",
        "ApiToken",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWD",
        "SENTRY_DSN",
        "GIT_CREDENTIALS",
    ],
)
def test_a_value_under_a_secret_name_is_masked(name: str) -> None:
    """In the environment, in build arguments and in labels, at any depth."""
    for place in ("environment_variables", "build_args", "labels"):
        assert redact({"outer": {place: {name: "hunter2"}}}) == {"outer": {place: {name: "***"}}}


@pytest.mark.parametrize(
    "value",
    ["postgres://app:hunter2@db/app", "redis://:hunter2@cache", "https://hunter2@git.example/x.git"],
)
def test_a_url_with_a_password_is_masked_under_any_name(value: str) -> None:
    """The name says nothing there; the value gives it away."""
    assert redact({"environment_variables": {"UPSTREAM": value}}) == {
        "environment_variables": {"UPSTREAM": "***"}
    }


@pytest.mark.parametrize(
    "value",
    ["5432", "http://db:8080/a", "postgres://db/app", "secret://vault-block", "v1.2.0", "a=b"],
)
def test_values_that_hide_nothing_stay_readable(value: str) -> None:
    """Ordinary settings and references to a secret are kept."""
    assert redact({"environment_variables": {"SETTING": value}}) == {
        "environment_variables": {"SETTING": value}
    }


def test_a_reference_stays_even_under_a_secret_name() -> None:
    """`secret://block` names where the secret is, not what it is."""
    request = {"environment_variables": {"DB_PASSWORD": "secret://db"}}
    assert redact(request) == request


def test_secrets_on_a_command_line_are_masked() -> None:
    """As `--password=x`, as the argument after `--password`, and inside a URL."""
    command = [
        "serve",
        "--password=hunter2",
        "--api-token",
        "hunter2",
        "--port",
        "80",
        "amqp://a:hunter2@mq/v",
    ]
    masked = ["serve", "--password=***", "--api-token", "***", "--port", "80", "amqp://***@mq/v"]
    assert redact({"deployment_config": {"command": command}}) == {"deployment_config": {"command": masked}}


def test_redaction_changes_neither_the_request_nor_ordinary_values() -> None:
    """A copy is given back; numbers, flags and nothing keep their types."""
    request = {"environment_variables": {"KEY": "x"}, "remote_port": 8001, "no_cache": False, "volumes": None}
    copy = redact(request)
    assert request["environment_variables"] == {"KEY": "x"}
    assert copy == {**request, "environment_variables": {"KEY": "***"}}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("login with password=hunter2 failed", "login with password=*** failed"),
        ("GET /x?api_key=hunter2&y=1", "GET /x?api_key=***&y=1"),
        ('{"password": "hunter2"}', '{"password": "***"}'),
        ("postgres://app:hunter2@db refused", "postgres://***@db refused"),
        ("zero\0byte and \ud800", "zero\ufffdbyte and ?"),
        ("KeyError: 'name'", "KeyError: 'name'"),
    ],
)
def test_texts_lose_passwords_and_what_databases_refuse(text: str, cleaned: str) -> None:
    """Log lines end up in messages: they must be storable and must not give a secret away."""
    assert clean_text(text) == cleaned


@pytest.mark.parametrize("text", ["a" * 200_000, "key" * 60_000, "a://" * 40_000, "secret=" * 20_000])
def test_cleaning_a_long_text_takes_time_in_proportion_to_its_length(text: str) -> None:
    """No log tail, however odd, can hold the workflow up."""
    start = time.process_time()
    clean_text(text)
    assert time.process_time() - start < 2


def test_anything_in_an_artifact_becomes_json() -> None:
    """Times, sets and numbers that are none do not break a message."""
    given = {"at": NOW, "ratio": float("nan"), "tags": {"a"}, 1: ("x", 2.5)}
    expected = {"at": "2026-01-02T03:04:05+00:00", "ratio": "nan", "tags": ["a"], "1": ["x", 2.5]}
    assert jsonable(given) == expected
