"""The tables of the records, and how a database of them is opened.

Owns the metadata that the migrations must arrive at, the column types that hold on SQLite and
PostgreSQL alike, and the connection settings. Rows are read and written in `tasks.records` only.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    event,
    make_url,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import Pool

from tasks.errors import GantryError
from tasks.states import TRANSITIONS, WorkflowState

HEAD_REVISION = "0002"
CURRENT_STATE_CHECK = "ck_workflow_executions_current_state"
OUTCOME_CHECK = "ck_workflow_executions_outcome"
TRANSITION_CHECK = "ck_workflow_transitions_allowed"
STAGE_UNIQUE = "uq_workflow_stage_results_workflow_stage"
TRANSITION_UNIQUE = "uq_workflow_transitions_workflow_sequence"
EVENT_UNIQUE = "uq_event_outbox_workflow_sequence"
EVENT_ID_UNIQUE = "uq_event_outbox_event_id"
BUSY_TIMEOUT_MS = 30_000
# The specification's upper bounds of the histograms. The totals below hold a column for each, so a change
# of bounds needs a migration.
DURATION_BOUNDS_MS = (15_000, 30_000, 60_000, 120_000, 180_000)
STAGE_BOUNDS_MS = (5_000, 10_000, 15_000, 30_000, 60_000)
IMAGE_BOUNDS_BYTES = (10**7, 10**8, 5 * 10**8, 10**9, 2 * 10**9)
WRITES = "gantry_writes"

# What belongs in the outcome columns of each kind of state; the migration has the same text.
OUTCOME_RULE = (
    "(current_state = 'COMPLETED' AND success IS NOT NULL AND success AND completed_at IS NOT NULL)"
    " OR (current_state IN ('ROLLBACK_COMPLETED', 'FAILED')"
    " AND success IS NOT NULL AND NOT success AND completed_at IS NOT NULL)"
    " OR (current_state NOT IN ('COMPLETED', 'ROLLBACK_COMPLETED', 'FAILED')"
    " AND success IS NULL AND completed_at IS NULL)"
)


class RecordsUrlRefused(GantryError):
    """The records' database URL cannot be used"""

    next_step = "Set DATABASE_URL to 'sqlite:////path/to/records.db' or 'postgresql://user@host/name'."


class UtcDateTime(TypeDecorator[datetime]):
    """Aware in, UTC out; SQLite itself keeps no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC; a naive time is refused, since its zone would be a guess."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; use datetime.now(UTC)")
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


def _allowed_pairs() -> str:
    sources = [state for state in WorkflowState if any(state == source for source, _ in TRANSITIONS)]
    return " OR ".join(
        f"(from_state = '{source}' AND "
        + _one_of("to_state", [state for state in WorkflowState if (source, state) in TRANSITIONS])
        + ")"
        for source in sources
    )


_BIG_KEY = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers only INTEGER keys by itself
_JSON = JSON(none_as_null=True).with_variant(
    JSONB(none_as_null=True),  # type: ignore[no-untyped-call]  # in SQLAlchemy 2.0 only
    "postgresql",
)
METADATA = MetaData()


def _workflow_column() -> Column[str]:
    return Column("workflow_id", Text, ForeignKey("workflow_executions.workflow_id"), nullable=False)


WORKFLOWS = Table(
    "workflow_executions",
    METADATA,
    Column("workflow_id", Text, primary_key=True),
    Column("correlation_id", Text, nullable=False),
    Column("deployment_id", Text),
    Column("container_name", Text, nullable=False),
    Column("image_tag", Text, nullable=False),
    Column("remote_host", Text, nullable=False),
    Column("remote_port", Integer, nullable=False),
    Column("current_state", Text, nullable=False),
    Column("stages_completed", _JSON, nullable=False),
    Column("stages_failed", _JSON, nullable=False),
    Column("total_duration_ms", BigInteger),
    Column("success", Boolean),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("failure_stage", Text),
    Column("retry_count", Integer, nullable=False),
    Column("container_id", Text),
    Column("image_id", Text),
    Column("image_size_bytes", BigInteger),
    Column("deployed_url", Text),
    Column("health_status", _JSON),
    Column("deployment_metrics", _JSON),
    Column("rollback_performed", Boolean, nullable=False),
    Column("rollback_result", _JSON),
    Column("request", _JSON, nullable=False),
    Column("flow_run_id", Text),
    Column("event_sequence", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("completed_at", UtcDateTime),
    CheckConstraint(_one_of("current_state", WorkflowState), name=CURRENT_STATE_CHECK),
    CheckConstraint(OUTCOME_RULE, name=OUTCOME_CHECK),
    Index("ix_workflow_executions_container", "container_name", "remote_host", "created_at"),
    Index("ix_workflow_executions_container_name", "container_name", "created_at"),
    Index("ix_workflow_executions_remote_host", "remote_host", "created_at"),
    Index("ix_workflow_executions_state", "current_state", "created_at"),
    Index("ix_workflow_executions_created_at", "created_at"),
    Index("ix_workflow_executions_completed_at", "completed_at"),
    # Everything that the metrics read: the rows themselves are wide, and are not touched.
    Index(
        "ix_workflow_executions_metrics",
        *("container_name", "remote_host", "current_state", "failure_stage", "rollback_performed"),
        *("total_duration_ms", "image_size_bytes", "created_at", "workflow_id"),
    ),
)

STAGES = Table(
    "workflow_stage_results",
    METADATA,
    Column("id", _BIG_KEY, primary_key=True, autoincrement=True),
    _workflow_column(),
    Column("stage_number", Integer, nullable=False),
    Column("stage_name", Text, nullable=False),
    Column("success", Boolean, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("operations", _JSON, nullable=False),
    Column("gates", _JSON, nullable=False),
    Column("artifacts", _JSON, nullable=False),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("started_at", UtcDateTime, nullable=False),
    Column("completed_at", UtcDateTime, nullable=False),
    UniqueConstraint("workflow_id", "stage_number", name=STAGE_UNIQUE),
    Index("ix_workflow_stage_results_metrics", "workflow_id", "stage_name", "duration_ms"),
)

TRANSITION_ROWS = Table(
    "workflow_transitions",
    METADATA,
    Column("id", _BIG_KEY, primary_key=True, autoincrement=True),
    _workflow_column(),
    Column("sequence", Integer, nullable=False),
    Column("from_state", Text, nullable=False),
    Column("to_state", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    CheckConstraint(_allowed_pairs(), name=TRANSITION_CHECK),
    UniqueConstraint("workflow_id", "sequence", name=TRANSITION_UNIQUE),
)

OUTBOX = Table(
    "event_outbox",
    METADATA,
    Column("id", _BIG_KEY, primary_key=True, autoincrement=True),
    Column("event_id", Text, nullable=False),
    _workflow_column(),
    Column("sequence", Integer, nullable=False),
    Column("topic", Text, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("sent_at", UtcDateTime),
    Column("attempts", Integer, nullable=False),
    Column("last_error", Text),
    UniqueConstraint("event_id", name=EVENT_ID_UNIQUE),
    UniqueConstraint("workflow_id", "sequence", name=EVENT_UNIQUE),
    sqlite_autoincrement=True,
)
Index(
    "ix_event_outbox_unsent",
    OUTBOX.c.id,
    postgresql_where=OUTBOX.c.sent_at.is_(None),
    sqlite_where=OUTBOX.c.sent_at.is_(None),
)
Index(
    "ix_event_outbox_sent",
    OUTBOX.c.sent_at,
    postgresql_where=OUTBOX.c.sent_at.is_not(None),
    sqlite_where=OUTBOX.c.sent_at.is_not(None),
)


def histogram_columns(measure: str, bounds: Iterable[int]) -> list[str]:
    """Names of a histogram's columns: how many, their sum, and how many were at most each bound."""
    name, _, unit = measure.rpartition("_")
    return [f"{name}_count", f"{name}_sum_{unit}", *(f"{name}_within_{bound}_{unit}" for bound in bounds)]


def _histogram(measure: str, bounds: Iterable[int]) -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=False) for name in histogram_columns(measure, bounds)]


# What pruned workflows and stages add to the metrics, so that no counter ever goes backwards.
WORKFLOW_TOTALS = Table(
    "pruned_workflow_totals",
    METADATA,
    Column("container_name", Text, primary_key=True),
    Column("remote_host", Text, primary_key=True),
    Column("current_state", Text, primary_key=True),
    Column("failure_stage", Text, primary_key=True),
    Column("rollback_performed", Boolean, primary_key=True),
    Column("first_created_at", UtcDateTime, nullable=False),
    Column("workflows", BigInteger, nullable=False),
    *_histogram("duration_ms", DURATION_BOUNDS_MS),
    *_histogram("image_bytes", IMAGE_BOUNDS_BYTES),
)
STAGE_TOTALS = Table(
    "pruned_stage_totals",
    METADATA,
    Column("container_name", Text, primary_key=True),
    Column("stage_name", Text, primary_key=True),
    *_histogram("duration_ms", STAGE_BOUNDS_MS),
)

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
}


def parse_url(url: str) -> URL:
    """The URL with its async driver; `RecordsUrlRefused` for other databases and for one in memory."""
    try:
        parsed = make_url(url)
    except ArgumentError as exc:
        # The text itself stays out of the message: it may hold a password.
        raise RecordsUrlRefused("The records' database URL cannot be parsed") from exc
    driver = _DRIVERS.get(parsed.drivername, parsed.drivername)
    if driver not in _DRIVERS.values():
        raise RecordsUrlRefused(f"The records do not speak {parsed.drivername!r}")
    if driver == "sqlite+aiosqlite":
        _check_file(parsed)
    elif "sslmode" in parsed.query:  # libpq's word; asyncpg calls it ssl
        asked = parsed.query["sslmode"]
        mode = asked if isinstance(asked, str) else list(asked)
        parsed = parsed.difference_update_query(["sslmode"]).update_query_dict({"ssl": mode})
    return parsed.set(drivername=driver)


def _check_file(url: URL) -> None:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise RecordsUrlRefused("The records need a database file: one in memory dies with its process")


def make_engine(url: URL, poolclass: type[Pool] | None = None) -> AsyncEngine:
    """An engine whose connections wait for locks, check foreign keys and, on SQLite, write immediately."""
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = create_async_engine(url, poolclass=poolclass)
        event.listen(engine.sync_engine, "connect", _configure_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    arguments = {
        "timeout": 10,
        "command_timeout": 60,
        "server_settings": {"application_name": "gantry"},
        "async_creator_fn": _connect_postgresql,
    }
    return create_async_engine(url, poolclass=poolclass, pool_pre_ping=True, connect_args=arguments)


async def _connect_postgresql(*arguments: Any, **named: Any) -> Any:
    """A server that lets nobody in is away, be it starting, full, or without that database."""
    import asyncpg  # type: ignore[import-untyped]  # no types; and not needed by records in SQLite

    try:
        return await asyncpg.connect(*arguments, **named)
    except asyncpg.PostgresError as exc:
        raise ConnectionError(str(exc)) from exc


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN is deferred; ours is below
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that reads before it writes fails at once when another one wrote between;
    # an immediate one waits its turn. Readers stay deferred, so they never wait in WAL mode.
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
