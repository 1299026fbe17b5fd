"""A second host by one command, over a real SSH server: set up, deployed to, updated, and taken away again.

The tests build on each other in this order: installing twice would cost twice.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.lab import Lab
from deployments.supervisor import read_environment
from tests.e2e.deploying import Service, task_runs_of, wait_for
from tests.e2e.ssh import SSHD
from tests.e2e.ssh_host import SshHost, ssh_host
from tests.services import require_service


@pytest.fixture(scope="module")
def second_host(furnished: Lab) -> Iterator[SshHost]:
    """host-a once more, provisioned over SSH as `host-p` with a user, a folder and a port of its own."""
    require_service(Path(SSHD).exists(), "no SSH server here", "apt-get install openssh-server")
    with ssh_host(furnished) as host:
        done = host.provision()
        assert done.state == "COMPLETED", f"{done.message}\n{host.log_tails()}"
        yield host


def owner_of(pid: int) -> int:
    """User id of a process."""
    return Path(f"/proc/{pid}").stat().st_uid


def test_a_provisioned_host_takes_a_real_deployment(second_host: SshHost, service: Service) -> None:
    """Receiver and worker run as their own user, the key is closed to others, and a service is deployed."""
    settings = second_host.prefix / "gantry.env"
    assert set(second_host.pids()) == {"receiver", "worker"}
    assert {owner_of(pid) for pid in second_host.pids().values()} == {settings.stat().st_uid}
    assert settings.owner() == second_host.user
    assert settings.stat().st_mode & 0o777 == 0o600
    assert f"IP_WHITELIST='{second_host.lab.control.address}/32," in settings.read_text()

    done = service.deploy("v1", {"remote_host": second_host.name})

    assert done.state == "COMPLETED", done.message
    assert service.answer() == "Hello from Gantry, version v1"


def test_provisioning_again_changes_nothing(second_host: SshHost) -> None:
    """Same key, same processes; what the host was registered with need not be given again."""
    settings, pids = (second_host.prefix / "gantry.env").read_text(), second_host.pids()

    again = second_host.run(
        docker_host=f"unix://{second_host.host.docker_socket}",
        wheelhouse=str(second_host.lab.state_dir / "wheels"),
    )

    assert again.state == "COMPLETED", again.message
    assert second_host.pids() == pids
    assert (second_host.prefix / "gantry.env").read_text() == settings


def test_a_changed_setting_starts_the_services_again_with_the_same_key(
    second_host: SshHost, furnished: Lab
) -> None:
    """Both, since both read it; packages are not touched, and waiting for them is no failed try."""
    settings, pids = second_host.prefix / "gantry.env", second_host.pids()
    key = read_environment(settings.read_text())["HMAC_SECRET_KEY"]
    environment = (second_host.prefix / "current").resolve()

    changed = second_host.provision(allow=["10.99.0.9/32"])

    assert changed.state == "COMPLETED", changed.message
    assert read_environment(settings.read_text())["HMAC_SECRET_KEY"] == key
    assert ",10.99.0.9/32," in settings.read_text()
    assert not set(second_host.pids().values()) & set(pids.values())
    tries = {task["name"]: task["run_count"] for task in task_runs_of(furnished, changed.run_id)}
    assert any("check_receiver" in name for name in tries)
    assert set(tries.values()) == {1}
    assert (second_host.prefix / "current").resolve() == environment


def test_a_service_that_dies_is_started_again(second_host: SshHost) -> None:
    """By the supervisor, which nobody's session holds."""
    before = second_host.pids()
    os.kill(before["receiver"], signal.SIGKILL)

    def back() -> bool:
        pids = second_host.pids()
        return pids.get("receiver", before["receiver"]) != before["receiver"]

    wait_for(back, "a new receiver", seconds=20)
    assert second_host.pids()["worker"] == before["worker"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"host_key": f"SHA256:{'A' * 43}"}, "another machine answers there, or its key was changed"),
        (
            {"name": "host-q", "host_key": None, "known_hosts_file": "/etc/hostname"},
            "the host's key is not known",
        ),
    ],
)
def test_a_host_key_that_is_not_the_known_one_is_refused(
    second_host: SshHost, given: dict[str, str | None], told: str
) -> None:
    """Before the login; the message shows the key that was seen and how to compare it."""
    refused = second_host.provision(**given)
    assert refused.state == "FAILED"
    assert told in refused.message
    assert second_host.fingerprint in refused.message
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in refused.message


def test_removing_a_host_leaves_nothing_but_its_containers(second_host: SshHost, service: Service) -> None:
    """No user, process, folder, block, pool or Prefect deployment; containers go when that is asked for."""
    assert service.deploy("v1", {"remote_host": second_host.name}).state == "COMPLETED"
    pids = second_host.pids()
    assert second_host.known_to_prefect()

    removed = second_host.run(remove=True)

    assert removed.state == "COMPLETED", removed.message
    assert not second_host.has_user()
    assert not second_host.prefix.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert second_host.known_to_prefect() == set()
    assert service.answer() == "Hello from Gantry, version v1"

    again = second_host.provision(
        remove=True,
        remove_containers=True,
        wheelhouse=None,
        docker_host=f"unix://{second_host.host.docker_socket}",
    )

    assert again.state == "COMPLETED", again.message
    assert service.containers() == []
