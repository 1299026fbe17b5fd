"""A host of the lab with an SSH server, and what a test asks of it after it was provisioned."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments.lab import Host, Lab
from deployments.lab_cache import cache_folder
from deployments.supervisor import Site, status, supervisor_pid
from tasks import host_commands
from tasks.wheelhouse import Platform, make
from tests.e2e.deploying import Outcome, outcome, prefect_api, start_run, wait_for
from tests.e2e.ssh import CONFIG, SSHD

SSH_PORT = 2223
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class SshHost:
    """A lab's host that is provisioned under another name, with a user and a folder of the test's own."""

    lab: Lab
    host: Host
    name: str = "host-p"
    port: int = 8011
    user: str = field(default_factory=lambda: f"gantry-{secrets.token_hex(3)}")

    @property
    def folder(self) -> Path:
        """Keys and configuration of the SSH server."""
        return self.host.folder / "ssh-provision"

    @property
    def prefix(self) -> Path:
        """Where the host is installed."""
        return self.host.folder / "gantry"

    @property
    def site(self) -> Site:
        """What the supervisor on the host says of itself."""
        return Site(self.prefix)

    @property
    def fingerprint(self) -> str:
        """Of the SSH server's key, as its console shows it."""
        command = ["ssh-keygen", "-lf", str(self.folder / "host_key.pub")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]

    def pids(self) -> dict[str, int]:
        """Process id of each service that runs."""
        return {name: facts["pid"] for name, facts in status(self.site).items() if facts["pid"]}

    def run(self, **parameters: Any) -> Outcome:
        """Run `provision-host` to its end."""
        asked = {"name": self.name, "prefix": str(self.prefix), "service_user": self.user, **parameters}
        return outcome(self.lab, start_run(self.lab, "provision-host/default", asked))

    def provision(self, **parameters: Any) -> Outcome:
        """Run it with all that this host needs."""
        return self.run(
            **{
                "address": self.host.address,
                "user": "root",
                "ssh_port": SSH_PORT,
                "key_file": str(self.folder / "id"),
                "host_key": self.fingerprint,
                "port": self.port,
                "docker_host": f"unix://{self.host.docker_socket}",
                "wheelhouse": str(self.lab.state_dir / "wheels"),
                **parameters,
            }
        )

    def log_tails(self) -> str:
        """The last lines of what runs on the host, for a failed test."""
        logs = sorted(self.prefix.glob("log/*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in logs)

    def has_user(self) -> bool:
        """Whether the services' user is there."""
        return any(entry.pw_name == self.user for entry in pwd.getpwall())

    def known_to_prefect(self) -> set[str]:
        """What the server knows of this host."""
        pools = prefect_api(self.lab, "POST", "/work_pools/filter", {})
        blocks = prefect_api(self.lab, "POST", "/block_documents/filter", {})
        deployments = prefect_api(self.lab, "POST", "/deployments/filter", {})
        found = [*pools, *blocks, *deployments]
        return {str(thing["id"]) for thing in found if thing.get("name") == self.name}

    def clean(self) -> None:
        """End and remove what a failed test left on this machine."""
        if (pid := supervisor_pid(self.site)) is not None:
            os.kill(pid, signal.SIGTERM)
            wait_for(lambda: supervisor_pid(self.site) is None, "the supervisor's end", seconds=60)
        if self.has_user():
            subprocess.run(["userdel", "--force", self.user], check=True, capture_output=True)


@contextmanager
def ssh_host(lab: Lab) -> Iterator[SshHost]:
    """The lab's host-a with an SSH server and ready wheels; the rest of the lab does not notice."""
    host = SshHost(lab, lab.hosts["host-a"])
    for folder in (lab.state_dir, host.host.folder):
        folder.chmod(0o711)  # the services' user has to reach its folder and the engine's socket
    shutil.copytree(make(cache_folder(), _platform()), lab.state_dir / "wheels")
    _start_server(host)
    try:
        yield host
    finally:
        host.clean()
        host.host.services["sshd-provision"].stop()


def _start_server(host: SshHost) -> None:
    host.folder.mkdir(mode=0o700)
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "id"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.folder / name)]
        subprocess.run(command, check=True)
    shutil.copy(host.folder / "id.pub", host.folder / "authorized_keys")
    config = CONFIG.format(port=SSH_PORT, address=host.host.address, folder=host.folder)
    (host.folder / "sshd_config").write_text(config)
    server = host.host.spawn("sshd-provision", SSHD, "-D", "-e", "-f", str(host.folder / "sshd_config"))
    wait_for(lambda: "Server listening" in server.log_text(), "the SSH server", seconds=20)


def _platform() -> Platform:
    """Of the Python that provisioning will find: a session over SSH has this PATH."""
    command = host_commands.find_python(None).line()
    python = _output("sh", "-c", command)
    code = "import platform as p; print(p.python_version(), p.machine(), '-'.join(p.libc_ver()))"
    return Platform(*_output(python, "-c", code).split())


def _output(*argv: str) -> str:
    environment = {"PATH": _PATH, "HOME": "/root"}
    return subprocess.run(argv, env=environment, check=True, capture_output=True, text=True).stdout.strip()
