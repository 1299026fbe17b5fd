"""A fleet of two real hosts: it stops at a failure, takes back what it did, and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.lab import Host, Lab
from receiver.contract import LABEL_CONTAINER, LABEL_IMAGE_TAG
from tests.e2e.deploying import BASE_IMAGE, Outcome, in_control, outcome, prefect_api, query, start_run

HOSTS = ("host-a", "host-b")
NAME = "fleet-web"
# Not well where its volume says so: the same version is well on one host, and on another not.
START = "[ -f /data/bad ] && rm /www/health; exec sh /serve.sh"


@dataclass(frozen=True)
class Fleet:
    """A service on two hosts, what its first fleet came to, and the same resumed."""

    lab: Lab
    first: Outcome
    resumed: Outcome


def deploy(lab: Lab, service: str = NAME, **asked: Any) -> Outcome:
    """Run `deploy-fleet` to its end."""
    return outcome(lab, start_run(lab, "deploy-fleet/default", {"services": [service], **asked}))


def resume(lab: Lab, run_id: str) -> Outcome:
    """Run it again for what is left."""
    return outcome(lab, start_run(lab, "deploy-fleet/default", {"resume": run_id}))


def running(lab: Lab) -> dict[str, str]:
    """Tag that runs on each host."""
    return {name: tag_on(lab.hosts[name]) for name in HOSTS}


def tag_on(host: Host) -> str:
    """Of the one container that runs; nothing where none does."""
    found = host.docker().containers.list(filters={"label": f"{LABEL_CONTAINER}={NAME}"})
    return str(found[0].labels[LABEL_IMAGE_TAG]) if found else ""


@contextmanager
def unwell(host: Host) -> Iterator[None]:
    """Within the block no version of the service gets healthy on this host."""
    mark = Path(host.docker().volumes.create(f"{NAME}-data").attrs["Mountpoint"]) / "bad"
    mark.touch()
    try:
        yield
    finally:
        mark.unlink()


def runs_of(lab: Lab, fleet_id: str) -> list[tuple[str, str, str]]:
    """Host, tag and end of each workflow of a fleet, in the order in which they were begun."""
    sql = "SELECT * FROM workflow_executions WHERE correlation_id = ? ORDER BY created_at"
    return [(row["remote_host"], row["image_tag"], row["current_state"]) for row in query(lab, sql, fleet_id)]


def summary_of(lab: Lab, fleet_id: str) -> str:
    """The summary artifact."""
    return str(prefect_api(lab, "GET", f"/artifacts/fleet-{fleet_id}/latest")["data"])


def register(lab: Lab, folder: Path) -> None:
    """Register the service for both hosts."""
    file = {
        "hosts": list(HOSTS),
        "image": {
            "tag": "v1",
            "build_context": str(lab.state_dir / "hello"),
            "build_args": {"BASE_IMAGE": BASE_IMAGE},
        },
        "configuration": {
            "port_mappings": [{"host_port": 18900, "container_port": 8080}],
            "command": ["/bin/sh", "-c", START],
            "volumes": [{"host_path": f"{NAME}-data", "container_path": "/data"}],
            "stop_timeout_seconds": 2,
        },
        "health_check": {"max_retries": 2, "retry_interval_ms": 500},
    }
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(file))
    in_control(lab, "-m", "deployments.service_files", "register", "--folder", str(folder))


def forget(lab: Lab) -> None:
    """Take away what other tests of this lab would notice."""
    for name in HOSTS:
        in_control(
            lab, "-m", "prefect", "--no-prompt", "deployment", "delete", f"deploy-container/{NAME}-{name}"
        )
        for container in (
            lab.hosts[name].docker().containers.list(all=True, filters={"label": f"{LABEL_CONTAINER}={NAME}"})
        ):
            container.remove(force=True)
    in_control(lab, "-m", "prefect", "--no-prompt", "block", "delete", "remote-host/host-b")
    lab.hosts.pop("host-b").power_off()


@pytest.fixture(scope="module")
def fleet(furnished: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two hosts; the first fleet failed on its canary, and was resumed when that was mended."""
    host = furnished.add_host("host-b")
    known = ("--host", f"{host.name}={host.address}", "--worker-python", furnished.python)
    in_control(furnished, "-m", "deployments.setup", *known)
    register(furnished, tmp_path_factory.mktemp("services"))
    try:
        with unwell(furnished.hosts["host-a"]):
            first = deploy(furnished, max_failures=5)
        yield Fleet(furnished, first, resume(furnished, first.run_id))
    finally:
        forget(furnished)


def test_a_failing_canary_leaves_every_other_host_alone(fleet: Fleet) -> None:
    """Whatever the budget; all workflows have the fleet as their correlation id."""
    fleet_id = fleet.first.run_id
    assert fleet.first.state == "FAILED"
    assert "1 waiting, 1 failed; stopped: the canary host-a failed" in fleet.first.message
    assert runs_of(fleet.lab, fleet_id)[0] == ("host-a", "v1", "ROLLBACK_COMPLETED")


def test_a_resumed_fleet_does_what_is_left_and_not_what_is_done(fleet: Fleet) -> None:
    """Canary, then the rest; resumed once more there is nothing to do."""
    fleet_id = fleet.first.run_id
    assert fleet.resumed.state == "COMPLETED", fleet.resumed.message
    done = [
        ("host-a", "v1", "ROLLBACK_COMPLETED"),
        ("host-a", "v1", "COMPLETED"),
        ("host-b", "v1", "COMPLETED"),
    ]
    assert runs_of(fleet.lab, fleet_id) == done
    shown = summary_of(fleet.lab, fleet_id)
    assert "| host-a (canary) | [deployed](" in shown
    assert resume(fleet.lab, fleet.resumed.run_id).state == "COMPLETED"
    assert runs_of(fleet.lab, fleet_id) == done
    assert "| host-a (canary) | deployed before |" in summary_of(fleet.lab, fleet_id)


def test_a_fleet_that_stops_takes_back_what_it_deployed(fleet: Fleet) -> None:
    """`roll_back_all`: each host ends with what ran before; what another fleet has left is not touched."""
    with unwell(fleet.lab.hosts["host-b"]):
        stopped = deploy(fleet.lab, f"{NAME}:v3", on_stop="roll_back_all")
    assert stopped.state == "FAILED"
    assert "1 host failed (host-b), allowed are 0" in stopped.message
    done = [
        ("host-a", "v3", "COMPLETED"),
        ("host-b", "v3", "ROLLBACK_COMPLETED"),
        ("host-a", "v1", "COMPLETED"),
    ]
    assert runs_of(fleet.lab, stopped.run_id) == done
    assert running(fleet.lab) == {"host-a": "v1", "host-b": "v1"}
    assert "| host-a (canary) | [rolled back](" in summary_of(fleet.lab, stopped.run_id)
    again = outcome(
        fleet.lab, start_run(fleet.lab, "rollback-fleet/default", {"fleet_id": fleet.first.run_id})
    )
    assert again.state == "COMPLETED", again.message
    assert running(fleet.lab) == {"host-a": "v1", "host-b": "v1"}
    assert "| host-a | left as it is |" in summary_of(fleet.lab, fleet.first.run_id)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"canary": "host-x"}, "canary: 'host-x' is none of the hosts host-a, host-b"),
        ({"resume": "1234"}, "resume: '1234' is no id of a flow run"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_begins(
    fleet: Fleet, asked: dict[str, Any], told: str
) -> None:
    """The run's message names the parameter and the way out; no workflow is begun."""
    refused = outcome(fleet.lab, start_run(fleet.lab, "deploy-fleet/default", {"services": [NAME], **asked}))
    assert refused.state == "FAILED"
    assert told in refused.message
    assert runs_of(fleet.lab, refused.run_id) == []
