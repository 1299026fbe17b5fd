"""One machine of a lab: what every node can do, whether it is the control side or a host.

Must not import Docker's client at import time: the reaper loads this module and has to be there at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

from deployments import lab_cgroups, lab_disks, lab_engine, lab_http, lab_prefect
from deployments.lab_engine import MACHINE_ENGINE, EngineChoice
from deployments.lab_http import Response
from deployments.lab_processes import Launcher, Service, wait_until
from deployments.lab_teardown import ENGINE, WORK, Journal

if TYPE_CHECKING:
    import docker

_PROJECT = Path(__file__).resolve().parents[1]
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "USER", "LOGNAME", "TMPDIR")
READY_SECONDS = 90


class ServiceRuns(Exception):
    """A service of this name runs on the node; stop it first, or choose another name"""

    def __init__(self, name: str) -> None:
        super().__init__(f"{self.__doc__}: {name}")


@dataclass(frozen=True)
class Site:
    """What all nodes of one lab share; `guard` is the stdin of what the owner starts."""

    lab_id: str
    folder: Path
    python: str
    guard: int
    key: str
    live_restore: bool
    environment: Mapping[str, str] = field(default_factory=dict)
    disk_bytes: int | None = None
    engines: Mapping[str, EngineChoice] = field(default_factory=dict)

    @property
    def journal(self) -> Journal:
        """Where each resource is written down before it is made."""
        return Journal(self.folder)


@dataclass
class Node:
    """One machine: a network namespace (None: the caller's own), an engine, and its services by name."""

    site: Site
    name: str
    namespace: str | None
    address: str
    docker_socket: Path
    environment: dict[str, str] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700)
        if self.site.disk_bytes is not None:
            lab_disks.mount(self.disk, self.site.disk_bytes)
        for name in (self.cgroup + WORK, self.cgroup + ENGINE):
            self.site.journal.add("cgroup", name=name)
            lab_cgroups.create(name)
        self.site.journal.add("cgroup", name=self.cgroup)  # dockerd makes it for its containers
        self.environment |= base_environment(self.docker_socket, self.site.key)
        self.environment |= self.site.environment

    @property
    def folder(self) -> Path:
        """State of this node."""
        return self.site.folder / self.name

    @property
    def disk(self) -> Path:
        """Where the node keeps what it deploys and runs: a disk of its own in a lab with `disk_bytes`."""
        return self.folder / "disk" if self.site.disk_bytes is not None else self.folder

    @property
    def cgroup(self) -> str:
        """Name that the control groups of this node begin with."""
        return f"gantry-{self.site.lab_id}-{self.name}"

    def docker(self) -> docker.DockerClient:
        """A new client of this node's engine; the caller closes it."""
        import docker  # the reaper imports this module and needs to start at once

        return docker.DockerClient(base_url=f"unix://{self.docker_socket}")

    def run(
        self,
        *argv: str,
        check: bool = True,
        timeout: float | None = 60,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> CompletedProcess[str]:
        """Run a program on this node; `env` is added to the node's. Raises as `subprocess.run` does."""
        environment = {**self.environment, **(env or {})}
        launcher = self._launcher(WORK)
        return launcher.run(argv, env=environment, cwd=cwd or self.folder, check=check, timeout=timeout)

    def spawn(
        self, name: str, *argv: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Service:
        """Start a program that stays; it becomes `services[name]` and logs to `<name>.log`.

        Raises `ServiceRuns` when a service of this name runs already.
        """
        if name in self.services and self.services[name].alive:
            raise ServiceRuns(name)
        service = self._service(name, argv, WORK, env, cwd)
        service.start()
        return service

    def get(self, url: str, timeout: float = 5, headers: Mapping[str, str] | None = None) -> Response:
        """HTTP GET from this node without a subprocess; `url` holds an IP address; raises `OSError`."""
        return lab_http.request(self.namespace, "GET", url, headers=headers, timeout_seconds=timeout)

    def post_json(self, url: str, body: object, timeout: float = 5) -> Response:
        """HTTP POST of a JSON body from this node; raises `OSError`."""
        headers = {"Content-Type": "application/json"}
        content = json.dumps(body).encode()
        return lab_http.request(
            self.namespace, "POST", url, body=content, headers=headers, timeout_seconds=timeout
        )

    def start_engine(self) -> None:
        """Start the engine, also after it was killed; returns when it answers."""
        containerd, dockerd = self._engine_services()
        lab_engine.start(containerd, dockerd, self.docker_socket, self.site.journal, self.name)

    def kill_engine(self) -> None:
        """SIGKILL dockerd; containerd and the containers live on, as on a host where the daemon crashed."""
        self.services["dockerd"].kill()

    def fill_disk(self) -> None:
        """Take every free byte of the node's own disk; raises `LabNotReady` in a lab without `disk_bytes`."""
        lab_disks.fill(self.disk)

    def free_disk(self) -> None:
        """Give back what `fill_disk` took."""
        lab_disks.free(self.disk)

    def _engine_services(self) -> tuple[Service, Service]:
        if "dockerd" not in self.services:
            choice = self.site.engines.get(self.name, MACHINE_ENGINE)
            environment = choice.environment(self.environment)
            command = lab_engine.dockerd_command(
                self.folder,
                self.disk,
                self.docker_socket,
                self.cgroup,
                live_restore=self.site.live_restore,
                containerd_store=choice.containerd_store,
            )
            containerd = lab_engine.containerd_command(self.folder, self.disk)
            self._service("containerd", containerd, ENGINE, environment)
            self._service("dockerd", command, ENGINE, environment)
        return self.services["containerd"], self.services["dockerd"]

    def _start_worker(self, pool: str) -> None:
        since = datetime.now(UTC)
        name = f"{self.name}-{self.site.lab_id}"
        worker = self.spawn("worker", *lab_prefect.worker_command(self.site.python, pool, name))
        url = f"{self.environment['PREFECT_API_URL']}/work_pools/{pool}/workers/filter"
        wait_until(
            lambda: lab_prefect.online_since(self.post_json(url, {}), name, since),
            f"the Prefect worker of {self.name}",
            deadline_seconds=READY_SECONDS,
            services=[worker],
        )

    def _service(
        self,
        name: str,
        argv: Sequence[str],
        group: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Service:
        service = Service(
            name=name,
            argv=argv,
            launcher=self._launcher(group),
            environment={**self.environment, **(env or {})},
            cwd=cwd or self.folder,
            log=self.folder / f"{name}.log",
            started=lambda started: self.site.journal.add_process(self.name, started.name, started.pid),
        )
        self.services[name] = service
        return service

    def _launcher(self, group: str) -> Launcher:
        namespace = lab_http.NAMESPACES / self.namespace if self.namespace else None
        return Launcher(lab_cgroups.create(self.cgroup + group), namespace, self.site.guard)


def base_environment(docker_socket: Path, key: str) -> dict[str, str]:
    """Environment of every program: a few variables of the caller, none of its settings or proxies."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {
        **kept,
        "PATH": f"{kept.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin",
        "PYTHONPATH": str(_PROJECT),
        "PYTHONUNBUFFERED": "1",
        "DOCKER_HOST": f"unix://{docker_socket}",
        "HMAC_SECRET_KEY": key,
    }
