"""Where the ways are measured: one link of a lab, its two engines, and an SSH server on the host."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from docker.errors import NotFound

from deployments.lab import Control, Host, Lab
from deployments.lab_network import LAB_NETWORK
from deployments.lab_processes import wait_until
from tests.bench import images
from tests.bench.disk import fresh_disk
from tests.e2e.ssh import PORT, SshServer, ssh_server

HOST = "host-a"
_LIMIT_SECONDS = 3600


class WrongImage(Exception):
    """After a transfer the host has another image than the one that was sent, or none"""


@dataclass(frozen=True)
class Site:
    """What a way is given."""

    lab: Lab
    ssh: SshServer

    @property
    def control(self) -> Control:
        """The sending side."""
        return self.lab.control

    @property
    def host(self) -> Host:
        """The receiving side."""
        return self.lab.hosts[HOST]

    def at_control(self, line: str) -> str:
        """Run a line of bash on the sending side; fails when any part of a pipe does."""
        command = ("bash", "-o", "pipefail", "-e", "-c", line)
        return self.control.run(*command, timeout=_LIMIT_SECONDS).stdout

    def ssh_command(self) -> str:
        """`ssh` with everything before the host's name: it knows the host, and does not compress."""
        key, known = self.ssh.folder / "user_key", self.ssh.folder / "known_hosts"
        options = [
            *("-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes"),
            *("-o", "IdentitiesOnly=yes", "-o", "Compression=no"),
        ]
        return shlex.join(["ssh", "-q", "-F", "none", "-i", str(key), "-p", str(PORT), *options])

    def over_ssh(self, line: str) -> str:
        """The command that runs `line` on the host, with the host's engine."""
        remote = f"export DOCKER_HOST=unix://{self.host.docker_socket}; {line}"
        return f"{self.ssh_command()} root@{self.host.address} {shlex.quote(remote)}"

    def clean_host(self) -> None:
        """Take every image from the host's engine."""
        client = self.host.docker()
        while found := client.images.list(all=True):
            for image in found:
                with suppress(NotFound):
                    client.images.remove(str(image.id), force=True)
        client.close()

    def check_arrived(self, reference: str) -> None:
        """Raises `WrongImage` when the host has not the image that `reference` names on the sending side."""
        sent = self.control.docker().images.get(reference)
        try:
            arrived = self.host.docker().images.get(str(sent.id))
        except NotFound as exc:
            raise WrongImage(f"{reference}: {sent.id} did not arrive") from exc
        if arrived.attrs["RootFS"] != sent.attrs["RootFS"]:
            raise WrongImage(f"{reference}: the layers are others")


@contextmanager
def site(image_bytes: int) -> Iterator[Site]:
    """A lab of two sides with the images built; everything is taken away at the end."""
    with (
        fresh_disk() as disk,
        Lab((HOST,), prefect=False, state_dir=disk / "lab") as lab,
        ssh_server(lab, lab.hosts[HOST]) as ssh,
    ):
        _trust_registries(lab.control)
        folder = lab.state_dir / "contexts"
        folder.mkdir()
        images.build(lab.control, folder, image_bytes)
        yield Site(lab, ssh)


def _trust_registries(control: Control) -> None:
    """Let the sending engine speak plain HTTP to a registry on the lab's network."""
    config: Path = control.folder / "daemon.json"
    settings = {**json.loads(config.read_text()), "insecure-registries": [str(LAB_NETWORK)]}
    config.write_text(json.dumps(settings))
    os.kill(control.services["dockerd"].pid, signal.SIGHUP)
    client = control.docker()
    wait_until(
        lambda: str(LAB_NETWORK) in client.info()["RegistryConfig"]["InsecureRegistryCIDRs"],
        "the engine's list of registries",
        deadline_seconds=20,
    )
    client.close()
