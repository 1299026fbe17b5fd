"""One deployment at a time per container and host, by a lock that lives where the records live.

SQLite: a file lock beside the database, since all its users are on one machine. PostgreSQL: an advisory lock
of a session of its own, which holds between control hosts. Either is gone when its holder dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from blake3 import blake3
from prefect.concurrency.asyncio import concurrency
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import NullPool

from tasks.errors import GantryError
from tasks.records import Records
from tasks.schema import make_engine

SLOTS = "gantry-deployments"
DEFAULT_SLOTS = 5
SLOT_LEASE_SECONDS = 60
POLL_SECONDS = 1.0
SETTLING_SECONDS = 60.0
_KEEP_SECONDS = 2.0
# A holder whose machine lost its power is found out within half a minute, not after two hours.
_KEEPALIVE = "SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"


class DeploymentUnderWay(GantryError):
    """Another deployment of this container to this host is under way"""

    next_step = "Wait until it ends or cancel it; with wait_seconds this deployment waits by itself."


@asynccontextmanager
async def held_if_free(records: Records, container_name: str, remote_host: str) -> AsyncIterator[bool]:
    """Whether nobody deploys the container to the host; if so nobody else does within the block."""
    async with _held(records, f"{container_name}@{remote_host}") as is_held:
        yield is_held


@asynccontextmanager
async def settling_if_free(records: Records, container_name: str, remote_host: str) -> AsyncIterator[bool]:
    """The same for whoever ends a workflow whose run died: deployments wait for that, and are not refused."""
    async with (
        _held(records, _settling(container_name, remote_host)),
        held_if_free(records, container_name, remote_host) as is_held,
    ):
        yield is_held


def _settling(container_name: str, remote_host: str) -> str:
    return f"{container_name}@{remote_host}/settling"


@asynccontextmanager
async def _held(records: Records, name: str) -> AsyncIterator[bool]:
    key = blake3(name.encode())
    if records.url.get_backend_name() == "sqlite":
        folder = Path(f"{records.url.database}.locks")
        with _file_lock(folder / key.hexdigest()[:32]) as is_held:
            yield is_held
    else:
        number = int.from_bytes(key.digest(8), signed=True)
        async with _session_lock(records.url, number) as is_held:
            yield is_held


@asynccontextmanager
async def slot() -> AsyncIterator[None]:
    """One of the slots that all deployments share (`MAX_CONCURRENT_DEPLOYMENTS`); waits for a free one.

    The slot of a holder that died is free again when its lease ends; without the limit nobody waits.
    """
    async with concurrency(
        SLOTS, occupy=1, lease_duration=SLOT_LEASE_SECONDS, raise_on_lease_renewal_failure=False
    ):
        yield


@asynccontextmanager
async def alone(
    records: Records, container_name: str, remote_host: str, wait_seconds: float, say: Callable[[str], None]
) -> AsyncIterator[None]:
    """Be the only deployment of the container to the host; one that died is waited for while it is ended.

    Raises `DeploymentUnderWay` at once, or after `wait_seconds`, naming who holds the place since when.
    """
    began, told, is_last_look = time.monotonic(), False, False
    while True:
        async with held_if_free(records, container_name, remote_host) as is_held:
            if is_held:
                yield
                return
        holder = await _holder(records, container_name, remote_host)
        waited_seconds = time.monotonic() - began
        if waited_seconds >= wait_seconds and not (
            waited_seconds < SETTLING_SECONDS
            and await _is_being_settled(records, container_name, remote_host)
        ):
            if is_last_look:
                raise DeploymentUnderWay(holder)
            is_last_look = True  # it may have been settled between the two looks
            continue
        if not told:
            say(f"{holder}; waiting for it")
        told, is_last_look = True, False
        await asyncio.sleep(POLL_SECONDS)


async def _is_being_settled(records: Records, container_name: str, remote_host: str) -> bool:
    async with _held(records, _settling(container_name, remote_host)) as is_free:
        return not is_free


async def _holder(records: Records, container_name: str, remote_host: str) -> str:
    found = await records.recent(container_name, remote_host, limit=1, unfinished=True)
    what = f"{container_name} on {remote_host} is being deployed"
    if not found:
        return f"{what} by a run that began a moment ago"
    holder = found[0]
    since = holder.created_at.isoformat(timespec="seconds")
    return f"{what} ({holder.image_tag}, {holder.current_state}) since {since} by {holder.workflow_id}"


@contextmanager
def _file_lock(path: Path) -> Iterator[bool]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@asynccontextmanager
async def _session_lock(url: URL, number: int) -> AsyncIterator[bool]:
    engine = make_engine(url, NullPool)
    session = _Session(engine, number)
    try:
        if not await session.lock():
            yield False
            return
        keeping = asyncio.create_task(session.keep())
        try:
            yield True
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
    finally:
        await session.end()
        await engine.dispose()


class _Session:
    """A session of PostgreSQL that holds one advisory lock; taken again when the server was restarted."""

    def __init__(self, engine: AsyncEngine, number: int) -> None:
        self._engine = engine
        self._number = number
        self._connection: AsyncConnection | None = None

    async def lock(self) -> bool:
        """True when the lock is held now."""
        connection = await self._engine.connect()
        self._connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        for setting in _KEEPALIVE.split(";"):
            await self._connection.execute(text(setting))
        asked = await self._connection.execute(text("SELECT pg_try_advisory_lock(:n)"), {"n": self._number})
        return bool(asked.scalar())

    async def keep(self) -> None:
        """See that the session lives; a lock that was lost is taken again, if nobody else has it."""
        while True:
            await asyncio.sleep(_KEEP_SECONDS)
            with suppress(OSError, DBAPIError):
                if self._connection is None:
                    await self.lock()
                    continue
                try:
                    await self._connection.execute(text("SELECT 1"))
                except (OSError, DBAPIError):
                    await self.end()

    async def end(self) -> None:
        """Close the session, and with it the lock."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(OSError, DBAPIError):
                await connection.close()
