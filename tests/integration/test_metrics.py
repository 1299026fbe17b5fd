"""The control host's metrics, from records on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from deployments.metrics import CONTENT_TYPE
from receiver.contract import Stage
from tasks import migrations, schema
from tasks.records import Facts, Records, StageResult, WorkflowState
from tests.recorded import START, Story, multiply, publish, record, scrape
from tests.services import free_port

S = WorkflowState
PAIR = "{container_name=shop,remote_host=target}"
LATER = START + timedelta(hours=2)
MANY = 10_000
QUICK_SECONDS = 2.0
# The questions of the status, list and history views, of the relay, and of the specification's pattern 3.
QUERIES = (
    "SELECT * FROM workflow_executions WHERE workflow_id = 'w-7'",
    "SELECT * FROM workflow_stage_results WHERE workflow_id = 'w-7' ORDER BY stage_number",
    "SELECT * FROM workflow_transitions WHERE workflow_id = 'w-7' ORDER BY sequence",
    "SELECT * FROM event_outbox WHERE workflow_id = 'w-7' ORDER BY sequence",
    "SELECT * FROM event_outbox WHERE sent_at IS NULL ORDER BY id LIMIT 100",
    "SELECT * FROM workflow_executions ORDER BY created_at DESC LIMIT 50",
    "SELECT * FROM workflow_executions WHERE container_name = 'shop-1' ORDER BY created_at DESC LIMIT 50",
    "SELECT * FROM workflow_executions WHERE remote_host = 'host-1' ORDER BY created_at DESC LIMIT 50",
    "SELECT * FROM workflow_executions WHERE container_name = 'shop-1' AND remote_host = 'host-1'"
    " ORDER BY created_at DESC LIMIT 50",
    "SELECT * FROM workflow_executions WHERE current_state = 'DEPLOYING' ORDER BY created_at DESC LIMIT 50",
    "SELECT * FROM workflow_executions WHERE current_state IN ('PENDING', 'PACKAGING', 'DEPLOYING')"
    " ORDER BY created_at DESC LIMIT 50",
)


@pytest.fixture
async def records(records_url: str) -> AsyncIterator[Records]:
    """Records in a new database, at the newest schema."""
    async with await Records.open(records_url) as opened:
        yield opened


async def test_every_way_to_end_is_counted_where_the_specification_says(records: Records) -> None:
    """Started, completed, failed by stage, rolled back; a failed rollback is told apart."""
    for number, failure in enumerate([None, None, None, *Stage]):
        await record(records, Story(workflow_id=f"w-{number}", fails_in=failure))
    stranded = Story(workflow_id="w-bad", fails_in=Stage.VALIDATE, rollback_works=False)
    await record(records, stranded)
    await record(records, Story(workflow_id="w-now", stops_in=S.DEPLOYING))
    found = await scrape(records, LATER)
    assert found[f"deployments_started_total{PAIR}"] == 9
    assert found[f"deployments_completed_total{PAIR}"] == 3
    assert found[f"deployments_rolled_back_total{PAIR}"] == 2
    assert found[f"deployments_rollback_failed_total{PAIR}"] == 1
    failed = {stage: found[f"deployments_failed_total{_pair(stage)}"] for stage in Stage}
    assert failed == dict.fromkeys(Stage, 1) | {Stage.VALIDATE: 2}
    assert found[f"health_check_success_rate{PAIR}"] == 3 / 5
    assert found["concurrent_deployments"] == 1
    assert found["records_up"] == 1


def _pair(stage: str) -> str:
    return f"{{container_name=shop,failure_stage={stage},remote_host=target}}"


async def test_durations_and_sizes_fall_into_the_buckets_of_the_specification(records: Records) -> None:
    """A value on a bound belongs to its bucket; what is beyond the last one counts for +Inf only."""
    for number, stage_seconds in enumerate([3.75, 3.751, 15, 100]):  # four stages each: 15 s, 15.004, 60, 400
        size = (10_000_000, 10_000_001, 1_000_000_000, 3_000_000_000)[number]
        await record(records, Story(workflow_id=f"w-{number}", stage_seconds=stage_seconds, image_bytes=size))
    found = await scrape(records)

    def buckets(name: str, labels: str) -> list[tuple[str, float]]:
        inside = {
            key: value for key, value in found.items() if key.startswith(f"{name}_bucket{{{labels},le=")
        }
        return [(key.rpartition("le=")[2].partition(",")[0].rstrip("}"), inside[key]) for key in inside]

    assert buckets("deployment_duration_seconds", "container_name=shop") == [
        *[("15.0", 1), ("30.0", 2), ("60.0", 3), ("120.0", 3), ("180.0", 3), ("+Inf", 4)]
    ]
    assert found["deployment_duration_seconds_sum{container_name=shop}"] == pytest.approx(490.004)
    assert found["deployment_duration_seconds_count{container_name=shop}"] == 4
    per_stage = [("5.0", 2), ("10.0", 2), ("15.0", 3), ("30.0", 3), ("60.0", 3), ("+Inf", 4)]
    assert buckets("stage_duration_seconds", "container_name=shop") == per_stage * len(Stage)
    of_image = [(10**7, 1), (10**8, 2), (5 * 10**8, 2), (10**9, 3), (2 * 10**9, 3)]
    told = [(str(float(bound)), count) for bound, count in of_image]
    assert buckets("image_size_bytes", "container_name=shop") == [*told, ("+Inf", 4)]
    assert found["image_size_bytes_sum{container_name=shop}"] == 4_020_000_001


async def test_only_what_cannot_change_any_more_is_measured(records: Records) -> None:
    """A stage that is tried again replaces its result, which must never take a count back."""
    await record(records, Story(workflow_id="w-1", stops_in=S.TRANSFERRING))
    found = await scrape(records)
    assert not [name for name in found if name.startswith(("stage_", "image_", "deployment_"))]
    slow = StageResult(
        stage=Stage.PACKAGE, success=True, duration_ms=99_000, started_at=START, completed_at=START
    )
    await records.note("w-1", Facts(stage=slow))
    await records.advance("w-1", S.TRANSFERRING, S.FAILED, at=START)
    found = await scrape(records)
    labels = "{container_name=shop,stage_name=package_preparation}"
    assert found[f"stage_duration_seconds_sum{labels}"] == 99


async def test_the_current_state_is_told_while_it_is_news(records: Records) -> None:
    """All under way, and the last to end of each container and host, for an hour."""
    await record(records, Story(workflow_id="w-1"))
    await record(records, Story(workflow_id="w-2", at=START + timedelta(minutes=1), fails_in=Stage.VALIDATE))
    await record(records, Story(workflow_id="w-3", remote_host="other", stops_in=S.VALIDATING))

    async def told(at_minutes: int) -> set[str]:
        found = await scrape(records, START + timedelta(minutes=at_minutes))
        return {name for name, value in found.items() if name.startswith("current_") and value == 1}

    def state(workflow_id: str, state: WorkflowState) -> str:
        return f"current_deployment_state{{container_name=shop,state={state},workflow_id={workflow_id}}}"

    assert await told(5) == {state("w-2", S.ROLLBACK_COMPLETED), state("w-3", S.VALIDATING)}
    assert await told(90) == {state("w-3", S.VALIDATING)}


async def test_waiting_events_are_counted_with_the_age_of_the_oldest(records: Records) -> None:
    """Nothing waits: 0 and 0."""
    await record(records, Story(workflow_id="w-1"))
    found = await scrape(records, START + timedelta(seconds=90))
    assert found["outbox_unsent_events"] == len(await records.outbox("w-1")) == 6
    assert found["outbox_oldest_unsent_seconds"] == 90
    await publish(records, START)
    found = await scrape(records, START + timedelta(seconds=90))
    assert (found["outbox_unsent_events"], found["outbox_oldest_unsent_seconds"]) == (0, 0)


async def test_records_that_do_not_answer_are_told_as_down(records: Records) -> None:
    """The scrape goes well and says it: no figure is made up, none is repeated."""
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")
    async with records.transaction() as connection:
        await connection.execute(text("ALTER TABLE workflow_stage_results RENAME TO away"))
    assert await scrape(records) == {"records_up": 0}
    async with records.transaction() as connection:
        await connection.execute(text("ALTER TABLE away RENAME TO workflow_stage_results"))
    assert (await scrape(records))["records_up"] == 1


async def test_a_postgresql_that_does_not_run_is_told_as_down() -> None:
    """The connection is refused, and the scrape is answered."""
    records = Records(schema.make_engine(schema.parse_url(f"postgresql://u@127.0.0.1:{free_port()}/records")))
    assert await scrape(records) == {"records_up": 0}
    await records.close()


async def test_a_database_that_hangs_does_not_hang_the_scrape(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody holds a table for himself: told as down within the patience, and well again afterwards."""
    monkeypatch.setattr("deployments.metrics.PATIENCE_SECONDS", 0.5)
    async with await Records.open(postgresql_url) as records:
        async with records.transaction() as connection:
            await connection.execute(text("LOCK TABLE workflow_executions"))
            assert await asyncio.wait_for(scrape(records), 5) == {"records_up": 0}
        assert (await scrape(records))["records_up"] == 1


async def test_ten_thousand_deployments_are_added_up_quickly(records: Records) -> None:
    """In the database, from its indexes; the figures are those of the rows."""
    await record(records, Story(workflow_id="w-0"))
    await multiply(records, MANY - 1)
    began = time.monotonic()
    found = await scrape(records)
    assert time.monotonic() - began < QUICK_SECONDS
    for name, expected in (
        ("deployments_completed_total", MANY),
        ("deployment_duration_seconds_count", MANY),
        ("stage_duration_seconds_count", MANY * len(Stage)),
    ):
        assert sum(value for key, value in found.items() if key.startswith(name)) == expected


async def test_no_question_reads_a_whole_table(records: Records) -> None:
    """Status, history, lists and relay go by an index."""
    async with records.snapshot() as connection:
        is_postgresql = connection.dialect.name == "postgresql"
        if is_postgresql:  # the tables are empty here, and reading nothing is always cheapest
            await connection.execute(text("SET LOCAL enable_seqscan = off"))
        for query in QUERIES:
            explain = "EXPLAIN" if is_postgresql else "EXPLAIN QUERY PLAN"
            plan = [str(row[-1]) for row in (await connection.execute(text(f"{explain} {query}"))).all()]
            whole = [step for step in plan if "Seq Scan" in step]
            whole += [step for step in plan if step.startswith("SCAN") and "INDEX" not in step]
            assert plan
            assert not whole, plan


async def test_a_database_of_the_version_before_keeps_its_rows(records_url: str) -> None:
    """The migration adds tables and indexes to what is there."""
    engine = schema.make_engine(schema.parse_url(records_url))
    async with engine.execution_options(**{schema.WRITES: True}).begin() as connection:
        await connection.run_sync(_first_version)
    async with Records(engine) as before:
        await record(before, Story(workflow_id="w-1"))
        stored = await before.get("w-1")
    async with await Records.open(records_url) as after:
        assert await after.get("w-1") == stored
        assert (await scrape(after))[f"deployments_completed_total{PAIR}"] == 1


def _first_version(connection: Connection) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(migrations.SCRIPTS))
    command.upgrade(config, "0001")
