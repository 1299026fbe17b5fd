"""The two kinds of node: the control side (Prefect server, builds) and a host (receiver, worker, cuts)."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from deployments import lab_cgroups, lab_clocks, lab_network, lab_prefect
from deployments.lab_network import Link
from deployments.lab_nodes import READY_SECONDS, Node
from deployments.lab_processes import wait_until
from deployments.lab_teardown import ENGINE, WORK, unmount_below

CONTROL_POOL = "control"
RECEIVER_PORT = 8001


@dataclass
class Control(Node):
    """The control side: where images are built, where the Prefect server and the worker of `control` run."""

    def configure(self) -> None:
        """Settle the addresses of the Prefect server; needs the node's network."""
        port = lab_prefect.SERVER_PORT if self.namespace else _free_port(self.address)
        self.server_port = port
        self.listen_address = "0.0.0.0" if self.namespace else self.address  # noqa: S104 - in a namespace
        own_address = "127.0.0.1" if self.namespace else self.address
        self.environment |= lab_prefect.settings(f"http://{own_address}:{port}/api", self.folder / "prefect")
        self.environment |= self.site.environment
        self.environment["GANTRY_HOME"] = str(self.disk)

    @property
    def remote_api_url(self) -> str:
        """PREFECT_API_URL for the hosts."""
        return f"http://{self.address}:{self.server_port}/api"

    @property
    def ui_url(self) -> str:
        """Where a person finds the Prefect UI, from the control side."""
        return self.environment["PREFECT_API_URL"].removesuffix("/api")

    def start_server(self) -> None:
        """Start the Prefect server on its SQLite file; returns when its API is healthy."""
        home = self.folder / "prefect"
        if not home.exists():
            lab_prefect.place_database(self.site.python, home, self.environment)
        command = lab_prefect.server_command(self.site.python, self.listen_address, self.server_port)
        server = self.spawn("server", *command, env=lab_prefect.server_settings())
        wait_until(
            lambda: self.get(f"{self.environment['PREFECT_API_URL']}/health").status == 200,
            "the Prefect server",
            deadline_seconds=READY_SECONDS,
            services=[server],
        )

    def start_worker(self) -> None:
        """Start the worker of pool `control`; returns when the server calls it online."""
        self._start_worker(CONTROL_POOL)


@dataclass
class Host(Node):
    """A target host: receiver on port 8001, worker of pool `host-<name>`, and a network that can be cut."""

    link: Link = field(kw_only=True)

    @property
    def pool(self) -> str:
        """Work pool of this host."""
        return self.name if self.name.startswith("host-") else f"host-{self.name}"

    @property
    def receiver_url(self) -> str:
        """Where the control side finds the receiver."""
        return f"http://{self.address}:{RECEIVER_PORT}"

    def configure(self, api_url: str, control_address: str) -> None:
        """Settle the environment of receiver and worker."""
        self.environment |= lab_prefect.settings(api_url, self.folder / "prefect")
        self.environment |= self.site.environment
        self.environment |= {
            "HOOK_RECEIVER_HOST": "0.0.0.0",  # noqa: S104 - in a namespace of its own
            "HOOK_RECEIVER_PORT": str(RECEIVER_PORT),
            "HOOK_RECEIVER_STATE_DIR": str(self.disk / "receiver"),
            "IP_WHITELIST": f"{control_address}/32,127.0.0.0/8",
        }

    def start_receiver(self) -> None:
        """Start the hook receiver; returns when `/health` answers, well or degraded."""
        receiver = self.spawn("receiver", self.site.python, "-m", "receiver")
        wait_until(
            lambda: self.get(f"http://127.0.0.1:{RECEIVER_PORT}/health").status in {200, 503},
            f"the hook receiver of {self.name}",
            deadline_seconds=READY_SECONDS,
            services=[receiver],
        )

    def start_worker(self) -> None:
        """Start the worker of this host's pool; returns when the server calls it online."""
        self._start_worker(self.pool)

    def cut_network(self, *, incoming: bool = True, outgoing: bool = True) -> None:
        """Drop silently what reaches or leaves this host, its containers' traffic too."""
        lab_network.cut(self.link, self.site.guard, incoming=incoming, outgoing=outgoing)

    def heal_network(self) -> None:
        """Undo every cut."""
        lab_network.heal(self.link, self.site.guard)

    def power_off(self) -> None:
        """SIGKILL everything on this host at once, containers too; the `start_*` methods boot it again."""
        for group in (self.cgroup + WORK, self.cgroup + ENGINE, self.cgroup):
            lab_cgroups.kill(group)
        for service in self.services.values():
            service.process.wait()
        unmount_below(self.folder, keep=self.disk)

    def boot(self) -> None:
        """Start everything after `power_off`, in the order in which a machine does."""
        self.start_engine()
        self.start_receiver()
        self.start_worker()

    def set_clock(self, offset_seconds: float | None) -> None:
        """Start receiver and worker again, if they run, with a clock that is off; None: with the right one.

        Only programs are told another time: the kernel has no time of day for a namespace.
        """
        lab_clocks.set_clock(self.environment, self.folder / "clock", offset_seconds)
        for name, start in (("receiver", self.start_receiver), ("worker", self.start_worker)):
            if name in self.services and self.services[name].alive:
                self.services[name].stop()
                start()

    def step_clock(self, offset_seconds: float) -> None:
        """Let the clock of what `set_clock` started jump, while it runs."""
        lab_clocks.write_offset(self.folder / "clock", offset_seconds)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
