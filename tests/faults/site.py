"""The lab of the fault matrix: two hosts with disks of a bounded size, and lanes that deployments run in."""

from __future__ import annotations

import itertools
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments.lab import Host, Lab
from tests.e2e.deploying import Service, in_control, place_sample
from tests.faults import facts, holds
from tests.faults.holds import Holds
from tests.labs import lab_on_postgresql
from tests.postgresql import Cluster

HOSTS = ("host-a", "host-b")
DISK_BYTES = 1_000_000_000
_numbers = itertools.count(1)


@dataclass
class Lane:
    """One container name on one host: the version that serves is the old one of the next cell."""

    service: Service
    serving: str | None = None
    is_rolling: bool = False
    _versions: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def url(self) -> str:
        """Where the service answers."""
        return f"http://{self.service.host.address}:{self.service.port}/"

    def next_version(self) -> str:
        """A tag that this lane has not had."""
        return f"v{next(self._versions)}"

    def parameters(self, tag: str, *, is_broken: bool = False, is_patient: bool = False) -> dict[str, Any]:
        """Parameters of `deploy-container`: checks that answer at once, and a short grace."""
        parameters = self.service.parameters(tag, **({"HEALTH": "broken"} if is_broken else {}))
        parameters["deployment_config"]["stop_timeout_seconds"] = 1
        if self.is_rolling:
            parameters["deployment_config"] |= {"strategy": "rolling", "drain_timeout_seconds": 5}
        check = {"max_retries": 2, "retry_interval_ms": 500, "quiet_period_ms": 300}
        parameters["health_check_config"] = {**check, **({"max_retries": 20} if is_patient else {})}
        return parameters


@dataclass(frozen=True)
class Site:
    """The lab, its holds, and the lanes of each host."""

    lab: Lab
    holds: Holds
    lanes: dict[str, list[Lane]]
    postgresql: Cluster

    def start_postgresql(self) -> None:
        """Start the other database of the records, unless it runs; returns when it answers."""
        control = self.lab.control
        if "postgresql" not in control.services:
            control.spawn("postgresql", *self.postgresql.command, cwd=self.postgresql.folder)
        server = control.services["postgresql"]
        if not server.alive:
            server.start()
        self.postgresql.wait(lambda: server.alive, server.log)

    def replace(self, lane: Lane) -> Lane:
        """A new lane in place of one whose service a cell has left in ruins."""
        host = lane.service.host
        lanes = self.lanes[host.name]
        lanes[lanes.index(lane)] = fresh = new_lane(self.lab, host)
        return fresh


def new_lane(lab: Lab, host: Host) -> Lane:
    """A lane whose container name was never used."""
    return Lane(Service(lab, host, f"web-{next(_numbers)}"))


_REGISTER = """
import asyncio, sys
from deployments import register

async def main(hosts):
    await register.main(["--control"])
    for name, address in (host.split("=") for host in hosts):
        await register.main(["--host", name, "--address", address, "--worker-python", sys.executable])

asyncio.run(main(sys.argv[1:]))
"""


def furnish(lab: Lab) -> None:
    """Give a lab what deployments need, with one start of Prefect for all registrations."""
    place_sample(lab)
    in_control(lab, "-c", _REGISTER, *(f"{host.name}={host.address}" for host in lab.hosts.values()))


@contextmanager
def open_site(lanes_per_host: int, hosts: Sequence[str] = HOSTS) -> Iterator[Site]:
    """A lab that is furnished, with its processes under the eyes of the injected hooks."""
    state_dir = Path(tempfile.gettempdir()) / f"gantry-{secrets.token_hex(3)}"
    folder = state_dir / "faults"
    # The limit over all deployments has tests of its own; here it would make lanes wait for each other.
    environment = {**holds.environment(folder), "MAX_CONCURRENT_DEPLOYMENTS": "100"}
    options: dict[str, Any] = {"state_dir": state_dir, "live_restore": True, "disk_bytes": DISK_BYTES}
    # Prefect's server refuses writes on a busy SQLite, which would be a fault of its own in each cell.
    with lab_on_postgresql(hosts, environment=environment, durable=False, **options) as lab:
        furnish(lab)
        lanes = {
            name: [new_lane(lab, host) for _ in range(lanes_per_host)] for name, host in lab.hosts.items()
        }
        cluster = Cluster.make(facts.POSTGRESQL_PORT)
        facts.postgresql(lab).symlink_to(cluster.folder)
        try:
            yield Site(lab, Holds(folder), lanes, cluster)
        finally:
            if "postgresql" in lab.control.services:
                lab.control.services["postgresql"].stop()
            cluster.remove()
