"""The records, on SQLite and on PostgreSQL: state, history and events together or not at all."""

from __future__ import annotations

import asyncio
import fcntl
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # it ships no types
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.contract import ErrorCode, HealthAttempt, OperationResult, QualityGate, Stage
from tasks import migrations, schema
from tasks.records import (
    Facts,
    NewWorkflow,
    Records,
    RecordsUnreachable,
    StageResult,
    StateConflict,
    TransitionRefused,
    WorkflowDiffers,
    WorkflowEnded,
    WorkflowState,
    WorkflowUnknown,
)
from tasks.states import TRANSITIONS
from tests.services import free_port

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
S = WorkflowState
WAYS: dict[WorkflowState, list[WorkflowState]] = {
    S.PENDING: [],
    S.PACKAGING: [S.PACKAGING],
    S.TRANSFERRING: [S.PACKAGING, S.TRANSFERRING],
    S.DEPLOYING: [S.PACKAGING, S.TRANSFERRING, S.DEPLOYING],
    S.VALIDATING: [S.PACKAGING, S.TRANSFERRING, S.DEPLOYING, S.VALIDATING],
    S.COMPLETED: [S.PACKAGING, S.TRANSFERRING, S.DEPLOYING, S.VALIDATING, S.COMPLETED],
    S.ROLLING_BACK: [S.PACKAGING, S.TRANSFERRING, S.DEPLOYING, S.ROLLING_BACK],
    S.ROLLBACK_COMPLETED: [S.PACKAGING, S.TRANSFERRING, S.DEPLOYING, S.ROLLING_BACK, S.ROLLBACK_COMPLETED],
    S.FAILED: [S.FAILED],
}
OPEN_IN_A_PROCESS = """
import asyncio, sys
import alembic.command  # imported before the start signal, so that the openings really meet
from tasks.records import NewWorkflow, Records

async def main():
    print("ready", flush=True)
    sys.stdin.readline()
    async with await Records.open(sys.argv[1]) as records:
        new = NewWorkflow(workflow_id=sys.argv[2], container_name="shop", remote_host="target")
        await records.create(new)

asyncio.run(main())
"""


@pytest.fixture
async def records(records_url: str) -> AsyncIterator[Records]:
    """Records in a new database, at the newest schema."""
    async with await Records.open(records_url) as opened:
        yield opened


def new(workflow_id: str = "w-1", **changes: Any) -> NewWorkflow:
    workflow = NewWorkflow(
        workflow_id=workflow_id, container_name="shop", remote_host="target", image_tag="v2"
    )
    return replace(workflow, **changes)


async def bring_to(records: Records, state: WorkflowState, workflow_id: str = "w-1") -> None:
    """A workflow in `state`, on the shortest way there."""
    await records.create(new(workflow_id))
    at = S.PENDING
    for target in WAYS[state]:
        await records.advance(workflow_id, at, target)
        at = target


def stage(name: Stage, *, success: bool = True, **changes: Any) -> StageResult:
    result = StageResult(
        stage=name,
        success=success,
        duration_ms=1500,
        operations=(
            OperationResult(
                name="start_container", stage=name, success=success, started_at=NOW, duration_ms=3
            ),
        ),
        gates=(QualityGate(name="container started", stage=name, passed=success, message="ok"),),
        artifacts={"image": "shop:v2", "layers": [1, 2]},
        started_at=NOW,
        completed_at=NOW + timedelta(seconds=1.5),
    )
    return replace(result, **changes)


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """As another process that is opening the database holds it."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def execute(records: Records, sql: str, **values: object) -> None:
    """Raw SQL past the records' own door."""
    async with records._writer.begin() as connection:
        await connection.execute(text(sql), values)


async def everything(records: Records, workflow_id: str = "w-1") -> tuple[Any, ...]:
    return (
        await records.get(workflow_id),
        await records.stages(workflow_id),
        await records.transitions(workflow_id),
        await records.outbox(workflow_id),
    )


async def test_every_pair_of_states_is_moved_or_refused_as_the_table_says(records: Records) -> None:
    """All 81 pairs through `advance`: 14 move and are told, 67 leave the workflow as it was."""
    for source, target in product(WorkflowState, WorkflowState):
        workflow_id = f"{source}-{target}"
        await bring_to(records, source, workflow_id)
        before = await everything(records, workflow_id)
        if (source, target) in TRANSITIONS:
            await records.advance(workflow_id, source, target)
            assert (await records.get(workflow_id)).current_state is target
            assert (await records.transitions(workflow_id))[-1].to_state is target
        else:
            with pytest.raises(TransitionRefused):
                await records.advance(workflow_id, source, target)
            assert await everything(records, workflow_id) == before


async def test_the_database_allows_exactly_the_transitions_of_the_table(records: Records) -> None:
    """The constraint in SQL and the table in Python hold the same pairs, whoever writes."""
    await records.create(new())
    insert = (
        "INSERT INTO workflow_transitions (workflow_id, sequence, from_state, to_state, reason, at)"
        " VALUES ('w-1', :n, :source, :target, 'raw', CURRENT_TIMESTAMP)"
    )
    allowed = set()
    for n, (source, target) in enumerate(product([*WorkflowState, "OTHER"], repeat=2)):
        try:
            await execute(records, insert, n=n, source=str(source), target=str(target))
        except IntegrityError as exc:
            assert schema.TRANSITION_CHECK in str(exc)  # noqa: PT017 - most pairs must pass through here
        else:
            allowed.add((source, target))
    assert allowed == TRANSITIONS


async def test_the_database_allows_exactly_the_nine_states(records: Records) -> None:
    """Each state can be stored, with its outcome; any other word cannot."""
    for state in WorkflowState:
        await bring_to(records, state, f"w-{state}")
    with pytest.raises(IntegrityError, match=schema.CURRENT_STATE_CHECK):
        await execute(records, "UPDATE workflow_executions SET current_state = 'DONE' WHERE success IS NULL")


@pytest.mark.parametrize("state", ["COMPLETED", "ROLLBACK_COMPLETED", "FAILED"])
async def test_the_database_refuses_an_end_without_its_outcome(records: Records, state: str) -> None:
    """A raw UPDATE cannot make a workflow that is under way look finished."""
    await bring_to(records, S.VALIDATING)
    with pytest.raises(IntegrityError, match=schema.OUTCOME_CHECK):
        await execute(records, f"UPDATE workflow_executions SET current_state = '{state}'")  # noqa: S608
    assert (await records.get("w-1")).current_state is S.VALIDATING


async def test_of_two_writers_exactly_one_moves_the_workflow(records_url: str) -> None:
    """Both believe VALIDATING; one wins, the other learns where the workflow stands, nothing is doubled."""
    async with await Records.open(records_url) as one, await Records.open(records_url) as other:
        for number in range(8):
            workflow_id = f"w-{number}"
            await bring_to(one, S.VALIDATING, workflow_id)
            events_before = len(await one.outbox(workflow_id))
            outcomes = await asyncio.gather(
                one.advance(workflow_id, S.VALIDATING, S.COMPLETED),
                other.advance(workflow_id, S.VALIDATING, S.ROLLING_BACK),
                return_exceptions=True,
            )
            (conflict,) = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            assert isinstance(conflict, StateConflict)
            record = await one.get(workflow_id)
            assert conflict.actual is record.current_state
            assert [row.to_state for row in await one.transitions(workflow_id)][4:] == [record.current_state]
            assert len(await one.outbox(workflow_id)) == events_before + 1


async def test_writers_of_many_workflows_do_not_disturb_each_other(records_url: str) -> None:
    """Two processes' worth of writers at once: all succeed, each workflow's events stay in order."""
    async with await Records.open(records_url) as one, await Records.open(records_url) as other:
        writers = [one, other] * 6
        await asyncio.gather(*(bring_to(r, S.COMPLETED, f"w-{n}") for n, r in enumerate(writers)))
        for number in range(len(writers)):
            assert [row.sequence for row in await one.outbox(f"w-{number}")] == [1, 2]


async def test_concurrent_notes_number_their_events_without_gaps(records: Records) -> None:
    """Ten notes at once give ten events, one to ten."""
    await bring_to(records, S.PENDING)
    attempts = [
        HealthAttempt(attempt=n, checked_at=NOW, status="failed", duration_ms=1) for n in range(1, 11)
    ]
    await asyncio.gather(*(records.note("w-1", Facts(health_attempts=(item,))) for item in attempts))
    rows = await records.outbox("w-1")
    assert [row.sequence for row in rows] == list(range(1, 11))
    told = [json.loads(row.message)["payload"]["attempt"] for row in rows]
    assert sorted(told) == list(range(1, 11))


@pytest.mark.parametrize("target", [S.PACKAGING, S.TRANSFERRING])
async def test_a_change_whose_event_cannot_be_stored_did_not_happen(
    records: Records, target: WorkflowState
) -> None:
    """The event's insert fails: state, facts, stage, history and count stay as they were."""
    await bring_to(records, S.PACKAGING)
    await execute(
        records,
        "INSERT INTO event_outbox"
        " (event_id, workflow_id, sequence, topic, event_type, message, created_at, attempts)"
        " VALUES ('in-the-way', 'w-1', 2, 't', 'x', '{}', CURRENT_TIMESTAMP, 0)",
    )
    before = await everything(records)
    facts = Facts(stage=stage(Stage.PACKAGE), image_id="sha256:1")
    change = (
        records.note("w-1", facts)
        if target is S.PACKAGING
        else records.advance("w-1", S.PACKAGING, target, facts)
    )
    with pytest.raises(IntegrityError):
        await change
    assert await everything(records) == before


async def test_a_deployment_leaves_its_whole_story(records: Records) -> None:
    """Facts add up in the record, stages and transitions are kept, events are numbered in order."""
    at = [NOW + timedelta(seconds=n) for n in range(6)]
    await records.create(new(), at=at[0])
    await records.advance("w-1", S.PENDING, S.PACKAGING, at=at[1])
    packaged = Facts(
        stage=stage(Stage.PACKAGE),
        image_size_bytes=3_000_000_000,
        deployment_metrics={"build_duration_ms": 1},
    )
    await records.advance("w-1", S.PACKAGING, S.TRANSFERRING, packaged, at=at[2])
    await records.note("w-1", Facts(deployment_id="d-1"), at=at[2])
    moved = Facts(stage=stage(Stage.TRANSFER), deployment_metrics={"transfer_duration_ms": 2})
    await records.advance("w-1", S.TRANSFERRING, S.DEPLOYING, moved, at=at[3])
    started = Facts(stage=stage(Stage.DEPLOY), container_id="c-1", reason="host says prepared")
    await records.advance("w-1", S.DEPLOYING, S.VALIDATING, started, at=at[4])
    asked = HealthAttempt(attempt=1, checked_at=NOW, status="passed", status_code=200, duration_ms=5)
    well = Facts(stage=stage(Stage.VALIDATE), health_attempts=(asked,), health_status={"running": True})
    await records.advance("w-1", S.VALIDATING, S.COMPLETED, well, at=at[5])

    record = await records.get("w-1")
    assert (record.current_state, record.success, record.deployment_id) == (S.COMPLETED, True, "d-1")
    assert (record.created_at, record.updated_at, record.completed_at) == (at[0], at[5], at[5])
    assert (record.total_duration_ms, record.image_size_bytes) == (5000, 3_000_000_000)
    assert (record.stages_completed, record.stages_failed) == (tuple(Stage), ())
    assert record.deployment_metrics == {"build_duration_ms": 1, "transfer_duration_ms": 2}
    assert record.health_status == {"running": True}
    assert await records.stages("w-1") == [stage(name) for name in Stage]

    history = await records.transitions("w-1")
    assert [row.sequence for row in history] == [1, 2, 3, 4, 5]
    assert [row.from_state for row in history] == [S.PENDING, *[row.to_state for row in history[:-1]]]
    assert [row.reason for row in history[:1] + history[3:4]] == ["start_workflow", "host says prepared"]

    rows = await records.outbox("w-1")
    assert [row.sequence for row in rows] == list(range(1, record.event_sequence + 1))
    assert [row.event_type.removeprefix("DEPLOYMENT_") for row in rows] == [
        *["STARTED", "STAGE_COMPLETED", "STAGE_COMPLETED", "STAGE_COMPLETED"],
        *["HEALTH_CHECK", "STAGE_COMPLETED", "COMPLETED"],
    ]
    for row in rows:
        envelope = json.loads(row.message)["envelope"]
        assert envelope["correlation_id"] == "w-1"
        assert (envelope["event_id"], envelope["sequence"]) == (row.event_id, row.sequence)
    assert len({row.event_id for row in rows}) == len(rows)


async def test_a_failed_deployment_records_cause_place_and_rollback(records: Records) -> None:
    """What the operator asks first stands in the record, as typed values."""
    await bring_to(records, S.DEPLOYING)
    broken = stage(
        Stage.DEPLOY, success=False, error_code=ErrorCode.DEPLOYMENT_FAILED, error_message="port taken"
    )
    await records.advance("w-1", S.DEPLOYING, S.ROLLING_BACK, Facts(stage=broken, retry_count=1))
    result = {"success": True, "previous_container_restored": True, "rollback_duration_ms": 90}
    await records.advance("w-1", S.ROLLING_BACK, S.ROLLBACK_COMPLETED, Facts(rollback_result=result))
    record = await records.get("w-1")
    assert (record.success, record.rollback_performed, record.rollback_result) == (False, True, result)
    assert (record.error_code, record.error_message) == (ErrorCode.DEPLOYMENT_FAILED, "port taken")
    assert (record.failure_stage, record.stages_failed) == (Stage.DEPLOY, (Stage.DEPLOY,))
    assert (record.retry_count, record.stages_completed) == (1, ())


async def test_a_stage_that_is_tried_again_replaces_its_result(records: Records) -> None:
    """One row per stage, the newest result; the earlier failure is gone from the lists."""
    await bring_to(records, S.PACKAGING)
    await records.note("w-1", Facts(stage=stage(Stage.PACKAGE, success=False, error_message="no space")))
    assert (await records.get("w-1")).stages_failed == (Stage.PACKAGE,)
    await records.note("w-1", Facts(stage=stage(Stage.PACKAGE)))
    assert await records.stages("w-1") == [stage(Stage.PACKAGE)]
    record = await records.get("w-1")
    assert (record.stages_completed, record.stages_failed) == ((Stage.PACKAGE,), ())


async def test_a_wrong_belief_is_corrected_with_the_actual_state(records: Records) -> None:
    """The conflict names where the workflow stands, and nothing was written."""
    await bring_to(records, S.TRANSFERRING)
    before = await everything(records)
    with pytest.raises(StateConflict, match="is TRANSFERRING, not PACKAGING") as caught:
        await records.advance("w-1", S.PACKAGING, S.TRANSFERRING, Facts(container_id="c-1"))
    assert caught.value.actual is S.TRANSFERRING
    assert await everything(records) == before


@pytest.mark.parametrize("state", [S.COMPLETED, S.ROLLBACK_COMPLETED, S.FAILED])
async def test_an_ended_workflow_takes_no_more_notes(records: Records, state: WorkflowState) -> None:
    """A terminal state never changes, not even in a detail."""
    await bring_to(records, state)
    before = await everything(records)
    with pytest.raises(WorkflowEnded):
        await records.note("w-1", Facts(container_id="late"))
    assert await everything(records) == before


async def test_a_workflow_that_was_never_created_is_unknown(records: Records) -> None:
    """Reading, moving and noting all say so by name."""
    with pytest.raises(WorkflowUnknown, match="'nobody'"):
        await records.get("nobody")
    with pytest.raises(WorkflowUnknown):
        await records.advance("nobody", S.PENDING, S.PACKAGING)
    with pytest.raises(WorkflowUnknown):
        await records.note("nobody", Facts())


async def test_creating_a_workflow_again_gives_it_as_it_stands(records: Records) -> None:
    """A run that is started twice under one id goes on with one workflow."""
    first = await records.create(new(flow_run_id="run-1"))
    assert (first.current_state, first.correlation_id) == (S.PENDING, "w-1")
    await records.advance("w-1", S.PENDING, S.PACKAGING)
    again = await records.create(new(flow_run_id="run-2"))
    assert (again.current_state, again.flow_run_id) == (S.PACKAGING, "run-1")
    assert again.created_at == first.created_at


async def test_creating_one_workflow_many_times_at_once_makes_one(records: Records) -> None:
    """All callers get the same record."""
    made = await asyncio.gather(*(records.create(new()) for _ in range(8)))
    assert all(record == made[0] for record in made)
    assert len(await records.recent()) == 1


async def test_an_id_cannot_be_used_for_another_deployment(records: Records) -> None:
    """Another container, tag or host under the same id is refused, and the record stays."""
    first = await records.create(new())
    for change in ({"container_name": "other"}, {"image_tag": "v3"}, {"remote_host": "elsewhere"}):
        with pytest.raises(WorkflowDiffers, match=next(iter(change))):
            await records.create(new(**change))
    assert await records.get("w-1") == first


async def test_no_secret_of_the_request_reaches_the_database(records: Records) -> None:
    """Neither the record nor the dead letter holds it, nor a message that quotes it."""
    environment = {"DB_PASSWORD": "hunter2", "UPSTREAM": "amqp://a:hunter2@mq", "LOG": "debug"}
    await records.create(new(request={"deployment_config": {"environment_variables": environment}}))
    facts = Facts(error_code=ErrorCode.BUILD_FAILED, error_message="pip: https://u:hunter2@index failed")
    await records.advance("w-1", S.PENDING, S.FAILED, facts)
    record = await records.get("w-1")
    masked = {"DB_PASSWORD": "***", "UPSTREAM": "***", "LOG": "debug"}
    assert record.request == {"deployment_config": {"environment_variables": masked}}
    assert "hunter2" not in str(await everything(records))
    dead = json.loads((await records.outbox("w-1"))[-1].message)
    assert dead["payload"]["request"] == record.request


async def test_text_that_databases_refuse_is_stored_readably(records: Records) -> None:
    """NUL bytes and broken encoding, as log tails have them, do not stop a workflow from ending."""
    await bring_to(records, S.PACKAGING)
    odd = "exit\0 1 \udcff grün"
    failed = stage(Stage.PACKAGE, success=False, error_message=odd, artifacts={"tail": odd})
    await records.advance("w-1", S.PACKAGING, S.FAILED, Facts(stage=failed, reason=odd))
    assert (await records.get("w-1")).error_message == "exit\ufffd 1 ? grün"
    (kept,) = await records.stages("w-1")
    assert kept.artifacts == {"tail": "exit\ufffd 1 ? grün"}


async def test_recent_workflows_come_newest_first_and_can_be_filtered(records: Records) -> None:
    """By container, by host, by being under way, and no more than asked for."""
    for number, name in enumerate(["shop", "shop", "blog"]):
        await records.create(new(f"w-{number}", container_name=name), at=NOW + timedelta(minutes=number))
    await records.create(new("w-3", remote_host="other"), at=NOW + timedelta(minutes=3))
    await records.advance("w-0", S.PENDING, S.FAILED)

    async def ids(**filters: Any) -> list[str]:
        return [record.workflow_id for record in await records.recent(**filters)]

    assert await ids() == ["w-3", "w-2", "w-1", "w-0"]
    assert await ids(limit=2) == ["w-3", "w-2"]
    assert await ids(container_name="shop") == ["w-3", "w-1", "w-0"]
    assert await ids(container_name="shop", remote_host="target") == ["w-1", "w-0"]
    assert await ids(container_name="shop", remote_host="target", unfinished=True) == ["w-1"]


async def test_workflows_are_found_by_the_hosts_deployment_ids(records: Records) -> None:
    """Those that are recorded; without an id, and for unknown ones, there is none."""
    for number in range(3):
        await records.create(new(f"w-{number}"))
        await records.note(f"w-{number}", Facts(deployment_id=f"d-{number}"))
    await records.create(new("w-3"))
    found = await records.of_deployments(["d-0", "d-2", "d-9"])
    assert {key: record.workflow_id for key, record in found.items()} == {"d-0": "w-0", "d-2": "w-2"}
    assert await records.of_deployments([]) == {}


async def test_unsent_events_come_in_order_until_they_are_marked(records: Records) -> None:
    """Marked events are gone from the queue; failed ones stay, with the count and the error."""
    await bring_to(records, S.FAILED)
    await bring_to(records, S.PACKAGING, "w-2")
    queue = await records.unsent(10)
    assert [(row.workflow_id, row.sequence) for row in queue] == [("w-1", 1), ("w-1", 2), ("w-2", 1)]
    assert [row.id for row in await records.unsent(2)] == [row.id for row in queue[:2]]
    await records.mark_unsent([queue[0].id], "broker down")
    (waiting, *_) = await records.unsent(10)
    assert (waiting.attempts, waiting.last_error, waiting.sent_at) == (1, "broker down", None)
    await records.mark_sent([queue[0].id, queue[1].id], NOW)
    await records.mark_sent([queue[0].id], NOW + timedelta(hours=1))
    assert [row.workflow_id for row in await records.unsent(10)] == ["w-2"]
    first = (await records.outbox("w-1"))[0]
    assert (first.sent_at, first.attempts, first.last_error) == (NOW, 2, None)


async def test_a_time_without_a_zone_is_refused(records: Records) -> None:
    """Its meaning would be a guess."""
    with pytest.raises(Exception, match="has no time zone"):
        await records.create(new(), at=NOW.replace(tzinfo=None))


async def test_records_outlive_the_process_that_wrote_them(records_url: str) -> None:
    """Closed and opened again, everything is there."""
    async with await Records.open(records_url) as first:
        await bring_to(first, S.DEPLOYING)
        before = await everything(first)
    async with await Records.open(records_url) as second:
        assert await everything(second) == before


async def test_processes_that_open_a_new_database_at_once_all_succeed(records_url: str) -> None:
    """Four start together on an empty database: one migrates, the others wait, all write."""
    command = [sys.executable, "-c", OPEN_IN_A_PROCESS, records_url]
    root = Path(migrations.__file__).parents[2]
    pipe = asyncio.subprocess.PIPE
    processes = [
        await asyncio.create_subprocess_exec(
            *command, f"w-{n}", cwd=root, stdin=pipe, stdout=pipe, stderr=pipe
        )
        for n in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    outputs = await asyncio.wait_for(asyncio.gather(*(p.communicate(b"go\n") for p in processes)), 60)
    assert [process.returncode for process in processes] == [0, 0, 0, 0], outputs
    async with await Records.open(records_url) as records:
        assert {record.workflow_id for record in await records.recent()} == {f"w-{n}" for n in range(4)}


async def test_opening_a_sqlite_file_waits_for_another_opener(sqlite_url: str) -> None:
    """The switch to WAL mode happens in one process at a time: two at once now and then fail, locked."""
    lock = Path(f"{sqlite_url.removeprefix('sqlite:///')}.migrate-lock")
    with held(lock):
        opening = asyncio.create_task(Records.open(sqlite_url))
        done, _ = await asyncio.wait({opening}, timeout=0.5)
        assert not done
    async with await asyncio.wait_for(opening, 30) as records:
        assert await records.recent() == []


async def test_the_migrations_arrive_at_the_tables_that_the_code_uses(records: Records) -> None:
    """Nothing is missing from the scripts, and the code knows their newest revision."""

    def difference(connection: Connection) -> list[Any]:
        return list(compare_metadata(MigrationContext.configure(connection), schema.METADATA))

    async with records._engine.connect() as connection:
        assert await connection.run_sync(difference) == []
    assert ScriptDirectory(str(migrations.SCRIPTS)).get_heads() == [schema.HEAD_REVISION]


async def test_a_database_of_a_newer_version_is_left_alone(records_url: str) -> None:
    """An old program says so instead of writing into tables that it does not know."""
    async with await Records.open(records_url) as records:
        await execute(records, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(migrations.RecordsTooNew):
        await Records.open(records_url)


async def test_sqlite_waits_for_locks_and_keeps_references_whole(sqlite_url: str) -> None:
    """WAL mode, a busy timeout and foreign keys are on in every connection."""

    async def pragma(connection: AsyncConnection, name: str) -> object:
        return (await connection.execute(text(f"PRAGMA {name}"))).scalar()

    async with await Records.open(sqlite_url) as records, records._engine.connect() as connection:
        found = [await pragma(connection, name) for name in ("journal_mode", "busy_timeout", "foreign_keys")]
    assert found == ["wal", schema.BUSY_TIMEOUT_MS, 1]


async def test_a_sqlite_file_in_a_new_folder_is_made(tmp_path: Path) -> None:
    """The first start needs no preparation."""
    async with await Records.open(f"sqlite:///{tmp_path / 'new' / 'folder' / 'records.db'}") as records:
        assert await records.recent() == []


async def test_the_query_of_the_specification_runs_unchanged_on_postgresql(postgresql_url: str) -> None:
    """Its pattern 3, word for word, with a text parameter and the plain asyncpg driver."""
    async with await Records.open(postgresql_url) as records:
        await bring_to(records, S.PACKAGING)
        await records.note("w-1", Facts(stage=stage(Stage.PACKAGE)))
    connection = await asyncpg.connect(postgresql_url)
    try:
        state = await connection.fetchrow(
            """
            SELECT workflow_id, current_state, stages_completed, stages_failed,
                   total_duration_ms, success, error_message, created_at
            FROM workflow_executions
            WHERE workflow_id = $1
            """,
            "w-1",
        )
        stages = await connection.fetch(
            """
            SELECT stage_name, success, duration_ms, operations, error_message
            FROM workflow_stage_results
            WHERE workflow_id = $1
            ORDER BY stage_number
            """,
            "w-1",
        )
    finally:
        await connection.close()
    assert (state["current_state"], json.loads(state["stages_completed"])) == (
        "PACKAGING",
        ["package_preparation"],
    )
    assert [(row["stage_name"], row["success"], row["duration_ms"]) for row in stages] == [
        ("package_preparation", True, 1500)
    ]


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
async def test_common_spellings_of_a_postgresql_url_are_understood(postgresql_url: str, scheme: str) -> None:
    """Scheme and `sslmode` as libpq's users write them."""
    url = f"{scheme}://{postgresql_url.partition('://')[2]}?sslmode=prefer"
    async with await Records.open(url) as records:
        assert await records.recent() == []


async def test_a_postgresql_that_is_down_is_named_without_its_password() -> None:
    """The operator reads which database, not its password."""
    url = f"postgresql://gantry:hunter2@127.0.0.1:{free_port()}/records"
    with pytest.raises(RecordsUnreachable, match=r"gantry:\*\*\*@127\.0\.0\.1") as caught:
        await Records.open(url)
    assert "hunter2" not in str(caught.value)


async def test_a_postgresql_that_is_starting_up_is_away() -> None:
    """A deployment waits for it as for one that does not answer: its refusal is no answer."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readexactly(8))[4:] == bytes.fromhex("04d2162f"):  # whether TLS is spoken here
            writer.write(b"N")
            await reader.readexactly(8)
        said = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
        writer.write(b"E" + (len(said) + 4).to_bytes(4) + said)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RecordsUnreachable, match="starting up"):
            await Records.open(f"postgresql://gantry@127.0.0.1:{port}/records")


async def test_a_postgresql_database_that_does_not_exist_is_named(postgresql_server: str) -> None:
    """A wrong name is answered like a dead server: with what to check."""
    with pytest.raises(RecordsUnreachable, match="nowhere"):
        await Records.open(f"{postgresql_server}/nowhere")


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "mysql://u:hunter2@h/d", "not a url hunter2"]
)
async def test_a_url_that_cannot_hold_records_is_refused_without_quoting_it(url: str) -> None:
    """Memory dies with its process; other databases are not spoken."""
    with pytest.raises(schema.RecordsUrlRefused) as caught:
        await Records.open(url)
    assert "hunter2" not in str(caught.value)
