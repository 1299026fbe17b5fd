"""A real SSH server on a host of the lab, with keys of its own, and how the control side comes to know it."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deployments.lab import Host, Lab
from deployments.lab_processes import wait_until
from tests.e2e.deploying import in_control
from tests.services import require_service

PORT = 2222
SSHD = "/usr/sbin/sshd"
CONFIG = """\
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
"""
_SET_FIELDS = """
import asyncio, sys
from pathlib import Path
from blocks.remote_host import RemoteHost

async def main(name, user, port, key, known_hosts, fingerprint):
    host = await RemoteHost.load(name)
    host.ssh_user, host.ssh_port = user or None, int(port)
    host.ssh_key_file, host.ssh_known_hosts_file = Path(key), Path(known_hosts)
    host.ssh_host_key = fingerprint or None
    await host.save(name, overwrite=True)

asyncio.run(main(*sys.argv[1:]))
"""


@dataclass(frozen=True)
class SshServer:
    """A running server; the keys lie in `folder`."""

    lab: Lab
    host: Host
    folder: Path

    def make_known(
        self, known_hosts: str = "known_hosts", user: str = "root", fingerprint: str | None = None
    ) -> None:
        """Write user, port, key and host keys on the host's block."""
        files = (str(self.folder / "user_key"), str(self.folder / known_hosts))
        in_control(self.lab, "-c", _SET_FIELDS, self.host.name, user, str(PORT), *files, fingerprint or "")

    def fingerprint(self) -> str:
        """Of its host key, as `ssh-keygen -l` says."""
        command = ["ssh-keygen", "-l", "-f", str(self.folder / "host_key.pub")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]


@contextmanager
def ssh_server(lab: Lab, host: Host) -> Iterator[SshServer]:
    """Start it in the host's namespace; it accepts root with the key that was made for this test."""
    found = Path(SSHD).exists() and shutil.which("ssh-keygen") is not None
    require_service(found, "no SSH server here", "apt-get install openssh-server openssh-client")
    server = SshServer(lab, host, host.folder / "ssh")
    server.folder.mkdir()
    _make_keys(server.folder, host.address)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = server.folder / "sshd_config"
    config.write_text(CONFIG.format(port=PORT, address=host.address, folder=server.folder))
    sshd = host.spawn("sshd", SSHD, "-D", "-e", "-f", str(config))
    wait_until(lambda: _listens(lab, host), "sshd", deadline_seconds=20, services=[sshd])
    try:
        yield server
    finally:
        sshd.stop()


def _make_keys(folder: Path, address: str) -> None:
    for name in ("host_key", "other_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    for key, known_hosts in (("host_key", "known_hosts"), ("other_key", "others_hosts")):
        kind, public, *_ = (folder / f"{key}.pub").read_text().split()
        (folder / known_hosts).write_text(f"[{address}]:{PORT} {kind} {public}\n")


def _listens(lab: Lab, host: Host) -> bool:
    """Asked from the control side."""
    probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()"
    with suppress(socket.timeout):
        return lab.control.run(lab.python, "-c", probe, host.address, str(PORT), check=False).returncode == 0
    return False
