"""What the records let go of: workflows that ended long ago, and events that were published.

Owns the SQL that deletes. What the deleted rows said to the metrics is added to the totals in the same
transaction. Never touches a workflow that has not ended, nor an event that was not sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, Table, case, delete, exists, func, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from blocks.records_database import find_records_url
from tasks.errors import RetryPolicy
from tasks.policies import operation
from tasks.records import UNENDED, Records
from tasks.schema import OUTBOX, STAGE_TOTALS, STAGES, TRANSITION_ROWS, WORKFLOW_TOTALS, WORKFLOWS
from tasks.states import TERMINAL
from tasks.statistics import STAGE_KEYS, WORKFLOW_KEYS, stage_sums, workflow_sums

BATCH_ROWS = 500
# On SQLite a batch holds the only write lock; who waits for it looks again at least every 100 ms.
PAUSE_SECONDS = 0.1
_ADVISORY_LOCK = 0x5052554E  # any number, the same in every process that prunes
Step = Callable[[AsyncConnection, "Limits", int], Awaitable[int]]


@dataclass(frozen=True)
class Limits:
    """Rows before these moments may go: by the workflow's end, and by the event's being sent."""

    ended_before: datetime
    sent_before: datetime

    @classmethod
    def of(cls, at: datetime, keep_days: int, keep_events_days: int) -> Limits:
        """Raises ValueError for less than a day: what the metrics show as just ended must be there."""
        if min(keep_days, keep_events_days) < 1:
            raise ValueError("keep_days and keep_events_days are at least 1")
        return cls(at - timedelta(days=keep_days), at - timedelta(days=keep_events_days))


@dataclass(frozen=True)
class Pruned:
    """What was deleted, or would be; `held_back` old workflows stay because an event of theirs is unsent."""

    workflows: int
    events: int
    held_back: int
    dry_run: bool


async def prune(
    records: Records, limits: Limits, *, dry_run: bool = False, batch_rows: int = BATCH_ROWS
) -> Pruned:
    """Delete what is past the limits, a batch in one transaction each; safe to stop and to run twice.

    A workflow goes with its stages, transitions and events, once the last of these was sent before
    `sent_before`. `dry_run` only counts.
    """
    async with records.snapshot() as connection:
        held_back = await _count(
            connection, WORKFLOWS, _is_old(limits) & _has_events(OUTBOX.c.sent_at.is_(None))
        )
        if dry_run:
            workflows = await _count(connection, WORKFLOWS, _may_go(limits))
            events = await _count(connection, OUTBOX, _was_published(limits))
            return Pruned(workflows, events, held_back, dry_run=True)
    events = await _in_batches(records, _delete_events, limits, batch_rows)
    workflows = await _in_batches(records, _delete_workflows, limits, batch_rows)
    return Pruned(workflows, events, held_back, dry_run=False)


@operation("prune_records", policy=RetryPolicy(max_attempts=1, timeout_ms=3_600_000))
async def prune_stored_records(keep_days: int, keep_events_days: int, dry_run: bool) -> Pruned:
    """Prune the records that this control host writes, as of now."""
    limits = Limits.of(datetime.now(UTC), keep_days, keep_events_days)
    async with await Records.open(await find_records_url()) as records:
        return await prune(records, limits, dry_run=dry_run)


async def _in_batches(records: Records, step: Step, limits: Limits, batch_rows: int) -> int:
    """Repeat the step, each time in a transaction of its own, until it finds less than a batch."""
    done, found = 0, batch_rows
    while found == batch_rows:
        async with records.transaction() as connection:
            await _hold_others_off(connection)
            found = await step(connection, limits, batch_rows)
        done += found
        if found == batch_rows:
            await asyncio.sleep(PAUSE_SECONDS)
    return done


async def _hold_others_off(connection: AsyncConnection) -> None:
    """One prune at a time: two that choose the same rows would count them twice (SQLite: locked already)."""
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})


async def _delete_events(connection: AsyncConnection, limits: Limits, batch_rows: int) -> int:
    query = select(OUTBOX.c.id).where(_was_published(limits)).order_by(OUTBOX.c.sent_at).limit(batch_rows)
    chosen = (await connection.execute(query)).scalars().all()
    await connection.execute(delete(OUTBOX).where(OUTBOX.c.id.in_(chosen)))
    return len(chosen)


async def _delete_workflows(connection: AsyncConnection, limits: Limits, batch_rows: int) -> int:
    query = select(WORKFLOWS.c.workflow_id).where(_may_go(limits)).order_by(WORKFLOWS.c.completed_at)
    chosen = (await connection.execute(query.limit(batch_rows).with_for_update())).scalars().all()
    if not chosen:
        return 0
    these = WORKFLOWS.c.workflow_id.in_(chosen)
    await _add(connection, STAGE_TOTALS, stage_sums(these), STAGE_KEYS)
    await _add(connection, WORKFLOW_TOTALS, workflow_sums(these), WORKFLOW_KEYS)
    # An unsent event that came meanwhile stays, so that its reference stops the whole batch.
    published = OUTBOX.c.workflow_id.in_(chosen) & OUTBOX.c.sent_at.is_not(None)
    await connection.execute(delete(OUTBOX).where(published))
    for table in (TRANSITION_ROWS, STAGES, WORKFLOWS):
        await connection.execute(delete(table).where(table.c.workflow_id.in_(chosen)))
    return len(chosen)


async def _add(connection: AsyncConnection, totals: Table, sums: Select[Any], keys: Sequence[str]) -> None:
    """Add what the rows that are about to go have counted for."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    row = dialect.insert(totals).from_select(totals.c.keys(), sums)
    measures = [column for column in totals.columns if not column.primary_key]
    added: dict[str, Any] = {each.name: each + row.excluded[each.name] for each in measures}
    if "first_created_at" in added:
        ours, theirs = totals.c.first_created_at, row.excluded.first_created_at
        added["first_created_at"] = case((theirs < ours, theirs), else_=ours)
    await connection.execute(row.on_conflict_do_update(index_elements=list(keys), set_=added))


def _is_old(limits: Limits) -> ColumnElement[bool]:
    ended = WORKFLOWS.c.current_state.in_(sorted(TERMINAL))
    return ended & (WORKFLOWS.c.completed_at < limits.ended_before)


def _may_go(limits: Limits) -> ColumnElement[bool]:
    kept = OUTBOX.c.sent_at.is_(None) | (OUTBOX.c.sent_at >= limits.sent_before)
    return _is_old(limits) & ~_has_events(kept)


def _has_events(which: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists().where((OUTBOX.c.workflow_id == WORKFLOWS.c.workflow_id) & which)


def _was_published(limits: Limits) -> ColumnElement[bool]:
    """Sent long ago; the events of a workflow under way stay, for whoever asks what holds it up."""
    under_way = select(WORKFLOWS.c.workflow_id).where(WORKFLOWS.c.current_state.in_(sorted(UNENDED)))
    return (OUTBOX.c.sent_at < limits.sent_before) & OUTBOX.c.workflow_id.not_in(under_way)


async def _count(connection: AsyncConnection, table: Table, which: ColumnElement[bool]) -> int:
    return int((await connection.execute(select(func.count()).select_from(table).where(which))).scalar_one())
