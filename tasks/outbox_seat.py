"""Who relays: one at a time for one database; and how it hears at once that there may be a new event.

Owns the lock and the watch. Reads no row of the outbox and knows nothing of Kafka.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import NullPool

from tasks.errors import GantryError
from tasks.schema import make_engine

_ADVISORY_LOCK = 0x47414E58  # any number, the same in every relay, and not the one of the migrations


class SeatLost(GantryError):
    """The connection that held the relay's lock broke"""

    next_step = "Check that the records database runs; the relay takes its place again by itself."


class Seat(Protocol):
    """The relay's place at one database."""

    poll_seconds: float

    async def take(self) -> bool:
        """True when this relay holds the place (from now on, or still); False when another one does."""

    async def changed(self) -> bool:
        """True when anything may have been written since the last call; cheap. Raises `SeatLost`."""

    async def leave(self) -> None:
        """Give the place up; the end of the process does so too."""


def seat_at(url: URL) -> Seat:
    """The place at the database of `url`."""
    if url.get_backend_name() == "sqlite":
        return SqliteSeat(Path(str(url.database)))
    return PostgresSeat(url)


class SqliteSeat:
    """A lock file beside the database; the kernel frees it when its process dies."""

    poll_seconds = 0.1

    def __init__(self, database: Path) -> None:
        self._path = database
        self._lock: int | None = None  # a file descriptor
        self._database: sqlite3.Connection | None = None
        self._version: int | None = None

    async def take(self) -> bool:
        """One system call."""
        if self._lock is None:
            self._lock = os.open(f"{self._path}.relay-lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def changed(self) -> bool:
        """SQLite's own count of changes by other connections, from shared memory: microseconds."""
        try:
            if self._database is None:
                self._database = sqlite3.connect(self._path, timeout=0)
            (version,) = self._database.execute("PRAGMA data_version").fetchone()
        except sqlite3.OperationalError:
            return True  # busy, or worse: who reads next finds out
        before, self._version = self._version, version
        return bool(version != before)

    async def leave(self) -> None:
        """Close both."""
        if self._database is not None:
            self._database.close()
        if self._lock is not None:
            os.close(self._lock)
        self._database = self._lock = self._version = None


class PostgresSeat:
    """A session's advisory lock; the server frees it when the connection ends."""

    poll_seconds = 0.2

    def __init__(self, url: URL) -> None:
        self._engine = make_engine(url, NullPool).execution_options(isolation_level="AUTOCOMMIT")
        self._connection: AsyncConnection | None = None
        self._snapshot: str | None = None

    async def take(self) -> bool:
        """One round trip."""
        return bool(await self._ask(f"SELECT pg_try_advisory_lock({_ADVISORY_LOCK})"))

    async def changed(self) -> bool:
        """By the transactions that are visible: the same ones as before hold no new row."""
        snapshot = str(await self._ask("SELECT CAST(txid_current_snapshot() AS text)"))
        before, self._snapshot = self._snapshot, snapshot
        return snapshot != before

    async def leave(self) -> None:
        """Close the connection, and the lock with it."""
        connection, self._connection, self._snapshot = self._connection, None, None
        if connection is not None:
            with suppress(DBAPIError, OSError):  # broken already
                await connection.close()

    async def _ask(self, query: str) -> object:
        try:
            if self._connection is None:
                self._connection = await self._engine.connect()
            return (await self._connection.execute(text(query))).scalar_one()
        except (DBAPIError, OSError) as exc:
            await self.leave()
            raise SeatLost(f"The records database does not answer: {exc}") from exc
