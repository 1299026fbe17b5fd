"""What the records, the outbox, the ledger and the engine say; nothing here changes anything."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # it ships no types

from deployments import lab_cgroups
from deployments.lab import Host, Lab
from deployments.lab_teardown import WORK
from receiver.contract import LABEL_CONTAINER, LABEL_WORKFLOW

POSTGRESQL_PORT = 5432


def home(lab: Lab) -> Path:
    """GANTRY_HOME of the control side."""
    return Path(lab.environment["GANTRY_HOME"])


def query(database: Path, sql: str, *values: object) -> list[dict[str, Any]] | None:
    """Rows; none from a database that is not there, None from one that is busy."""
    if not database.exists():
        return []
    connection = sqlite3.connect(database, timeout=1)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute(sql, values)]
    except sqlite3.OperationalError:
        return None
    finally:
        connection.close()


def records(lab: Lab, sql: str, *values: object) -> list[dict[str, Any]] | None:
    """Rows of the control side's records, in whichever of its databases there are any."""
    rows = query(home(lab) / "records.db", sql, *values)
    return asyncio.run(_query_postgresql(lab, sql, values)) if rows == [] else rows


def postgresql(lab: Lab) -> Path:
    """A link to the folder of the PostgreSQL cluster of the control side, if it has one."""
    return lab.state_dir / "postgresql"


async def _query_postgresql(lab: Lab, sql: str, values: Sequence[object]) -> list[dict[str, Any]] | None:
    """Rows; none where no cluster was ever started or there is no table yet, None from one that is down."""
    if not (postgresql(lab) / "data" / "postmaster.opts").exists():
        return []
    for number in range(1, len(values) + 1):
        sql = sql.replace("?", f"${number}", 1)
    try:
        folder = str(postgresql(lab).resolve())
        connection = await asyncpg.connect(
            host=folder, port=POSTGRESQL_PORT, user="postgres", database="postgres"
        )
    except (OSError, asyncpg.PostgresError):
        return None
    try:
        return [dict(row) for row in await connection.fetch(sql, *values)]
    except asyncpg.UndefinedTableError:
        return []
    finally:
        await connection.close()


def workflow(lab: Lab, run_id: str) -> dict[str, Any] | None:
    """The workflow of a run; empty when none was begun, None when it cannot be asked now."""
    rows = records(lab, "SELECT * FROM workflow_executions WHERE workflow_id = ?", run_id)
    return None if rows is None else (rows[0] if rows else {})


def ledger(host: Host, container: str) -> list[dict[str, Any]]:
    """The host's own entries of a container, oldest first."""
    database = Path(host.environment["HOOK_RECEIVER_STATE_DIR"]) / "ledger.sqlite3"
    columns = "deployment_id, workflow_id, state"
    sql = f"SELECT {columns} FROM deployments WHERE container_name = ? ORDER BY created_at"  # noqa: S608
    return query(database, sql, container) or []


@dataclass(frozen=True)
class Running:
    """A container of ours as the engine has it."""

    id: str
    name: str
    image_id: str
    workflow_id: str
    is_running: bool


@dataclass(frozen=True)
class OnHost:
    """What a host's engine has of one container name: containers, and images with their bytes."""

    containers: tuple[Running, ...]
    images: dict[str, int]


def on_host(host: Host, container: str) -> OnHost:
    """What the engine has now; raises what the engine's client raises."""
    client = host.docker()
    try:
        wanted = {"label": f"{LABEL_CONTAINER}={container}"}
        found = client.api.containers(all=True, filters=wanted)
        images = client.api.images(filters=wanted)
    finally:
        client.close()
    return OnHost(
        tuple(
            Running(
                id=each["Id"],
                name=each["Names"][0].lstrip("/") if each["Names"] else "",
                image_id=each["ImageID"],
                workflow_id=each["Labels"].get(LABEL_WORKFLOW, ""),
                is_running=each["State"] == "running",
            )
            for each in found
        ),
        {each["Id"]: each["Size"] for each in images},
    )


def held_locks(folder: Path) -> list[str]:
    """Names of the files in `folder` that some process holds a lock on."""
    names = {_lock_id(path): path.name for path in folder.glob("*") if path.is_file()}
    held = {line.split()[5] for line in _lock_lines()}
    return sorted(name for lock_id, name in names.items() if lock_id in held)


def _lock_id(path: Path) -> str:
    """How the kernel names a file: major and minor number of its device in hexadecimal, and its inode."""
    found = path.stat()
    return f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"


def _lock_lines() -> list[str]:
    """Those that hold; a line with an arrow waits."""
    return [line for line in Path("/proc/locks").read_text().splitlines() if "->" not in line]


def processes_of_run(run_id: str) -> list[int]:
    """Processes that work on a flow run, by the variable that its worker gave them."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if _flow_run_of(pid) == run_id]


def flow_processes(host: Host) -> list[int]:
    """Processes of all flow runs on a host."""
    return [pid for pid in _members(host.cgroup + WORK) if _flow_run_of(pid)]


def _members(group: str) -> Iterator[int]:
    for folder in lab_cgroups.folders(group):
        yield from map(int, (folder / "cgroup.procs").read_text().split())


def _flow_run_of(pid: int) -> str:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile
        return ""
    name = b"PREFECT__FLOW_RUN_ID="
    return next((each.removeprefix(name).decode() for each in variables if each.startswith(name)), "")
