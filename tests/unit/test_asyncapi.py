"""The AsyncAPI document: it says what is told, all of it, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import pytest
import yaml

from receiver.contract import ErrorCode, HealthAttempt, Stage
from tasks.errors import Action, Severity
from tasks.events import TOPICS, Event, EventType, events_for
from tasks.states import TRANSITIONS, Facts, StageResult, WorkflowRecord, WorkflowState

DOCUMENT = Path(__file__).resolve().parents[2] / "deployments" / "asyncapi.yaml"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
S = WorkflowState
BY_STATE = {
    S.PACKAGING: Stage.PACKAGE,
    S.TRANSFERRING: Stage.TRANSFER,
    S.DEPLOYING: Stage.DEPLOY,
    S.VALIDATING: Stage.VALIDATE,
}


@cache
def document() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text())
    return parsed


@cache
def strict_document() -> dict[str, Any]:
    """The document with every object closed, so that a field which it does not name is found."""
    closed = copy.deepcopy(document())
    for schema in closed["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return closed


def check(event: dict[str, Any]) -> None:
    """Raise `jsonschema.ValidationError` unless the document describes this message, field by field."""
    kind = event["envelope"]["event_type"]
    schema = {**strict_document(), "$ref": f"#/components/messages/{kind}/payload"}
    validator = jsonschema.Draft7Validator(schema, format_checker=jsonschema.Draft7Validator.FORMAT_CHECKER)
    validator.validate(event)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for inner in node.values():
            yield from references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from references(inner)


def resolve(reference: str) -> Any:
    found: Any = document()
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return found


def workflow(state: WorkflowState, *, full: bool) -> WorkflowRecord:
    record = WorkflowRecord(
        workflow_id="w-1",
        correlation_id="w-1",
        container_name="shop",
        image_tag="v2",
        remote_host="target",
        remote_port=8001,
        current_state=state,
        created_at=NOW,
        updated_at=NOW,
        request={"container_name": "shop", "deployment_config": {"environment_variables": {"A": "b"}}},
    )
    return replace(record, deployment_id="d-1", stages_failed=(Stage.VALIDATE,)) if full else record


def facts(source: WorkflowState, target: WorkflowState, *, full: bool) -> Facts:
    """Everything that a flow hands in, or nothing."""
    if not full:
        return Facts()
    failed = target in {S.ROLLING_BACK, S.FAILED}
    code = ErrorCode.TIMEOUT if failed else None
    stage = StageResult(
        stage=BY_STATE.get(source, Stage.PACKAGE),
        success=not failed,
        duration_ms=70,
        error_code=code,
        error_message="too slow" if failed else None,
        started_at=NOW,
        completed_at=NOW,
    )
    attempts = [
        HealthAttempt(attempt=1, checked_at=NOW, status="failed", duration_ms=5, message="refused"),
        HealthAttempt(attempt=2, checked_at=NOW, status="passed", status_code=200, duration_ms=5),
    ]
    return Facts(
        deployment_id="d-1",
        container_id="c-1",
        image_id="sha256:1",
        image_size_bytes=5,
        deployed_url="http://target:8080",
        health_status={"container_running": True, "attempts": 2},
        deployment_metrics={"build_duration_ms": 5},
        rollback_result={
            "success": True,
            "previous_container_restored": True,
            "rollback_duration_ms": 900,
            "error_message": None,
            "host_state": "RESTORED",
            "switched": True,
        },
        error_code=code,
        retry_count=1,
        stage=stage,
        health_attempts=tuple(attempts),
    )


def every_event() -> list[Event]:
    """What each transition of the table tells, and notes too, with all facts and with none."""
    steps = [*TRANSITIONS, (S.VALIDATING, S.VALIDATING)]
    return [
        event
        for source, target in steps
        for full in (True, False)
        for event in events_for(
            workflow(source, full=full),
            source,
            target,
            facts(source, target, full=full),
            at=NOW,
            new_id=lambda: str(uuid4()),
        )
    ]


def parsed(event: Event) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(event.message())
    return message


def test_the_document_names_the_events_and_topics_of_the_code() -> None:
    """Eight channels, each with its one message, at the address of the event type."""
    told = document()
    assert told["asyncapi"] == "3.0.0"
    channels = told["channels"].values()
    assert [channel["address"] for channel in channels] == list(TOPICS)
    for kind, channel in zip(EventType, channels, strict=True):
        assert channel["messages"] == {kind.value: {"$ref": f"#/components/messages/{kind}"}}
    assert list(told["components"]["messages"]) == list(EventType)


def test_each_channel_is_published_by_one_operation() -> None:
    """We send; what others receive is their matter."""
    published = [operation["channel"]["$ref"] for operation in document()["operations"].values()]
    assert published == [f"#/channels/{name}" for name in document()["channels"]]
    assert {operation["action"] for operation in document()["operations"].values()} == {"send"}


def test_every_reference_leads_somewhere() -> None:
    """And every schema is one."""
    for reference in set(references(document())):
        assert resolve(reference)
    for schema in document()["components"]["schemas"].values():
        jsonschema.Draft7Validator.check_schema(schema)


def test_the_document_lists_the_words_of_the_code() -> None:
    """Error codes, actions, severities and stages are written twice; they must not part."""
    schemas = document()["components"]["schemas"]
    assert schemas["ErrorCode"]["enum"] == [*ErrorCode, None]
    assert schemas["Action"]["enum"] == [*Action, None]
    assert schemas["Severity"]["enum"] == [*Severity, None]
    assert schemas["StageName"]["enum"] == list(Stage)


def test_every_event_of_every_transition_is_as_documented() -> None:
    """All types occur, with all facts and with none, and no field is missing or undocumented."""
    events = every_event()
    for event in events:
        check(parsed(event))
    assert {event.event_type for event in events} == set(EventType)


@pytest.mark.parametrize("kind", list(EventType))
def test_each_documented_field_is_told(kind: EventType) -> None:
    """A field that no event ever has would be a promise without a keeper."""
    told = {name for event in every_event() if event.event_type is kind for name in parsed(event)["payload"]}
    reference = document()["components"]["messages"][kind]["payload"]["properties"]["payload"]["$ref"]
    assert told == set(resolve(reference)["properties"])


@pytest.mark.parametrize("part", ["envelope", "payload"])
def test_an_undocumented_or_missing_field_is_found(part: str) -> None:
    """The check above can fail."""
    event = parsed(every_event()[0])
    check(event)
    with pytest.raises(jsonschema.ValidationError):
        check({**event, part: {**event[part], "new": 1}})
    with pytest.raises(jsonschema.ValidationError):
        check({**event, part: dict(list(event[part].items())[1:])})


def test_a_consumer_may_meet_fields_that_it_does_not_know() -> None:
    """The document itself is open, so that a field can be added within a version."""
    event = parsed(every_event()[0])
    kind = event["envelope"]["event_type"]
    schema = {**document(), "$ref": f"#/components/messages/{kind}/payload"}
    jsonschema.Draft7Validator(schema).validate({**event, "payload": {**event["payload"], "new": 1}})
