"""The control host's records: all SQL over workflows, their stages, transitions and outbox.

`advance` is the only door that changes a state: state, history and events together or not at all.
Decisions are made in `tasks.states` and `tasks.events`. Imports no Prefect and no Kafka.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

from sqlalchemy import URL, Row, Select, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from receiver.contract import DEFAULT_PORT, ErrorCode, OperationResult, QualityGate, Stage
from tasks import migrations
from tasks.errors import GantryError
from tasks.events import Event, EventType, clean_text, events_for, jsonable, redact
from tasks.schema import OUTBOX, STAGES, TRANSITION_ROWS, WORKFLOWS, WRITES, make_engine, parse_url
from tasks.states import (
    TERMINAL,
    TRIGGERS,
    Facts,
    StageResult,
    TransitionRefused,
    WorkflowRecord,
    WorkflowState,
    check_transition,
    fold,
)

__all__ = [
    "Facts",
    "NewWorkflow",
    "OutboxRow",
    "Records",
    "RecordsUnreachable",
    "StageResult",
    "StateConflict",
    "TransitionRefused",
    "TransitionRow",
    "WorkflowDiffers",
    "WorkflowEnded",
    "WorkflowRecord",
    "WorkflowState",
    "WorkflowUnknown",
    "is_away",
]

UNENDED = frozenset(WorkflowState) - TERMINAL
_Word = TypeVar("_Word", bound=StrEnum)


class RecordsUnreachable(GantryError):
    """The records database does not answer"""

    next_step = "Check DATABASE_URL, and that the database runs and accepts this user."


def is_away(exc: BaseException) -> bool:
    """True when the database did not answer, as opposed to: it refused what it was asked."""
    refused = (IntegrityError, ProgrammingError, DataError)
    return isinstance(exc, OSError) or (isinstance(exc, DBAPIError) and not isinstance(exc, refused))


class WorkflowUnknown(GantryError):
    """The records hold no such workflow"""

    next_step = (
        "Compare the id with the list of recent workflows, and DATABASE_URL with the other processes'."
    )


class WorkflowDiffers(GantryError):
    """The workflow id is taken by another deployment"""

    next_step = "Start the deployment with a new workflow id."


class StateConflict(GantryError):
    """The workflow is not in the state that the caller believes"""

    next_step = "Another process moved the workflow: read it again and go on from its actual state."

    def __init__(self, workflow_id: str, expected: WorkflowState | None, actual: WorkflowState) -> None:
        """`expected` is None when any state that is not terminal would have done."""
        super().__init__(f"Workflow {workflow_id} is {actual}, not {expected or 'under way'}")
        self.expected = expected
        self.actual = actual


class WorkflowEnded(StateConflict):
    """The workflow is in a terminal state, which never changes"""


@dataclass(frozen=True, kw_only=True)
class NewWorkflow:
    """A workflow to be recorded; `request` may hold secrets, which are masked before they are stored."""

    workflow_id: str
    container_name: str
    remote_host: str
    image_tag: str = "latest"
    remote_port: int = DEFAULT_PORT
    correlation_id: str | None = None
    flow_run_id: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TransitionRow:
    """One change of state, in the order of `sequence`."""

    workflow_id: str
    sequence: int
    from_state: WorkflowState
    to_state: WorkflowState
    reason: str
    at: datetime


@dataclass(frozen=True, kw_only=True)
class OutboxRow:
    """One event to send: `message` is the JSON text, `workflow_id` the key that keeps its order."""

    id: int
    event_id: str
    workflow_id: str
    sequence: int
    topic: str
    event_type: str
    message: str
    created_at: datetime
    sent_at: datetime | None
    attempts: int
    last_error: str | None


class Records:
    """The records of one database; share one instance per event loop, close it at the end."""

    def __init__(self, engine: AsyncEngine) -> None:
        """For `open`; a database that was not migrated fails at the first query."""
        self._engine = engine
        self._writer = engine.execution_options(**{WRITES: True})

    @classmethod
    async def open(cls, url: str) -> Self:
        """Records at `url` (`sqlite:///path`, `postgresql://...`), at the newest schema.

        Safe when several processes open a new database at once. Raises `RecordsUrlRefused`,
        `RecordsUnreachable` or `migrations.RecordsTooNew`.
        """
        parsed = parse_url(url)
        try:
            await migrations.upgrade(parsed)
        except (OSError, DBAPIError) as exc:
            where = parsed.render_as_string(hide_password=True)
            raise RecordsUnreachable(f"Cannot open the records at {where}: {exc}") from exc
        return cls(make_engine(parsed))

    @property
    def url(self) -> URL:
        """Where the records are; its string hides the password."""
        return self._engine.url

    async def close(self) -> None:
        """Give all connections back; safe to call twice."""
        await self._engine.dispose()

    async def __aenter__(self) -> Self:
        """Itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()

    async def create(self, new: NewWorkflow, *, at: datetime | None = None) -> WorkflowRecord:
        """Record a workflow in PENDING; the same id again returns the record as it stands now.

        Raises `WorkflowDiffers` when the id belongs to another container, tag or host.
        """
        now = at or datetime.now(UTC)
        async with self._writer.begin() as connection:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            row = dialect.insert(WORKFLOWS).values(**_row_of(_pending(new, now)))
            await connection.execute(row.on_conflict_do_nothing(index_elements=["workflow_id"]))
            record = await _locked(connection, new.workflow_id)
        for name in ("container_name", "image_tag", "remote_host", "remote_port"):
            held, asked = getattr(record, name), getattr(new, name)
            if held != asked:
                raise WorkflowDiffers(f"Workflow {new.workflow_id} has {name} {held!r}, not {asked!r}")
        return record

    async def advance(
        self,
        workflow_id: str,
        from_state: WorkflowState,
        to_state: WorkflowState,
        facts: Facts = Facts(),  # noqa: B008 - frozen
        *,
        at: datetime | None = None,
    ) -> list[Event]:
        """Change the state, in one transaction with its facts, history and events; returns the events.

        Raises `TransitionRefused` (not in the table), `StateConflict` (`actual` names where the workflow
        stands; a repeated call finds it in `to_state`) or `WorkflowUnknown`; then nothing was written.
        """
        check_transition(from_state, to_state)
        now = at or datetime.now(UTC)
        async with self._writer.begin() as connection:
            before = await _locked(connection, workflow_id)
            events = await _change(connection, before, from_state, to_state, facts, now)
            await connection.execute(_history(workflow_id, from_state, to_state, facts, now))
        return events

    async def note(self, workflow_id: str, facts: Facts, *, at: datetime | None = None) -> None:
        """Record facts without a change of state, in one transaction with their events.

        Raises `WorkflowEnded` in a terminal state, `WorkflowUnknown` without a record.
        """
        now = at or datetime.now(UTC)
        async with self._writer.begin() as connection:
            before = await _locked(connection, workflow_id)
            state = before.current_state
            if state.terminal:
                raise WorkflowEnded(workflow_id, None, state)
            await _change(connection, before, state, state, facts, now)

    async def get(self, workflow_id: str) -> WorkflowRecord:
        """The workflow, or `WorkflowUnknown`."""
        rows = await self._rows(select(WORKFLOWS).where(WORKFLOWS.c.workflow_id == workflow_id))
        return _record_of(rows[0] if rows else None, workflow_id)

    async def stages(self, workflow_id: str) -> list[StageResult]:
        """Results of the stages that ran, in their order."""
        query = select(STAGES).where(STAGES.c.workflow_id == workflow_id).order_by(STAGES.c.stage_number)
        return [_stage_of(row) for row in await self._rows(query)]

    async def transitions(self, workflow_id: str) -> list[TransitionRow]:
        """Changes of state, oldest first."""
        table = TRANSITION_ROWS
        query = select(table).where(table.c.workflow_id == workflow_id).order_by(table.c.sequence)
        return [_transition_of(row) for row in await self._rows(query)]

    async def outbox(self, workflow_id: str) -> list[OutboxRow]:
        """Events of one workflow, sent or not, in their order."""
        query = select(OUTBOX).where(OUTBOX.c.workflow_id == workflow_id).order_by(OUTBOX.c.sequence)
        return [OutboxRow(**row._mapping) for row in await self._rows(query)]

    async def told_attempts(self, workflow_id: str) -> int:
        """How many health attempts of the workflow were recorded, each by an event of its own."""
        is_attempt = OUTBOX.c.event_type == EventType.DEPLOYMENT_HEALTH_CHECK
        query = select(func.count()).where((OUTBOX.c.workflow_id == workflow_id) & is_attempt)
        return int((await self._rows(query))[0][0])

    async def recent(
        self,
        container_name: str | None = None,
        remote_host: str | None = None,
        limit: int = 50,
        *,
        unfinished: bool = False,
    ) -> list[WorkflowRecord]:
        """Workflows, newest first; `unfinished` keeps those that are in no terminal state."""
        query = (
            select(WORKFLOWS).order_by(WORKFLOWS.c.created_at.desc(), WORKFLOWS.c.workflow_id).limit(limit)
        )
        if container_name is not None:
            query = query.where(WORKFLOWS.c.container_name == container_name)
        if remote_host is not None:
            query = query.where(WORKFLOWS.c.remote_host == remote_host)
        if unfinished:
            # By the states that are meant, not by those that are not: only that can use the index.
            query = query.where(WORKFLOWS.c.current_state.in_(sorted(UNENDED)))
        return [_record_of(row, "") for row in await self._rows(query)]

    async def failed_since(self, moment: datetime) -> list[WorkflowRecord]:
        """Workflows that ended as FAILED at `moment` or later."""
        query = select(WORKFLOWS).where(
            WORKFLOWS.c.completed_at >= moment, WORKFLOWS.c.current_state == WorkflowState.FAILED
        )
        return [_record_of(row, "") for row in await self._rows(query)]

    async def of_deployments(self, deployment_ids: Iterable[str]) -> dict[str, WorkflowRecord]:
        """Workflows by the host's deployment id; those that are not recorded are left out."""
        query = select(WORKFLOWS).where(WORKFLOWS.c.deployment_id.in_(list(deployment_ids)))
        found = [_record_of(row, "") for row in await self._rows(query)]
        return {record.deployment_id: record for record in found if record.deployment_id}

    async def of_correlation(self, correlation_id: str) -> list[WorkflowRecord]:
        """Workflows that belong together, oldest first."""
        query = select(WORKFLOWS).where(WORKFLOWS.c.correlation_id == correlation_id)
        return [_record_of(row, "") for row in await self._rows(query.order_by(WORKFLOWS.c.created_at))]

    async def found(self, workflow_ids: Iterable[str]) -> dict[str, WorkflowRecord]:
        """Workflows by id; those that are not recorded are left out."""
        query = select(WORKFLOWS).where(WORKFLOWS.c.workflow_id.in_(list(workflow_ids)))
        return {row.workflow_id: _record_of(row, "") for row in await self._rows(query)}

    async def unsent(self, limit: int) -> list[OutboxRow]:
        """Events not sent yet, oldest first; the events of one workflow come in their order."""
        query = select(OUTBOX).where(OUTBOX.c.sent_at.is_(None)).order_by(OUTBOX.c.id).limit(limit)
        return [OutboxRow(**row._mapping) for row in await self._rows(query)]

    async def mark_sent(self, ids: Iterable[int], at: datetime) -> None:
        """The broker has these events (`OutboxRow.id`); those marked before keep their time."""
        chosen = OUTBOX.c.id.in_(list(ids)) & OUTBOX.c.sent_at.is_(None)
        values = {"sent_at": at, "attempts": OUTBOX.c.attempts + 1, "last_error": None}
        async with self._writer.begin() as connection:
            await connection.execute(update(OUTBOX).where(chosen).values(values))

    async def mark_unsent(self, ids: Iterable[int], error: str) -> None:
        """Sending these events failed: count the attempt and keep the error; they stay unsent."""
        chosen = OUTBOX.c.id.in_(list(ids)) & OUTBOX.c.sent_at.is_(None)
        values = {"attempts": OUTBOX.c.attempts + 1, "last_error": clean_text(error)}
        async with self._writer.begin() as connection:
            await connection.execute(update(OUTBOX).where(chosen).values(values))

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A reading transaction whose queries all see one moment, for aggregates over several tables.

        Raises `RecordsUnreachable`.
        """
        engine = self._engine
        if engine.dialect.name == "postgresql":  # each query there would see a moment of its own
            engine = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        try:
            async with engine.begin() as connection:
                yield connection
        except (OSError, DBAPIError) as exc:
            raise RecordsUnreachable(f"The records do not answer: {exc}") from exc

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A writing transaction for the upkeep of the tables, all or nothing; states go by `advance` only."""
        async with self._writer.begin() as connection:
            yield connection

    async def _rows(self, query: Select[Any]) -> list[Row[Any]]:
        async with self._engine.begin() as connection:
            return list((await connection.execute(query)).all())


async def _locked(connection: AsyncConnection, workflow_id: str) -> WorkflowRecord:
    """The workflow, locked until the transaction ends (SQLite: the whole database already is)."""
    query = select(WORKFLOWS).where(WORKFLOWS.c.workflow_id == workflow_id).with_for_update()
    return _record_of((await connection.execute(query)).one_or_none(), workflow_id)


async def _change(
    connection: AsyncConnection,
    before: WorkflowRecord,
    from_state: WorkflowState,
    to_state: WorkflowState,
    facts: Facts,
    at: datetime,
) -> list[Event]:
    """Compare-and-set the workflow's row, then write the stage and the events."""
    events = events_for(before, from_state, to_state, facts, at=at, new_id=lambda: str(uuid4()))
    after = _row_of(fold(before, to_state, facts, at)) | {
        "event_sequence": before.event_sequence + len(events)
    }
    in_from_state = (WORKFLOWS.c.workflow_id == before.workflow_id) & (
        WORKFLOWS.c.current_state == from_state
    )
    changed = await connection.execute(update(WORKFLOWS).where(in_from_state).values(after))
    if changed.rowcount != 1:
        raise StateConflict(before.workflow_id, from_state, before.current_state)
    if facts.stage is not None:
        await _put_stage(connection, before.workflow_id, facts.stage)
    if events:
        rows = [
            {"event_id": e.event_id, "workflow_id": e.workflow_id, "sequence": e.sequence, "attempts": 0}
            | {"topic": e.topic, "event_type": e.event_type, "message": e.message(), "created_at": at}
            for e in events
        ]
        await connection.execute(insert(OUTBOX), rows)
    return events


def _history(
    workflow_id: str, from_state: WorkflowState, to_state: WorkflowState, facts: Facts, at: datetime
) -> Any:
    """The row of the transition; its number is the next one, which the workflow's lock keeps free."""
    table = TRANSITION_ROWS
    count = select(func.count()).where(table.c.workflow_id == workflow_id).scalar_subquery()
    return insert(table).values(
        workflow_id=workflow_id,
        sequence=count + 1,
        from_state=from_state.value,
        to_state=to_state.value,
        reason=clean_text(facts.reason or TRIGGERS[from_state, to_state]),
        at=at,
    )


async def _put_stage(connection: AsyncConnection, workflow_id: str, result: StageResult) -> None:
    """Insert the stage's result, or replace the one of an earlier try."""
    values = {
        "stage_name": result.stage.value,
        "success": result.success,
        "duration_ms": result.duration_ms,
        "operations": jsonable(result.operations),
        "gates": jsonable(result.gates),
        "artifacts": jsonable(result.artifacts),
        "error_code": jsonable(result.error_code),
        "error_message": jsonable(result.error_message),
        "started_at": result.started_at,
        "completed_at": result.completed_at,
    }
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    row = dialect.insert(STAGES).values(workflow_id=workflow_id, stage_number=result.stage.number, **values)
    keys = ["workflow_id", "stage_number"]
    await connection.execute(row.on_conflict_do_update(index_elements=keys, set_=values))


def _pending(new: NewWorkflow, at: datetime) -> WorkflowRecord:
    return WorkflowRecord(
        workflow_id=new.workflow_id,
        correlation_id=new.correlation_id or new.workflow_id,
        container_name=new.container_name,
        image_tag=new.image_tag,
        remote_host=new.remote_host,
        remote_port=new.remote_port,
        current_state=WorkflowState.PENDING,
        created_at=at,
        updated_at=at,
        request=redact(new.request),
        flow_run_id=new.flow_run_id,
    )


def _row_of(record: WorkflowRecord) -> dict[str, Any]:
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return {name: value if isinstance(value, datetime) else jsonable(value) for name, value in values.items()}


def _record_of(row: Row[Any] | None, workflow_id: str) -> WorkflowRecord:
    if row is None:
        raise WorkflowUnknown(f"The records hold no workflow {workflow_id!r}")
    values = dict(row._mapping)
    return WorkflowRecord(
        **values
        | {
            "current_state": WorkflowState(values["current_state"]),
            "stages_completed": tuple(Stage(name) for name in values["stages_completed"]),
            "stages_failed": tuple(Stage(name) for name in values["stages_failed"]),
            "error_code": _optional(ErrorCode, values["error_code"]),
            "failure_stage": _optional(Stage, values["failure_stage"]),
        }
    )


def _stage_of(row: Row[Any]) -> StageResult:
    names = ("success", "duration_ms", "artifacts", "error_message", "started_at", "completed_at")
    return StageResult(
        stage=Stage(row.stage_name),
        operations=tuple(OperationResult.model_validate(item) for item in row.operations),
        gates=tuple(QualityGate.model_validate(item) for item in row.gates),
        error_code=_optional(ErrorCode, row.error_code),
        **{name: row._mapping[name] for name in names},
    )


def _transition_of(row: Row[Any]) -> TransitionRow:
    values = {name: value for name, value in row._mapping.items() if name != "id"}
    states = {name: WorkflowState(values[name]) for name in ("from_state", "to_state")}
    return TransitionRow(**values | states)


def _optional(kind: type[_Word], value: str | None) -> _Word | None:
    return kind(value) if value is not None else None
