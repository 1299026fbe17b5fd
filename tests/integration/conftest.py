"""Databases for the records: a SQLite file, and a database in a real PostgreSQL of this test session."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg  # type: ignore[import-untyped]  # it ships no types
import pytest

from tests.services import free_port, postgresql_programs, require_service

_START_SECONDS = 30
_INITDB = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
# No durability is tested here, so nothing waits for the disk.
_SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=32MB")


def _unprivileged() -> dict[str, Any]:
    """Arguments that make a subprocess run as another user when we are root, whom PostgreSQL refuses."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    account = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _wait_for_start(programs: Path, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    ask: list[str | Path] = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port), "-t", "1"]
    while subprocess.run(ask, check=False).returncode != 0:
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"PostgreSQL did not start:\n{log.read_text()}", pytrace=False)
        time.sleep(0.02)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """URL of a throwaway PostgreSQL cluster, without a database name."""
    programs = postgresql_programs()
    require_service(programs is not None, "PostgreSQL is not installed", "apt-get install -y postgresql-15")
    assert programs is not None
    # Not under tmp_path: its parents are closed to the user that PostgreSQL runs as.
    folder, port, user = Path(tempfile.mkdtemp(prefix="pg-")), free_port(), _unprivileged()
    if user:
        os.chown(folder, user["user"], user["group"])
    data, log = folder / "data", folder / "log"
    command: list[str | Path] = [
        programs / "postgres",
        "-D",
        data,
        "-k",
        folder,
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    for setting in _SETTINGS:
        command += ["-c", setting]
    try:
        subprocess.run(
            [programs / "initdb", "-D", data, *_INITDB], check=True, stdout=subprocess.DEVNULL, **user
        )
        with log.open("wb") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, **user)
        try:
            _wait_for_start(programs, port, server, log)
            yield f"postgresql://postgres@127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown: open connections do not delay it
            server.wait(timeout=_START_SECONDS)
    finally:
        shutil.rmtree(folder)


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
