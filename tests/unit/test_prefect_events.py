"""What Prefect is told of a change of state, without a server."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import WorkPool
from prefect.settings import PREFECT_API_URL, temporary_settings

from receiver.contract import ErrorCode, Stage
from tasks import prefect_events
from tasks.errors import RollbackFailed
from tasks.events import Event, EventType, events_for
from tasks.prefect_events import Change, names_of, payload_of, related_to, resource_of, telling
from tasks.states import TRANSITIONS, Facts, StageResult, WorkflowRecord, WorkflowState
from tests.services import free_port

S = WorkflowState
AT = datetime(2026, 1, 2, tzinfo=UTC)
RECORD = WorkflowRecord(
    workflow_id="w-1",
    correlation_id="w-1",
    container_name="shop",
    image_tag="v2",
    remote_host="host-b",
    remote_port=8001,
    current_state=S.PENDING,
    created_at=AT,
    updated_at=AT,
)
STAGES = {S.PACKAGING: Stage.PACKAGE, S.TRANSFERRING: Stage.TRANSFER, S.DEPLOYING: Stage.DEPLOY}
POOL = WorkPool(id=UUID(int=7), name="host-b", type="process", default_queue_id=uuid4())


def events(from_state: S, to_state: S, facts: Facts = Facts()) -> list[Event]:  # noqa: B008 - frozen
    """The events of a change, as the records make them."""
    numbers = count(1)
    record = replace(RECORD, current_state=from_state)
    return events_for(record, from_state, to_state, facts, at=AT, new_id=lambda: str(UUID(int=next(numbers))))


def leaving(state: S, to_state: S) -> Facts:
    """What a change brings with it: the stage that it ends."""
    if state not in STAGES or to_state in {S.FAILED, S.ROLLING_BACK}:
        return Facts()
    stage = StageResult(stage=STAGES[state], success=True, duration_ms=5, started_at=AT, completed_at=AT)
    return Facts(stage=stage)


@pytest.mark.parametrize(("from_state", "to_state"), sorted(TRANSITIONS))
def test_every_change_of_state_has_an_event(from_state: S, to_state: S) -> None:
    """At least one name, each under the prefix that automations ask for."""
    told = [
        name
        for event in events(from_state, to_state, leaving(from_state, to_state))
        for name in names_of(event)
    ]
    assert told
    assert all(name.startswith("gantry.") for name in told)


def test_a_rollback_that_failed_has_an_event_of_its_own() -> None:
    """Beside the failure and the dead letter, with the runbook as its next step."""
    undone = Facts(rollback_result={"success": False, "error_message": "gone"})
    told = events(S.ROLLING_BACK, S.FAILED, undone)
    assert [list(names_of(event)) for event in told] == [
        ["gantry.deployment.failed", "gantry.deployment.rollback-failed"],
        ["gantry.dead-letter"],
    ]
    assert (
        payload_of(told[0], "of the first failure", None, "host-b")["next_step"] == RollbackFailed.next_step
    )
    assert resource_of(told[0], S.FAILED)["gantry.error_code"] == "ROLLBACK_FAILED"


def test_the_payload_is_short_and_holds_no_secret() -> None:
    """No request, no log; passwords masked; a long message cut."""
    message = "postgresql://me:hunter2@db " + "x" * 5000
    failed = Facts(error_code=ErrorCode.BUILD_FAILED, error_message=message)
    for event in events(S.PACKAGING, S.FAILED, failed):
        told = payload_of(event, "Mend it.", None, "host-b")
        assert "hunter2" not in str(told)
        assert len(str(told)) < 2000
        assert "request" not in told
        assert told["next_step"] == "Mend it."


def test_the_host_s_pool_is_the_first_one() -> None:
    """Prefect adds the flow run's own pool after ours; an action that infers one takes the first."""
    event = events(S.PENDING, S.PACKAGING)[0]
    related = list(related_to(event, "r-1", POOL))
    pools = [one for one in related if one["prefect.resource.role"] == "work-pool"]
    assert pools == [
        {
            "prefect.resource.id": f"prefect.work-pool.{POOL.id}",
            "prefect.resource.role": "work-pool",
            "prefect.resource.name": "host-b",
            "gantry.remote_host": "host-b",
        }
    ]
    assert not any("work-pool" in one["prefect.resource.id"] for one in related_to(event, None, None))


def test_a_completed_deployment_says_where_it_answers() -> None:
    """URL and duration; no error."""
    completed = events(S.VALIDATING, S.COMPLETED, Facts(deployed_url="http://10.0.0.7:8080"))
    told = payload_of(completed[-1], "", None, "host-b")
    assert told["deployed_url"] == "http://10.0.0.7:8080"
    assert not {"error_code", "next_step", "run_url"} & set(told)
    assert resource_of(completed[-1], S.COMPLETED)["gantry.error_code"] == "NONE"


async def test_a_server_that_is_away_neither_fails_nor_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling returns at once, and the end of the block comes within its time."""
    monkeypatch.setattr(prefect_events, "FLUSH_SECONDS", 0.2)
    monkeypatch.setattr(prefect_events, "get_run_logger", lambda: logging.getLogger("test"))
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        async with asyncio.timeout(5), telling(None, "host-b") as teller:
            for _ in range(50):
                teller.tell(Change(S.PACKAGING, events(S.PENDING, S.PACKAGING)))


def test_health_attempts_are_left_to_kafka() -> None:
    """They are many, and no change of state."""
    assert set(EventType) - set(prefect_events.NAMES) == {EventType.DEPLOYMENT_HEALTH_CHECK}
