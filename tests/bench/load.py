"""What deployments cost: requests to the Prefect server, rows in the databases, bytes to a host, memory.

Counted on a lab whose Prefect server writes an access log: once while nothing is deployed, once around one
deployment by a fleet of one host.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments import lab_cgroups, lab_prefect
from deployments.lab import Control, Lab, Node
from deployments.lab_processes import Service
from deployments.lab_teardown import WORK
from tests.e2e.deploying import in_control, wait_for
from tests.services import postgresql_programs

IDLE_SECONDS = 60.0
POLL_SECONDS = 10.0
_REQUEST = re.compile(r'"([A-Z]+) (/\S*) HTTP')
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")


_ASK = """
import asyncio, sys, time
from prefect.client.orchestration import get_client

async def ask(until):
    asked = 0
    async with get_client() as client:
        while time.monotonic() < until:
            await client.get_scheduled_flow_runs_for_work_pool("host-1")
            asked += 1
    return asked

async def main(seconds):
    found = await asyncio.gather(*(ask(time.monotonic() + seconds) for _ in range(8)))
    print(sum(found) / seconds)

asyncio.run(main(float(sys.argv[1])))
"""


@dataclass(frozen=True)
class Load:
    """Everything that SCALING.md calculates with."""

    workers: int
    idle_requests_per_second: float
    requests: Mapping[str, int]
    prefect_rows: Mapping[str, int]
    prefect_bytes: int
    records_rows: Mapping[str, int]
    records_bytes: int
    bytes_to_host: int
    bytes_from_host: int
    idle_bytes_per_second: float
    memory_mb: Mapping[str, float]
    cpu_seconds: Mapping[str, float]
    polls_per_second: float


def measure_load(lab: Lab, deploy: Callable[[], object]) -> Load:
    """Count while nothing happens, and then what `deploy` adds to that."""
    log = _with_access_log(lab)
    host = next(iter(lab.hosts.values()))
    device = host.link.control_device
    wait_for(lambda: _requests(log), "the access log", seconds=60)
    start, quiet, rested = _requests(log), _traffic(lab.control, device), _cpu(lab)
    time.sleep(IDLE_SECONDS)
    idle, heard = _requests(log) - start, _traffic(lab.control, device)
    idle_cpu = {name: used - rested[name] for name, used in _cpu(lab).items()}
    rows, recorded = _prefect_rows(lab), _records_rows(lab)
    sizes = _prefect_bytes(lab), _records_bytes(lab)
    before, traffic, spent = _requests(log), _traffic(lab.control, device), _cpu(lab)
    began = time.monotonic()
    with _largest_run(lab) as largest:
        deploy()
    seconds = time.monotonic() - began
    passed = [after - at for after, at in zip(_traffic(lab.control, device), traffic, strict=True)]
    background = seconds / IDLE_SECONDS
    return Load(
        workers=1 + len(lab.hosts),
        idle_requests_per_second=idle.total() / IDLE_SECONDS,
        requests=_beyond(_requests(log) - before, idle, background),
        prefect_rows=_growth(_prefect_rows(lab), rows),
        prefect_bytes=_prefect_bytes(lab) - sizes[0],
        records_rows=_growth(_records_rows(lab), recorded),
        records_bytes=_records_bytes(lab) - sizes[1],
        bytes_to_host=passed[0],
        bytes_from_host=passed[1],
        idle_bytes_per_second=(sum(heard) - sum(quiet)) / IDLE_SECONDS,
        memory_mb={
            **{name: _resident_mb(service.process.pid) for name, service in _services(lab).items()},
            "a run on the control host": largest[0],
        },
        cpu_seconds={
            name: used - spent[name] - idle_cpu[name] * background for name, used in _cpu(lab).items()
        },
        polls_per_second=_polls_per_second(lab),
    )


def _with_access_log(lab: Lab) -> Path:
    """Start the server again, with a line for each request; where its log is."""
    control = lab.control
    control.services["server"].stop()
    command = lab_prefect.server_command(lab.python, control.listen_address, control.server_port)
    settings = {**lab_prefect.server_settings(), "PREFECT_SERVER_LOGGING_LEVEL": "INFO"}
    server = control.spawn("server", *command, env=settings)
    url = f"{control.environment['PREFECT_API_URL']}/health"
    wait_for(lambda: _answers(control, url), "the Prefect server", seconds=90)
    return server.log


def _answers(control: Control, url: str) -> bool:
    try:
        return control.get(url).status == 200
    except OSError:
        return False


def _requests(log: Path) -> Counter[str]:
    return Counter(
        f"{method} {_ID.sub('ID', path.partition('?')[0])}"
        for method, path in _REQUEST.findall(log.read_text(errors="replace"))
    )


def _beyond(found: Counter[str], idle: Counter[str], background: float) -> dict[str, int]:
    """Requests beyond those that would have come anyway."""
    more = {name: count - round(idle[name] * background) for name, count in found.items()}
    return {name: count for name, count in more.items() if count > 0}


def _growth(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: more for name, count in after.items() if (more := count - before.get(name, 0)) > 0}


def _psql(lab: Lab, sql: str) -> list[str]:
    programs, url = postgresql_programs(), lab.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert programs is not None
    return lab.control.run(
        str(programs / "psql"), url.replace("+asyncpg", ""), "-At", "-c", sql
    ).stdout.split()


def _prefect_rows(lab: Lab) -> dict[str, int]:
    names = _psql(lab, "SELECT relname FROM pg_stat_user_tables WHERE schemaname = 'public'")
    return {name: int(_psql(lab, f'SELECT count(*) FROM "{name}"')[0]) for name in names}  # noqa: S608 - its own names


def _prefect_bytes(lab: Lab) -> int:
    return int(_psql(lab, "SELECT pg_database_size('postgres')")[0])


def _records(lab: Lab) -> sqlite3.Connection:
    return sqlite3.connect(lab.control.folder / "records.db", timeout=20)


def _records_rows(lab: Lab) -> dict[str, int]:
    connection = _records(lab)
    try:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]  # noqa: S608 - its own names
            for name in names
        }
    finally:
        connection.close()


def _records_bytes(lab: Lab) -> int:
    connection = _records(lab)
    try:
        pages, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size")
        )
        return int(pages * size)
    finally:
        connection.close()


def _traffic(control: Control, device: str) -> tuple[int, int]:
    """Bytes to the host and from it, over its link."""
    shown = control.run("ip", "-s", "-j", "link", "show", "dev", device).stdout
    counted: dict[str, Any] = json.loads(shown)[0]["stats64"]
    return int(counted["tx"]["bytes"]), int(counted["rx"]["bytes"])


def _services(lab: Lab) -> dict[str, Service]:
    host = next(iter(lab.hosts.values()))
    return {
        "Prefect server": lab.control.services["server"],
        "worker of control": lab.control.services["worker"],
        "worker of a host": host.services["worker"],
        "receiver": host.services["receiver"],
    }


def _cpu(lab: Lab) -> dict[str, float]:
    """Seconds used so far, with what has ended; runs are told apart from the server and the receiver."""
    host, control = next(iter(lab.hosts.values())), lab.control
    server, receiver = control.services["server"].process.pid, host.services["receiver"].process.pid
    return {
        "Prefect server": _used(server),
        "control side without the servers": sum(map(_used, _work(control, server))),
        "receiver": _used(receiver),
        "host without the receiver": sum(map(_used, _work(host, receiver))),
    }


def _work(node: Node, *others: int) -> list[int]:
    """Processes of a node that serve flow runs: not `others`, and no PostgreSQL."""
    listed = (lab_cgroups.folders(node.cgroup + WORK)[0] / "cgroup.procs").read_text().split()
    found = [int(pid) for pid in listed if int(pid) not in others]
    return [pid for pid in found if b"postgres" not in _read(Path(f"/proc/{pid}/cmdline"))]


def _used(pid: int) -> float:
    """CPU seconds of a process and of those that it has waited for; 0 when it has just ended."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _polls_per_second(lab: Lab) -> float:
    """How many polls of a worker the server answers, asked by eight clients at once on the same cores."""
    return float(in_control(lab, "-c", _ASK, str(POLL_SECONDS)).split()[-1])


@contextmanager
def _largest_run(lab: Lab) -> Iterator[list[float]]:
    """Resident MB of the largest process on the control side, servers and worker aside, within the block."""
    most, ended = [0.0], threading.Event()
    lasting = [lab.control.services[name].process.pid for name in ("server", "worker")]

    def look() -> None:
        while not ended.wait(0.2):
            most[0] = max([most[0], *map(_resident_mb, _work(lab.control, *lasting))])

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield most
    finally:
        ended.set()
        looking.join()


def _resident_mb(pid: int) -> float:
    """0 for a process that has just ended."""
    found = re.search(rb"VmRSS:\s+(\d+) kB", _read(Path(f"/proc/{pid}/status")))
    return int(found[1]) / 1000 if found else 0


def table(load: Load) -> str:
    """Markdown: one line for each cost."""
    requests = sorted(load.requests.items(), key=lambda item: -item[1])
    most = ", ".join(f"{count} {name}" for name, count in requests[:5])
    rows = [
        (
            f"requests to the Prefect server, idle, {load.workers} workers",
            f"{load.idle_requests_per_second:.1f}/s",
        ),
        ("requests for one deployment", f"{sum(load.requests.values())} ({most} ...)"),
        ("rows in Prefect's database", _counted(load.prefect_rows)),
        ("growth of Prefect's database", f"{load.prefect_bytes / 1000:.0f} kB"),
        ("rows in the records", _counted(load.records_rows)),
        ("growth of the records", f"{load.records_bytes / 1000:.0f} kB"),
        ("to the host, package included", f"{load.bytes_to_host / 1000:.0f} kB"),
        ("from the host", f"{load.bytes_from_host / 1000:.0f} kB"),
        ("on a host's link while nothing is deployed", f"{load.idle_bytes_per_second:.0f} B/s"),
        *((f"memory: {name}", f"{amount:.0f} MB") for name, amount in load.memory_mb.items()),
        *((f"CPU: {name}", f"{used:.1f} s") for name, used in load.cpu_seconds.items()),
        ("polls of workers that the server answers, eight clients", f"{load.polls_per_second:.0f}/s"),
    ]
    lines = ["| one deployment, by a fleet of one host | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)]) + "\n"


def _counted(rows: Mapping[str, int]) -> str:
    most = sorted(rows.items(), key=lambda item: -item[1])
    named = ", ".join(f"{count} `{name}`" for name, count in most[:6])
    return f"{sum(rows.values())}: {named}"
