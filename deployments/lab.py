"""Real hosts on one machine: network namespaces, each with its own Docker Engine, receiver and worker.

    with Lab(hosts=("host-a",)) as lab:
        lab.control.get(f"{lab.hosts['host-a'].receiver_url}/health")

Used by the demo, the end-to-end tests, the benchmark and the fault runs. Needs root on Linux. Nothing is
left when the owner ends, even by SIGKILL: a reaper tears the lab down when the owner's pipe closes.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import which
from typing import Self

from deployments import lab_engine, lab_network
from deployments.lab_engine import EngineChoice
from deployments.lab_network import Link
from deployments.lab_nodes import Node, Site
from deployments.lab_processes import LabNotReady, Service
from deployments.lab_sides import Control, Host
from deployments.lab_teardown import DONE, reap, tear_down

__all__ = [
    "Control",
    "EngineChoice",
    "Host",
    "Lab",
    "LabImpossible",
    "LabNotReady",
    "Node",
    "Service",
    "missing_requirement",
]

_PROGRAMS = ("dockerd", "containerd", "nsenter", "ip", "iptables")
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_MAX_SOCKET_FOLDER_BYTES = 70


class LabImpossible(Exception):
    """A lab cannot run here; as root on Linux, run deployments/install_services.sh"""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{self.__doc__}: {problem}")


def missing_requirement() -> str | None:
    """What keeps a lab from running on this machine, or None."""
    if sys.platform != "linux":
        return "it is not Linux"
    if os.geteuid() != 0:
        return "the caller is not root"
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"
    missing = [program for program in _PROGRAMS if which(program, path=path) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class Lab:
    """A control side and hosts; a context manager, or `up()` and `down()`.

    `control_namespace=False` makes this machine itself the control side, with the engine at DOCKER_HOST.
    `state_dir` must not exist yet and must be short (Unix sockets lie below it); `down` removes it.
    `reaped=False` lets the lab outlive its owner: `python -m deployments.lab down <state_dir>` ends it.
    `environment` is added to that of every program; `disk_bytes` gives each node a disk of that size;
    `engines` names the nodes ("control" is one) that run another engine than the machine's.
    """

    control: Control
    hosts: dict[str, Host]

    def __init__(
        self,
        hosts: Sequence[str] = ("host-a",),
        *,
        control_namespace: bool = True,
        state_dir: Path | None = None,
        python: str = sys.executable,
        prefect: bool = True,
        receiver: bool = True,
        reaped: bool = True,
        live_restore: bool = False,
        environment: Mapping[str, str] | None = None,
        disk_bytes: int | None = None,
        engines: Mapping[str, EngineChoice] | None = None,
    ) -> None:
        self.lab_id = secrets.token_hex(3)
        folder = state_dir or Path(tempfile.gettempdir()) / f"gantry-{self.lab_id}"
        self.state_dir = folder.resolve()
        self._key = secrets.token_hex(32)
        self.hosts = {}
        self._links = 0
        self._host_names = tuple(hosts)
        self._control_namespace = control_namespace
        self.python = python
        self._prefect = prefect
        self._receiver = receiver
        self._reaped = reaped
        self._live_restore = live_restore
        self._environment = dict(environment or {})
        self._disk_bytes = disk_bytes
        self._engines = dict(engines or {})
        self._reaper: subprocess.Popen[bytes] | None = None
        self._guard = subprocess.DEVNULL

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of programs on the control side: PREFECT_API_URL, PREFECT_HOME, DOCKER_HOST ..."""
        return self.control.environment

    def up(self) -> None:
        """Start everything; when that fails raise `LabNotReady` or `LabImpossible` with nothing left."""
        self._check()
        self._start_reaper()
        try:
            self._make_state_dir()
            self._build_network()
            self._start_services()
            self._check_reaper()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Take everything away; harmless when nothing is up. Raises `LabNotRemoved` when parts are left."""
        tear_down(self.state_dir)
        for node in self._nodes():
            for service in node.services.values():
                with suppress(LabNotReady):
                    service.process.wait(10)
        self._end_reaper()

    def start_server(self) -> None:
        """Start the Prefect server; returns when its API is healthy."""
        self.control.start_server()

    def start_control_worker(self) -> None:
        """Start the worker of pool `control`; returns when it is online."""
        self.control.start_worker()

    def add_host(self, name: str) -> Host:
        """Boot one more host, with all that the others have; returns when it is ready."""
        link = self._link(self._links, name, self.control.namespace)
        host = self._place_host(name, link, self.control.address)
        self._boot(host)
        if self._prefect:
            host.start_worker()
        return host

    def _nodes(self) -> list[Node]:
        return [*([self.control] if hasattr(self, "control") else []), *self.hosts.values()]

    def _check(self) -> None:
        problem = missing_requirement()
        longest = max((len(str(self.state_dir / name)) for name in (*self._host_names, "control")), default=0)
        if problem is None and longest > _MAX_SOCKET_FOLDER_BYTES:
            problem = (
                f"the path of a node's folder may have {_MAX_SOCKET_FOLDER_BYTES} bytes; shorten state_dir"
            )
        if problem is None and "control" in self._host_names:
            problem = "a host cannot be called 'control'"
        if problem:
            raise LabImpossible(problem)

    def _start_reaper(self) -> None:
        """Before anything else: from here on whatever exists is taken away when this process dies."""
        if not self._reaped:
            return
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "deployments.lab", "reap", str(self.state_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            start_new_session=True,
        )
        assert self._reaper.stdin is not None  # noqa: S101 - asked for above
        self._guard = self._reaper.stdin.fileno()

    def _check_reaper(self) -> None:
        if self._reaper is not None and self._reaper.poll() is not None:
            raise LabNotReady("the reaper ended; run it by hand: python -m deployments.lab reap /tmp/none")

    def _make_state_dir(self) -> None:
        self.state_dir.mkdir(mode=0o700, parents=True)
        self._site().journal.add("lab", lab_id=self.lab_id, owner=os.getpid())

    def _end_reaper(self) -> None:
        if self._reaper is None or self._reaper.stdin is None:
            return
        self._guard = subprocess.DEVNULL
        with suppress(BrokenPipeError):
            self._reaper.stdin.write(DONE)
        self._reaper.stdin.close()
        self._reaper.wait(10)
        self._reaper = None

    def _site(self) -> Site:
        return Site(
            lab_id=self.lab_id,
            folder=self.state_dir,
            python=self.python,
            guard=self._guard,
            key=self._key,
            live_restore=self._live_restore,
            environment=self._environment,
            disk_bytes=self._disk_bytes,
            engines=self._engines,
        )

    def _build_network(self) -> None:
        site = self._site()
        namespace = self._namespace("control") if self._control_namespace else None
        links = {name: self._link(index, name, namespace) for index, name in enumerate(self._host_names)}
        address = next((link.control_address for link in links.values()), "127.0.0.1")
        engine = self._machine_engine() if namespace is None else self.state_dir / "control" / "docker.sock"
        self.control = Control(site, "control", namespace, address, engine)
        self.control.configure()
        for name, link in links.items():
            self._place_host(name, link, address)

    def _place_host(self, name: str, link: Link, control_address: str) -> Host:
        if link.control_address != control_address:
            lab_network.add_route(link, control_address, self._guard)
        socket = self.state_dir / name / "docker.sock"
        host = Host(self._site(), name, link.host_namespace, link.host_address, socket, link=link)
        host.configure(self.control.remote_api_url, link.control_address)
        self.hosts[name] = host
        return host

    def _namespace(self, node: str) -> str:
        name = f"gantry-{self.lab_id}-{node}"
        self._site().journal.add("namespace", name=name)
        lab_network.add_namespace(name, self._guard)
        return name

    def _link(self, index: int, host: str, control_namespace: str | None) -> Link:
        self._links = max(self._links, index + 1)
        namespace = self._namespace(host)
        devices = (f"g{self.lab_id}c{index}", f"g{self.lab_id}h{index}")
        if control_namespace is None:
            self._site().journal.add("link", name=devices[0])
        with lab_network.choosing_subnets():
            subnet = lab_network.free_subnet() if control_namespace is None else lab_network.subnet(index)
            link = Link(subnet, *devices, control_namespace, namespace)
            lab_network.add_link(link, self._guard)
        return link

    def _machine_engine(self) -> Path:
        host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        path = Path(host.removeprefix("unix://"))
        if not host.startswith("unix://") or not lab_engine.pings(path):
            raise LabImpossible(
                f"no engine answers at {host}; run deployments/install_services.sh --start-docker"
            )
        return path

    def _start_services(self) -> None:
        """Engines and server at once; then each receiver after its engine, the workers after the server."""
        chains: list[Callable[[], None]] = [partial(self._boot, host) for host in self.hosts.values()]
        if self._control_namespace:
            chains.append(self.control.start_engine)
        if self._prefect:
            chains.append(self._start_prefect)
        _at_once(chains)

    def _boot(self, host: Host) -> None:
        host.start_engine()
        if self._receiver:
            host.start_receiver()

    def _start_prefect(self) -> None:
        self.start_server()
        _at_once([self.start_control_worker, *(host.start_worker for host in self.hosts.values())])


def _at_once(actions: Sequence[Callable[[], None]]) -> None:
    """Run all actions in threads; raise the first failure when all have ended."""
    with ThreadPoolExecutor(max_workers=max(1, len(actions))) as threads:
        for done in [threads.submit(action) for action in actions]:
            done.result()


def main(arguments: Sequence[str]) -> int:
    """`reap <state_dir>` is started by a lab; `down <state_dir>` ends a lab that outlived its owner."""
    match arguments:
        case ["reap", folder]:
            reap(Path(folder))
        case ["down", folder]:
            tear_down(Path(folder).resolve())
        case _:
            print("usage: python -m deployments.lab down <state folder>", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
