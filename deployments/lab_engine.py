"""The Docker Engine of one node: containerd and dockerd as two services, as a packaged engine has them.

A containerd of its own, because dockerd would otherwise use the machine's one and start containers
outside the node's namespace. Knows nothing of Prefect or the receiver.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deployments.lab_cache import cache_folder
from deployments.lab_processes import Service, wait_until
from deployments.lab_teardown import Journal

BRIDGE = "172.30.0.1/24"
_START_SECONDS = 60
_UNUSED_PLUGINS = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
]


@dataclass(frozen=True)
class EngineChoice:
    """Which Docker Engine a node runs, and where it keeps its images.

    `root` holds the programs of a distribution's packages, unpacked; None stands for those of the machine.
    """

    root: Path | None = None
    containerd_store: bool = False

    def environment(self, node: Mapping[str, str]) -> dict[str, str]:
        """What it changes in the node's: containerd finds its shim, and the shim runc, on PATH."""
        if self.root is None:
            return {}
        own = (self.root / folder for folder in ("usr/sbin", "usr/bin"))
        return {"PATH": ":".join([*map(str, own), node["PATH"]])}


MACHINE_ENGINE = EngineChoice()


def newer_engine() -> Path:
    """Where deployments/lab_newer_engine.sh unpacks an engine; it may not be there."""
    return cache_folder() / "docker-trixie"


def containerd_command(folder: Path, disk: Path) -> list[str]:
    """Write containerd's configuration below `folder` and return its command; `disk` takes its data."""
    config = folder / "containerd.toml"
    config.write_text(
        "version = 2\n"
        f"root = {json.dumps(str(disk / 'containerd'))}\n"
        f"state = {json.dumps(str(folder / 'run'))}\n"
        f"disabled_plugins = {json.dumps(_UNUSED_PLUGINS)}\n"
        f"[grpc]\naddress = {json.dumps(str(containerd_socket(folder)))}\n"
        # without it containerd makes /opt/containerd on the machine
        f'[plugins."io.containerd.internal.v1.opt"]\npath = {json.dumps(str(folder / "opt"))}\n'
    )
    return ["containerd", "--config", str(config), "--log-level", "warn"]


def dockerd_command(
    folder: Path,
    disk: Path,
    docker_socket: Path,
    cgroup: str,
    *,
    live_restore: bool,
    containerd_store: bool = False,
) -> list[str]:
    """Write dockerd's configuration below `folder` and return its command; `disk` takes its data."""
    config = folder / "daemon.json"
    features = {"features": {"containerd-snapshotter": True}} if containerd_store else {}
    config.write_text(json.dumps({"live-restore": live_restore, **features}))
    command = ["dockerd", "--config-file", str(config), "--host", f"unix://{docker_socket}"]
    command += ["--containerd", str(containerd_socket(folder))]
    command += ["--data-root", str(disk / "data"), "--exec-root", str(folder / "exec")]
    command += ["--pidfile", str(folder / "dockerd.pid"), "--log-level", "warn"]
    command += [
        "--bip",
        BRIDGE,
        "--exec-opt",
        "native.cgroupdriver=cgroupfs",
        "--cgroup-parent",
        f"/{cgroup}",
    ]
    return command


def containerd_socket(folder: Path) -> Path:
    """Where containerd of the engine below `folder` listens."""
    return folder / "containerd.sock"


def start(containerd: Service, dockerd: Service, docker_socket: Path, journal: Journal, node: str) -> None:
    """Start what of the two does not run; return when the engine answers, else raise `LabNotReady`."""
    journal.add("engine", node=node, socket=str(docker_socket))
    if not containerd.alive:
        containerd.start()
    address = containerd_socket(containerd.cwd)
    wait_until(
        lambda: _answers(address), "containerd", deadline_seconds=_START_SECONDS, services=[containerd]
    )
    if not dockerd.alive:
        (dockerd.cwd / "dockerd.pid").unlink(missing_ok=True)  # a killed engine leaves it
        dockerd.start()
    wait_until(
        lambda: pings(docker_socket),
        f"the Docker Engine of {node}",
        deadline_seconds=_START_SECONDS,
        services=[containerd, dockerd],
    )


def pings(docker_socket: Path) -> bool:
    """True when an engine answers on this socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(docker_socket))
        connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
        return connection.recv(64).startswith(b"HTTP/1.0 200")
    return False


def _answers(address: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
        return True
    return False
