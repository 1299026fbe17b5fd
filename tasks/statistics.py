"""What the records add up to: one consistent reading of the figures that the metrics tell.

Owns the SQL aggregates, over the rows that are there and the totals of those that were pruned. Knows
nothing of Prometheus. Only workflows that ended are measured: what cannot change cannot go backwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Column, ColumnElement, Row, Select, Table, case, func, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from tasks.records import UNENDED, Records
from tasks.schema import (
    DURATION_BOUNDS_MS,
    IMAGE_BOUNDS_BYTES,
    OUTBOX,
    STAGE_BOUNDS_MS,
    STAGE_TOTALS,
    STAGES,
    WORKFLOW_TOTALS,
    WORKFLOWS,
    histogram_columns,
)
from tasks.states import WorkflowState

MAX_STANDING = 500
ENDED_STANDS_FOR = timedelta(hours=1)
WORKFLOW_KEYS = tuple(column.name for column in WORKFLOW_TOTALS.primary_key)
STAGE_KEYS = tuple(column.name for column in STAGE_TOTALS.primary_key)
# By what is not meant, which no index answers: nearly all have ended, and looking up their rows costs more
# than reading them all from the index that has everything.
_ENDED = WORKFLOWS.c.current_state.not_in(sorted(UNENDED))
_UNDER_WAY = WORKFLOWS.c.current_state.in_(sorted(UNENDED))


@dataclass(frozen=True)
class Histogram:
    """How many values, their sum, and how many were at most each bound; ms or bytes."""

    count: int
    total: int
    within: tuple[int, ...]

    def __add__(self, other: Histogram) -> Histogram:
        """Both together; their bounds are the same."""
        within = tuple(a + b for a, b in zip(self.within, other.within, strict=True))
        return Histogram(self.count + other.count, self.total + other.total, within)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Workflows of one container and host that stand, or ended, in the same way; pruned ones included."""

    container_name: str
    remote_host: str
    state: WorkflowState
    failure_stage: str
    rollback_performed: bool
    first_created_at: datetime
    workflows: int
    duration_ms: Histogram
    image_bytes: Histogram


@dataclass(frozen=True, kw_only=True)
class StageGroup:
    """One stage of the ended workflows of one container."""

    container_name: str
    stage_name: str
    duration_ms: Histogram


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where one workflow stands."""

    workflow_id: str
    container_name: str
    remote_host: str
    state: WorkflowState


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """One moment of the records."""

    groups: tuple[Group, ...]
    stages: tuple[StageGroup, ...]
    standing: tuple[Standing, ...]
    unsent_events: int
    oldest_unsent_at: datetime | None


async def read_statistics(records: Records, at: datetime) -> Statistics:
    """All figures, of one moment; raises `RecordsUnreachable`.

    `standing` holds the newest 500 workflows under way, and of the newest 500 that ended within the hour
    before `at` the last one of each container and host.
    """
    async with records.snapshot() as connection:
        groups = await _all(connection, _with_pruned(workflow_sums(), WORKFLOW_TOTALS, WORKFLOW_KEYS))
        stages = await _all(connection, _with_pruned(stage_sums(_ENDED), STAGE_TOTALS, STAGE_KEYS))
        under_way = await _all(connection, _newest_under_way())
        ended = await _all(connection, _newest_ended(at - ENDED_STANDS_FOR))
        unsent, oldest = await _unsent(connection)
    return Statistics(
        groups=tuple(_group(row) for row in groups),
        stages=tuple(_stage_group(row) for row in stages),
        standing=(*map(_standing, under_way), *_last_of_each(map(_standing, ended))),
        unsent_events=unsent,
        oldest_unsent_at=oldest,
    )


def workflow_sums(chosen: ColumnElement[bool] | None = None) -> Select[Any]:
    """What the chosen workflows add up to, in the columns of `WORKFLOW_TOTALS`."""
    table = WORKFLOWS.c
    keys = [table[name] for name in WORKFLOW_KEYS]
    query = select(
        *(func.coalesce(key, "").label(key.name) if key.nullable else key for key in keys),
        func.min(table.created_at).label("first_created_at"),
        func.count().label("workflows"),
        *_sums(table.total_duration_ms, "duration_ms", DURATION_BOUNDS_MS),
        *_sums(table.image_size_bytes, "image_bytes", IMAGE_BOUNDS_BYTES),
    ).group_by(*keys)
    return query if chosen is None else query.where(chosen)


def stage_sums(chosen: ColumnElement[bool]) -> Select[Any]:
    """What the stages of the chosen workflows add up to, in the columns of `STAGE_TOTALS`."""
    keys = (WORKFLOWS.c.container_name, STAGES.c.stage_name)
    together = WORKFLOWS.join(STAGES, STAGES.c.workflow_id == WORKFLOWS.c.workflow_id)
    query = select(*keys, *_sums(STAGES.c.duration_ms, "duration_ms", STAGE_BOUNDS_MS))
    return query.select_from(together).where(chosen).group_by(*keys)


def _sums(column: Column[Any], measure: str, bounds: Iterable[int]) -> list[ColumnElement[Any]]:
    names = histogram_columns(measure, bounds)
    within = [func.sum(case((column <= bound, 1), else_=0)) for bound in bounds]
    sums = [func.count(column), func.coalesce(func.sum(column), 0), *within]
    return [each.label(name) for each, name in zip(sums, names, strict=True)]


def _with_pruned(rows: Select[Any], totals: Table, keys: Sequence[str]) -> Select[Any]:
    """The rows' sums and the totals of the pruned ones, as one."""
    both = union_all(rows, select(totals)).subquery()
    sums = [
        (func.min if column.name == "first_created_at" else func.sum)(both.c[column.name]).label(column.name)
        for column in totals.columns
        if not column.primary_key
    ]
    by = [both.c[key] for key in keys]
    return select(*by, *sums).group_by(*by)


def _newest_under_way() -> Select[Any]:
    query = select(*_standing_columns()).where(_UNDER_WAY)
    return query.order_by(WORKFLOWS.c.created_at.desc()).limit(MAX_STANDING)


def _newest_ended(since: datetime) -> Select[Any]:
    table = WORKFLOWS.c
    query = select(*_standing_columns()).where(table.completed_at >= since)
    return query.order_by(table.completed_at.desc(), table.created_at.desc()).limit(MAX_STANDING)


def _last_of_each(newest_first: Iterable[Standing]) -> list[Standing]:
    """The last workflow of each container and host."""
    last: dict[tuple[str, str], Standing] = {}
    for one in newest_first:
        last.setdefault((one.container_name, one.remote_host), one)
    return list(last.values())


def _standing_columns() -> list[Column[Any]]:
    names = ("workflow_id", "container_name", "remote_host", "current_state")
    return [WORKFLOWS.c[name] for name in names]


async def _unsent(connection: AsyncConnection) -> tuple[int, datetime | None]:
    query = select(func.count(), func.min(OUTBOX.c.created_at)).where(OUTBOX.c.sent_at.is_(None))
    count, oldest = (await connection.execute(query)).one()
    return count, oldest


async def _all(connection: AsyncConnection, query: Select[Any]) -> list[Row[Any]]:
    return list((await connection.execute(query)).all())


def _group(row: Row[Any]) -> Group:
    return Group(
        container_name=row.container_name,
        remote_host=row.remote_host,
        state=WorkflowState(row.current_state),
        failure_stage=row.failure_stage,
        rollback_performed=row.rollback_performed,
        first_created_at=row.first_created_at,
        workflows=int(row.workflows),
        duration_ms=_histogram(row, "duration_ms", DURATION_BOUNDS_MS),
        image_bytes=_histogram(row, "image_bytes", IMAGE_BOUNDS_BYTES),
    )


def _stage_group(row: Row[Any]) -> StageGroup:
    return StageGroup(
        container_name=row.container_name,
        stage_name=row.stage_name,
        duration_ms=_histogram(row, "duration_ms", STAGE_BOUNDS_MS),
    )


def _histogram(row: Row[Any], measure: str, bounds: Iterable[int]) -> Histogram:
    # PostgreSQL sums 64-bit integers to decimals.
    count, total, *within = (int(row._mapping[name]) for name in histogram_columns(measure, bounds))
    return Histogram(count, total, tuple(within))


def _standing(row: Row[Any]) -> Standing:
    return Standing(
        workflow_id=row.workflow_id,
        container_name=row.container_name,
        remote_host=row.remote_host,
        state=WorkflowState(row.current_state),
    )
