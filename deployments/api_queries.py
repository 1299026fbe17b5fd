"""The list of workflows, page by page: the one question of the HTTP API that `Records` does not answer.

Reads only. A page goes on from the last row of the one before (keyset), so that workflows which start
meanwhile neither repeat rows nor hide any.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, literal, or_, select

from receiver.contract import ErrorCode, Stage
from tasks.records import Records
from tasks.schema import WORKFLOWS
from tasks.states import WorkflowState


class CursorRefused(ValueError):
    """The cursor is none of ours"""


@dataclass(frozen=True, kw_only=True)
class WorkflowFilter:
    """Which workflows; None means any. `since` <= created_at < `until`."""

    container_name: str | None = None
    remote_host: str | None = None
    states: tuple[WorkflowState, ...] = ()
    success: bool | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True)
class Cursor:
    """The last row of a page, by the order of the list."""

    created_at: datetime
    workflow_id: str

    def text(self) -> str:
        """For a URL; opaque to callers."""
        packed = json.dumps([self.created_at.isoformat(), self.workflow_id]).encode()
        return base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The cursor of `text()`, or `CursorRefused`."""
        try:
            unpacked = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            created_at, workflow_id = json.loads(unpacked)
            moment = datetime.fromisoformat(created_at)
        except (ValueError, TypeError, binascii.Error) as exc:
            raise CursorRefused("give next_cursor of the page before, unchanged") from exc
        if moment.tzinfo is None or not isinstance(workflow_id, str) or "\0" in workflow_id:
            raise CursorRefused("give next_cursor of the page before, unchanged")
        return cls(moment, workflow_id)


@dataclass(frozen=True, kw_only=True)
class WorkflowRow:
    """One line of the list; durations in milliseconds."""

    workflow_id: str
    deployment_id: str | None
    container_name: str
    image_tag: str
    remote_host: str
    current_state: WorkflowState
    success: bool | None
    error_code: ErrorCode | None
    error_message: str | None
    failure_stage: Stage | None
    deployed_url: str | None
    total_duration_ms: int | None
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None


_COLUMNS = [WORKFLOWS.c[item.name] for item in fields(WorkflowRow)]


async def read_page(
    records: Records, wanted: WorkflowFilter, after: Cursor | None, limit: int
) -> list[WorkflowRow]:
    """At most `limit` workflows after the cursor, newest first; raises `RecordsUnreachable`."""
    query = _filtered(select(*_COLUMNS), wanted)
    if after is not None:
        query = query.where(_older_than(after))
    ordered = query.order_by(WORKFLOWS.c.created_at.desc(), WORKFLOWS.c.workflow_id.desc())
    async with records.snapshot() as connection:
        rows = (await connection.execute(ordered.limit(limit))).all()
    return [_row_of(row) for row in rows]


async def ping(records: Records) -> str:
    """The kind of database, once it has answered; raises `RecordsUnreachable`."""
    async with records.snapshot() as connection:
        await connection.execute(select(literal(1)))
        return connection.dialect.name


_CONDITIONS: Mapping[str, Callable[[Any], ColumnElement[bool]]] = {
    "container_name": lambda name: WORKFLOWS.c.container_name == name,
    "remote_host": lambda name: WORKFLOWS.c.remote_host == name,
    "states": lambda states: WORKFLOWS.c.current_state.in_(states),
    "success": lambda success: WORKFLOWS.c.success.is_(success),
    "since": lambda moment: WORKFLOWS.c.created_at >= moment,
    "until": lambda moment: WORKFLOWS.c.created_at < moment,
}


def _filtered(query: Select[Any], wanted: WorkflowFilter) -> Select[Any]:
    given = {name: getattr(wanted, name) for name in _CONDITIONS}
    return query.where(
        *(_CONDITIONS[name](value) for name, value in given.items() if value not in (None, ()))
    )


def _older_than(cursor: Cursor) -> ColumnElement[bool]:
    created_at, workflow_id = WORKFLOWS.c.created_at, WORKFLOWS.c.workflow_id
    same_moment = and_(created_at == cursor.created_at, workflow_id < cursor.workflow_id)
    # The first condition says nothing new, but it is the one that an index can use.
    return and_(created_at <= cursor.created_at, or_(created_at < cursor.created_at, same_moment))


def _row_of(row: Row[Any]) -> WorkflowRow:
    values = dict(row._mapping)
    values["current_state"] = WorkflowState(values["current_state"])
    values["error_code"] = ErrorCode(values["error_code"]) if values["error_code"] else None
    values["failure_stage"] = Stage(values["failure_stage"]) if values["failure_stage"] else None
    return WorkflowRow(**values)
