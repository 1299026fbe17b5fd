"""Deployments by rsync over SSH, to a real SSH server on the host."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.lab import Lab
from tests.e2e.deploying import Service, large_build, prefect_api, states_of, wait_for
from tests.e2e.deploying import outcome as outcome_of
from tests.e2e.ssh import SshServer, ssh_server
from tests.services import require_service

BY_RSYNC = {"transport": "rsync"}


@pytest.fixture(scope="module")
def ssh(furnished: Lab) -> Iterator[SshServer]:
    """An SSH server on host-a."""
    require_service(shutil.which("rsync") is not None, "no rsync here", "apt-get install rsync")
    with ssh_server(furnished, furnished.hosts["host-a"]) as server:
        yield server


@pytest.fixture(autouse=True)
def _known(ssh: SshServer) -> None:
    """The host's block is right at the beginning of each test."""
    ssh.make_known()


def incoming(service: Service) -> Path:
    """Where rsync puts packages on the host."""
    return service.host.folder / "receiver" / "incoming"


def receipt_of(service: Service, run_id: str) -> Path:
    """The transfer's receipt on the control side."""
    return service.lab.control.folder / "artifacts" / run_id / "transfer_receipt.json"


def sender_to(place: Path) -> int | None:
    """The rsync of ours that sends to this place; None when there is none."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        if words[0] == b"rsync" and b"--server" not in words and str(place).encode() in b" ".join(words):
            return int(entry.parent.name)
    return None


def stopped_in_the_middle(service: Service) -> tuple[str, Path, int]:
    """Deploy a large image and stop its rsync once 20 MB have arrived: the run, the file and the process."""
    run_id = service.start({**service.parameters("v1"), **BY_RSYNC, "build_options": large_build(service)})
    arriving = wait_for(lambda: next(iter(incoming(service).glob("*/package.tar")), None), "rsync begins")
    pid = wait_for(lambda: sender_to(arriving), "its process is there")
    wait_for(lambda: arriving.stat().st_size > 20_000_000, "20 MB have arrived")
    os.kill(pid, signal.SIGSTOP)
    return run_id, arriving, pid


def test_a_deployment_by_rsync_serves_and_leaves_nothing_behind(service: Service, ssh: SshServer) -> None:
    """Bytes by SSH to a host with a known fingerprint, authority by the signed API; again without a byte."""
    ssh.make_known(known_hosts="others_hosts", fingerprint=ssh.fingerprint())
    first = service.deploy("v1", BY_RSYNC)
    assert first.state == "COMPLETED", first.message
    assert service.answer() == "Hello from Gantry, version v1"
    assert first.metrics["transferred_bytes"] > 0
    assert list(incoming(service).iterdir()) == []
    again = service.deploy("v1", BY_RSYNC)
    assert again.state == "COMPLETED", again.message
    assert again.metrics["transferred_bytes"] == 0


def test_a_cancelled_rsync_ends_and_a_killed_one_is_resumed_by_the_next_attempt(service: Service) -> None:
    """Cancelled: no process stays, and nothing on the host. Killed: only what has not arrived travels."""
    cancelled, arriving, pid = stopped_in_the_middle(service)
    body = {"state": {"type": "CANCELLING"}}
    prefect_api(service.lab, "POST", f"/flow_runs/{cancelled}/set_state", body)
    wait_for(lambda: states_of(service.lab, cancelled)[-1:] == ["FAILED"], "the workflow has ended")
    assert sender_to(arriving) is None
    assert list(incoming(service).iterdir()) == []

    run_id, arriving, pid = stopped_in_the_middle(service)
    arrived_bytes = arriving.stat().st_size
    os.kill(pid, signal.SIGKILL)
    ended = outcome_of(service.lab, run_id)
    assert ended.state == "COMPLETED", ended.message
    assert service.answer() == "large"
    whole_bytes = json.loads(receipt_of(service, run_id).read_text())["package_bytes"]
    assert 0 < ended.metrics["transferred_bytes"] <= whole_bytes - arrived_bytes
    assert list(incoming(service).iterdir()) == []


def test_a_host_key_that_is_not_the_known_one_is_refused(service: Service, ssh: SshServer) -> None:
    """No byte goes to a stranger, no second attempt is made, and the message names the field."""
    ssh.make_known(known_hosts="others_hosts")
    failed = service.deploy("v1", BY_RSYNC)
    assert failed.state == "FAILED"
    assert "Host key verification failed" in failed.message
    assert failed.record["error_code"] == "TRANSFER_FAILED"
    assert failed.record["retry_count"] == 0
    assert states_of(service.lab, failed.run_id) == ["PENDING", "PACKAGING", "TRANSFERRING", "FAILED"]
    assert service.containers() == []
    assert not list(incoming(service).glob("*/package.tar"))


def test_a_host_without_an_ssh_user_is_refused_before_anything_is_built(
    service: Service, ssh: SshServer
) -> None:
    """The block's field is named; no workflow is begun."""
    ssh.make_known(user="")
    failed = service.deploy("v1", BY_RSYNC)
    assert failed.state == "FAILED"
    assert "ssh_user of remote-host/host-a is None" in failed.message
    assert failed.record == {}
