"""Databases for the records: a SQLite file, and a database in a real PostgreSQL of this test session."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg  # type: ignore[import-untyped]  # it ships no types
import pytest

from tests.postgresql import Cluster
from tests.services import free_port

_STOP_SECONDS = 30


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """URL of a throwaway PostgreSQL cluster, without a database name."""
    cluster = Cluster.make(free_port())
    try:
        log = cluster.folder / "log"
        with log.open("wb") as output:
            server = subprocess.Popen(cluster.command, stdout=output, stderr=output, cwd=cluster.folder)
        try:
            cluster.wait(lambda: server.poll() is None, log)
            yield cluster.url
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown: open connections do not delay it
            server.wait(timeout=_STOP_SECONDS)
    finally:
        cluster.remove()


@pytest.fixture
async def postgresql_url(postgresql_server: str) -> AsyncIterator[str]:
    """URL of a new, empty PostgreSQL database."""
    name = f"t{uuid4().hex}"
    admin = await asyncpg.connect(f"{postgresql_server}/postgres")
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        yield f"{postgresql_server}/{name}"
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'records.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def records_url(request: pytest.FixtureRequest) -> str:
    """URL of a new, empty database; every test that takes it runs on both kinds."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
