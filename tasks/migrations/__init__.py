"""Brings a records database to the newest schema, from inside the program, safe in several processes.

Owns the Alembic scripts beside it. Alembic is imported only when there is something to do.
"""

from __future__ import annotations

import asyncio
import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, inspect, text
from sqlalchemy.pool import NullPool

from tasks.errors import GantryError
from tasks.schema import HEAD_REVISION, WRITES, make_engine

SCRIPTS = Path(__file__).parent
_ADVISORY_LOCK = 0x47414E54  # any number, the same in every process that migrates
_ALEMBIC = threading.Lock()  # Alembic keeps the running migration in module globals


class RecordsTooNew(GantryError):
    """The records database was written by a newer version of this program"""

    next_step = "Install the newer version here too, or point DATABASE_URL at another database."


async def upgrade(url: URL) -> None:
    """Create or upgrade the tables of `url`; returns when they are at `HEAD_REVISION`.

    Raises `RecordsTooNew` for a database that a newer version migrated.
    """
    await asyncio.to_thread(_upgrade_alone, url)


async def revision(url: URL) -> str | None:
    """The revision that the tables of `url` are at; None where there are none. Changes nothing."""
    engine = make_engine(url, NullPool)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(_revision)
    finally:
        await engine.dispose()


def _upgrade_alone(url: URL) -> None:
    with _ALEMBIC, _only_opener(url):
        asyncio.run(_upgrade(url))


@contextmanager
def _only_opener(url: URL) -> Iterator[None]:
    """SQLite: one process at a time. Its switch to WAL mode does not always wait for another one's."""
    if url.get_backend_name() != "sqlite":
        yield
        return
    lock = Path(f"{url.database}.migrate-lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


async def _upgrade(url: URL) -> None:
    engine = make_engine(url, NullPool)
    try:
        if url.get_backend_name() == "sqlite":
            async with engine.connect() as connection:
                raw = await connection.get_raw_connection()
                await raw.driver_connection.execute("PRAGMA journal_mode = WAL")  # type: ignore[union-attr]
        async with engine.execution_options(**{WRITES: True}).begin() as connection:
            await connection.run_sync(_to_head)
    finally:
        await engine.dispose()


def _to_head(connection: Connection) -> None:
    if _revision(connection) == HEAD_REVISION:
        return
    if connection.dialect.name == "postgresql":  # SQLite's immediate transaction is a lock already
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    _run_alembic(connection)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _run_alembic(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    try:
        command.upgrade(config, "head")
    except CommandError as exc:
        raise RecordsTooNew(f"The records database cannot be migrated: {exc}") from exc
