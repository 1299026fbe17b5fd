"""Old records go, and nobody notices: counters stay, what is unfinished or unsent stays."""

from __future__ import annotations

import asyncio
import inspect
import logging
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.exceptions import ParameterTypeError
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from flows.prune import prune_records
from receiver.contract import Stage
from tasks import migrations, retention
from tasks.records import Records, WorkflowState, WorkflowUnknown
from tasks.retention import Limits, Pruned, prune
from tasks.schema import METADATA
from tests.recorded import START, Story, publish, record, scrape

S = WorkflowState
NOW = START + timedelta(days=200)
LIMITS = Limits.of(NOW, keep_days=90, keep_events_days=7)
TABLES = ("workflow_executions", "workflow_stage_results", "workflow_transitions", "event_outbox")
PRUNE_AND_HANG = """
import asyncio, sys
from sqlalchemy import event
from tasks.records import Records
from tasks.retention import Limits, prune
from datetime import datetime

async def main():
    async with await Records.open(sys.argv[1]) as records:
        def hang(connection, cursor, statement, *rest):
            if statement.startswith("DELETE FROM workflow_executions"):
                print("in the middle", flush=True)
                sys.stdin.read()
        event.listen(records._engine.sync_engine, "before_cursor_execute", hang)
        await prune(records, Limits(*map(datetime.fromisoformat, sys.argv[2:4])))

asyncio.run(main())
"""


@pytest.fixture
async def records(records_url: str) -> AsyncIterator[Records]:
    """Records in a new database, at the newest schema."""
    async with await Records.open(records_url) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else waits for these databases."""
    monkeypatch.setattr(retention, "PAUSE_SECONDS", 0)


async def fill(records: Records, count: int = 12) -> None:
    """Deployments of half a year with every ending, in three containers; their events are published."""
    endings = [None, None, *Stage]
    for number in range(count):
        story = Story(
            workflow_id=f"w-{number}",
            container_name=f"shop-{number % 3}",
            at=START + timedelta(days=200 / count * number),
            stage_seconds=3 + number * 2,
            image_bytes=number * 200_000_000,
            fails_in=endings[number % len(endings)],
            rollback_works=number % 4 != 0,
        )
        await record(records, story)
    await publish(records, START + timedelta(days=150))


async def sizes(records: Records) -> dict[str, int]:
    """Rows of each table that is pruned."""
    async with records.snapshot() as connection:
        return {
            name: (
                await connection.execute(select(func.count()).select_from(METADATA.tables[name]))
            ).scalar_one()
            for name in TABLES
        }


async def test_the_metrics_after_a_prune_are_those_before_it(records: Records) -> None:
    """To the last bucket, in every batch size, and also when it is pruned in two parts."""
    await fill(records)
    before, rows = await scrape(records, NOW), await sizes(records)
    assert len(before) > 100
    first = await prune(records, Limits.of(NOW, 150, 7), batch_rows=2)
    assert (first.workflows, first.events) == (3, rows["event_outbox"])
    assert await scrape(records, NOW) == before
    second = await prune(records, LIMITS, batch_rows=2)
    assert (second.workflows, second.events) == (4, 0)
    assert await scrape(records, NOW) == before
    left = await sizes(records)
    assert left["workflow_executions"] == rows["workflow_executions"] - 7
    assert left["workflow_stage_results"] < rows["workflow_stage_results"]
    assert left["workflow_transitions"] < rows["workflow_transitions"]
    assert await prune(records, LIMITS) == Pruned(0, 0, 0, dry_run=False)


async def test_counters_go_on_from_where_pruned_deployments_left_them(records: Records) -> None:
    """New deployments of a container whose records are all gone add to the same series."""
    await record(records, Story(workflow_id="w-1"))
    await publish(records, START)
    assert (await prune(records, LIMITS)).workflows == 1
    with pytest.raises(WorkflowUnknown):
        await records.get("w-1")
    await record(records, Story(workflow_id="w-2", at=NOW))
    found = await scrape(records, NOW)
    labels = "{container_name=shop,remote_host=target}"
    assert found[f"deployments_started_total{labels}"] == found[f"deployments_completed_total{labels}"] == 2
    assert found["deployment_duration_seconds_sum{container_name=shop}"] == 56


@pytest.mark.parametrize("state", [S.PENDING, S.PACKAGING, S.DEPLOYING, S.VALIDATING])
async def test_a_workflow_under_way_stays_however_old(records: Records, state: WorkflowState) -> None:
    """With all its events, for whoever asks what holds it up."""
    await record(records, Story(workflow_id="w-1", stops_in=state))
    await publish(records, START)
    before = (await records.get("w-1"), await records.outbox("w-1"), await records.stages("w-1"))
    assert await prune(records, LIMITS) == Pruned(0, 0, 0, dry_run=False)
    assert (await records.get("w-1"), await records.outbox("w-1"), await records.stages("w-1")) == before


async def test_an_event_that_was_not_sent_stays_with_its_workflow(records: Records) -> None:
    """However old; the report says how many are held back, and once it is sent they go."""
    await record(records, Story(workflow_id="w-1"))
    *sent, unsent = await records.outbox("w-1")
    await records.mark_sent([row.id for row in sent], START)
    pruned = await prune(records, LIMITS)
    assert pruned == Pruned(workflows=0, events=len(sent), held_back=1, dry_run=False)
    assert [row.id for row in await records.outbox("w-1")] == [unsent.id]
    await records.mark_sent([unsent.id], START)
    assert await prune(records, LIMITS) == Pruned(workflows=1, events=1, held_back=0, dry_run=False)


async def test_a_workflow_waits_for_the_limit_of_its_events_too(records: Records) -> None:
    """Sent a moment ago, after a long outage: event and workflow stay for their days."""
    await record(records, Story(workflow_id="w-1"))
    await publish(records, NOW - timedelta(days=1))
    assert await prune(records, LIMITS) == Pruned(0, 0, 0, dry_run=False)
    assert len(await records.outbox("w-1")) == 6
    soon = Limits.of(NOW + timedelta(days=7), keep_days=90, keep_events_days=7)
    assert (await prune(records, soon)).workflows == 1


async def test_both_limits_are_counted_to_the_moment(records: Records) -> None:
    """Exactly at the limit is kept, a moment later it goes."""
    await record(records, Story(workflow_id="w-1", stage_seconds=0))
    await publish(records, START)
    moment = timedelta(milliseconds=1)
    assert await prune(records, Limits(START, START)) == Pruned(0, 0, 0, dry_run=False)
    gone = await prune(records, Limits(START + moment, START + moment))
    assert (gone.workflows, gone.events) == (1, 6)


async def test_a_dry_run_says_what_would_go_and_changes_nothing(records: Records) -> None:
    """The same numbers as the prune that follows it."""
    await fill(records)
    rows, before = await sizes(records), await scrape(records, NOW)
    would = await prune(records, LIMITS, dry_run=True)
    assert (await sizes(records), await scrape(records, NOW)) == (rows, before)
    assert would.workflows == 7
    assert replace(would, dry_run=False) == await prune(records, LIMITS)


async def test_a_prune_that_fails_in_the_middle_changed_nothing(records: Records) -> None:
    """The last of its deletes is refused: what it had added to the totals and deleted is undone."""
    await fill(records)
    await prune(records, Limits(START, LIMITS.sent_before))  # the events alone, so that one batch is left
    rows, before = await sizes(records), await scrape(records, NOW)
    await _refuse_deletes(records)
    with pytest.raises(DBAPIError, match="no deletes today"):
        await prune(records, LIMITS)
    assert (await sizes(records), await scrape(records, NOW)) == (rows, before)


async def test_a_prune_killed_in_the_middle_changed_nothing(records_url: str, records: Records) -> None:
    """SIGKILL between its deletes; the next prune does the whole work, and counts nothing twice."""
    await fill(records)
    before = await scrape(records, NOW)
    limits = (LIMITS.ended_before.isoformat(), LIMITS.sent_before.isoformat())
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PRUNE_AND_HANG, records_url, *limits),
        cwd=Path(migrations.__file__).parents[2],
        stdin=pipe,
        stdout=pipe,
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"in the middle\n"
    rows = await sizes(records)
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    assert (await sizes(records), await scrape(records, NOW)) == (rows, before)
    assert rows["workflow_executions"] == 12
    assert (await asyncio.wait_for(prune(records, LIMITS), 30)).workflows == 7
    assert await scrape(records, NOW) == before


async def test_two_prunes_at_once_count_nothing_twice(records_url: str, records: Records) -> None:
    """Each row goes once, whichever control host takes it."""
    await fill(records, count=30)
    before = await scrape(records, NOW)
    async with await Records.open(records_url) as other:
        pruned = await asyncio.gather(*(prune(each, LIMITS, batch_rows=3) for each in (records, other)))
    assert sum(each.workflows for each in pruned) == 17
    assert await scrape(records, NOW) == before


async def test_an_event_told_while_its_workflow_goes_is_not_lost(records: Records) -> None:
    """The whole batch is undone; it goes when that event is sent."""
    await record(records, Story(workflow_id="w-1"))
    await publish(records, START)
    async with records.transaction() as connection:
        await connection.execute(
            text(
                "INSERT INTO event_outbox"
                " (event_id, workflow_id, sequence, topic, event_type, message, created_at, attempts)"
                " VALUES ('late', 'w-1', 99, 't', 'x', '{}', CURRENT_TIMESTAMP, 0)"
            )
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retention, "_may_go", retention._is_old)  # as it was chosen a moment before the event
        with pytest.raises(DBAPIError, match=r"(?i)foreign key"):
            await prune(records, LIMITS)
    assert [row.event_id for row in await records.unsent(5)] == ["late"]
    assert (await records.get("w-1")).current_state is S.COMPLETED


async def test_the_flow_says_what_it_pruned(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The numbers are its result and one line of its log."""

    async def find() -> str:
        return sqlite_url

    monkeypatch.setattr(retention, "find_records_url", find)
    monkeypatch.setattr("flows.prune.prune_stored_records", retention.prune_stored_records.fn)
    monkeypatch.setattr("flows.prune.get_run_logger", lambda: logging.getLogger("prune"))
    async with await Records.open(sqlite_url) as records:
        await record(records, Story(workflow_id="w-1"))
        await publish(records, START)
    caplog.set_level("INFO")
    for dry_run in (True, False):
        told = await prune_records.fn(dry_run=dry_run)
        assert told == {"workflows": 1, "events": 6, "held_back": 0, "dry_run": dry_run}
    lines = [line.message.partition(";")[0] for line in caplog.records if line.name == "prune"]
    assert lines == ["would prune 1 workflows and 6 events", "pruned 1 workflows and 6 events"]


def test_the_flow_s_parameters_are_those_of_the_readme() -> None:
    """Ninety days of workflows, seven of events; less than a day is refused before anything runs."""
    defaults = {name: each.default for name, each in inspect.signature(prune_records.fn).parameters.items()}
    assert defaults == {"keep_days": 90, "keep_events_days": 7, "dry_run": False}
    for wrong in ({"keep_days": 0}, {"keep_events_days": -1}):
        with pytest.raises(ParameterTypeError):
            prune_records.validate_parameters(defaults | wrong)


@pytest.mark.parametrize("days", [(0, 7), (90, 0), (-1, 1)])
def test_less_than_a_day_is_refused(days: tuple[int, int]) -> None:
    """The metrics show what ended within the hour; a zero is more likely a mistake than a wish."""
    with pytest.raises(ValueError, match="at least 1"):
        Limits.of(NOW, *days)


async def _refuse_deletes(records: Records) -> None:
    async with records.transaction() as connection:
        if connection.dialect.name == "postgresql":
            await connection.execute(
                text(
                    "CREATE FUNCTION refuse() RETURNS trigger AS"
                    " 'BEGIN RAISE EXCEPTION ''no deletes today''; END' LANGUAGE plpgsql"
                )
            )
            await connection.execute(
                text("CREATE TRIGGER refuse BEFORE DELETE ON workflow_executions EXECUTE FUNCTION refuse()")
            )
        else:
            await connection.execute(
                text(
                    "CREATE TRIGGER refuse BEFORE DELETE ON workflow_executions"
                    " BEGIN SELECT RAISE(ABORT, 'no deletes today'); END"
                )
            )
