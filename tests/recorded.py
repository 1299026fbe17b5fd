"""Deployments as they end up in the records, for tests of metrics and retention; and reading the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Text, cast, insert, literal, select, true

from deployments.metrics import render
from receiver.contract import Stage
from tasks.records import Facts, NewWorkflow, Records, StageResult, WorkflowState
from tasks.schema import STAGES, TRANSITION_ROWS, WORKFLOWS

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
S = WorkflowState
WAY = (S.PENDING, S.PACKAGING, S.TRANSFERRING, S.DEPLOYING, S.VALIDATING)


@dataclass(frozen=True, kw_only=True)
class Story:
    """One deployment; `fails_in` ends it in that stage, rolled back from stage 3 on where the host can."""

    workflow_id: str
    container_name: str = "shop"
    remote_host: str = "target"
    at: datetime = START
    stage_seconds: float = 7
    image_bytes: int = 250_000_000
    fails_in: Stage | None = None
    rollback_works: bool = True
    stops_in: WorkflowState | None = None


async def record(records: Records, story: Story) -> None:
    """Write the whole deployment, with its stages, events and times."""
    new = NewWorkflow(
        workflow_id=story.workflow_id, container_name=story.container_name, remote_host=story.remote_host
    )
    now = story.at
    await records.create(new, at=now)
    if story.stops_in is S.PENDING:
        return
    await records.advance(story.workflow_id, S.PENDING, S.PACKAGING, at=now)
    for state, following, stage in zip(WAY[1:], (*WAY[2:], S.COMPLETED), Stage, strict=True):
        if story.stops_in is state:
            return
        began, now = now, now + timedelta(seconds=story.stage_seconds)
        facts = Facts(stage=_result(story, stage, began, now), image_size_bytes=story.image_bytes)
        if stage is story.fails_in:
            await _fail(records, story, state, facts, now)
            return
        await records.advance(story.workflow_id, state, following, facts, at=now)


async def _fail(records: Records, story: Story, state: WorkflowState, facts: Facts, now: datetime) -> None:
    if state in {S.PACKAGING, S.TRANSFERRING}:
        await records.advance(story.workflow_id, state, S.FAILED, facts, at=now)
        return
    await records.advance(story.workflow_id, state, S.ROLLING_BACK, facts, at=now)
    ended = S.ROLLBACK_COMPLETED if story.rollback_works else S.FAILED
    await records.advance(story.workflow_id, S.ROLLING_BACK, ended, at=now)


def _result(story: Story, stage: Stage, began: datetime, ended: datetime) -> StageResult:
    return StageResult(
        stage=stage,
        success=stage is not story.fails_in,
        duration_ms=round(story.stage_seconds * 1000),
        started_at=began,
        completed_at=ended,
    )


async def multiply(records: Records, times: int) -> None:
    """Copies of all that workflow `w-0` left but its events, in 40 containers on 5 hosts, by the database."""
    numbers = select(literal(1).label("n")).cte("numbers", recursive=True)
    numbers = numbers.union_all(select(numbers.c.n + 1).where(numbers.c.n < times))
    number = cast(numbers.c.n, Text)
    changed = {
        "workflow_id": "w-" + number,
        "container_name": "shop-" + cast(numbers.c.n % 40, Text),
        "remote_host": "host-" + cast(numbers.c.n % 5, Text),
    }
    async with records.transaction() as connection:
        for table in (WORKFLOWS, STAGES, TRANSITION_ROWS):
            names = [column.name for column in table.columns if column.name != "id"]
            copies = select(*(changed.get(name, table.c[name]) for name in names))
            copies = copies.select_from(table.join(numbers, true())).where(table.c.workflow_id == "w-0")
            await connection.execute(insert(table).from_select(names, copies))


async def publish(records: Records, at: datetime) -> None:
    """All events are with the broker."""
    while rows := await records.unsent(500):
        await records.mark_sent([row.id for row in rows], at)


async def scrape(records: Records, at: datetime | None = None) -> dict[str, float]:
    """Values by `name{label=value,...}`, labels by name, read by Prometheus' own parser."""
    return samples((await render(records, at=at)).decode())


def samples(text: str) -> dict[str, float]:
    """The samples of an exposition."""
    return {
        f"{sample.name}{{{','.join(f'{k}={v}' for k, v in sorted(sample.labels.items()))}}}".replace(
            "{}", ""
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
