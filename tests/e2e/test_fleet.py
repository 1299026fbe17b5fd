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
from receiver.contract import LABEL_CONTAINER, LABEL_DEPLOYMENT, LABEL_IMAGE_TAG
from tests.e2e.deploying import BASE_IMAGE, Outcome, in_control, outcome, prefect_api, query, start_run

HOSTS = ("host-a", "host-b")
NAME = "fleet-web"
# Not well where its volume says so: the same version is well on one host, and on another not.
START = "[ -f /data/bad ] && rm /www/health; exec sh /serve.sh"


@dataclass(frozen=True)
class Fleet:
    """A service on two hosts, and what its first fleet came to."""

    lab: Lab
    first: Outcome
    resumed: Outcome

    def deploy(self, tag: str, **asked: Any) -> Outcome:
        """Run `deploy-fleet` to its end."""
        return deploy(self.lab, f"{NAME}:{tag}", **asked)

    def running(self) -> dict[str, str]:
        """Tag that runs on each host."""
        return {name: label(self.lab.hosts[name], LABEL_IMAGE_TAG) for name in HOSTS}


def deploy(lab: Lab, service: str = NAME, **asked: Any) -> Outcome:
    """Run `deploy-fleet` to its end."""
    return outcome(lab, start_run(lab, "deploy-fleet/default", {"services": [service], **asked}))


def label(host: Host, name: str) -> str:
    """A label of the one container that runs; none where nothing does."""
    found = host.docker().containers.list(filters={"label": f"{LABEL_CONTAINER}={NAME}"})
    return str(found[0].labels[name]) if found else ""


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
    """Two hosts; the first fleet failed on the second host, and was resumed when that was mended."""
    host = furnished.add_host("host-b")
    known = ("--host", f"{host.name}={host.address}", "--worker-python", furnished.python)
    in_control(furnished, "-m", "deployments.setup", *known)
    register(furnished, tmp_path_factory.mktemp("services"))
    try:
        with unwell(host):
            first = deploy(furnished)
        resumed = outcome(furnished, start_run(furnished, "deploy-fleet/default", {"resume": first.run_id}))
        yield Fleet(furnished, first, resumed)
    finally:
        forget(furnished)


def test_a_resumed_fleet_does_what_is_left_and_not_what_is_done(fleet: Fleet) -> None:
    """Host-a was deployed to once; all workflows have the fleet as their correlation id."""
    fleet_id = fleet.first.run_id
    assert fleet.first.state == "FAILED"
    assert "1 host failed (host-b), allowed are 0" in fleet.first.message
    assert fleet.resumed.state == "COMPLETED", fleet.resumed.message
    assert runs_of(fleet.lab, fleet_id) == [
        ("host-a", "v1", "COMPLETED"),
        ("host-b", "v1", "ROLLBACK_COMPLETED"),
        ("host-b", "v1", "COMPLETED"),
    ]
    shown = summary_of(fleet.lab, fleet_id)
    assert "| host-a (canary) | deployed before |" in shown
    assert "[deployed](" in shown


def test_a_failing_canary_leaves_every_other_host_alone(fleet: Fleet) -> None:
    """Whatever the budget; the canary itself serves what it served."""
    before = {name: label(fleet.lab.hosts[name], LABEL_DEPLOYMENT) for name in HOSTS}
    with unwell(fleet.lab.hosts["host-a"]):
        stopped = fleet.deploy("v2", max_failures=5)
    assert stopped.state == "FAILED"
    assert "stopped: the canary host-a failed" in stopped.message
    assert runs_of(fleet.lab, stopped.run_id) == [("host-a", "v2", "ROLLBACK_COMPLETED")]
    assert label(fleet.lab.hosts["host-b"], LABEL_DEPLOYMENT) == before["host-b"]
    assert fleet.running() == {"host-a": "v1", "host-b": "v1"}


def test_a_fleet_that_stops_takes_back_what_it_deployed(fleet: Fleet) -> None:
    """`roll_back_all`: each host ends with what ran before the fleet, and the summary says so."""
    with unwell(fleet.lab.hosts["host-b"]):
        stopped = fleet.deploy("v3", on_stop="roll_back_all")
    assert stopped.state == "FAILED"
    assert runs_of(fleet.lab, stopped.run_id) == [
        ("host-a", "v3", "COMPLETED"),
        ("host-b", "v3", "ROLLBACK_COMPLETED"),
        ("host-a", "v1", "COMPLETED"),
    ]
    assert fleet.running() == {"host-a": "v1", "host-b": "v1"}
    assert "rolled back" in summary_of(fleet.lab, stopped.run_id)


def test_a_fleet_is_taken_back_by_hand_where_it_still_runs(fleet: Fleet) -> None:
    """To what ran before; what cannot be gone back to is left and told, and changes nothing."""
    deployed = fleet.deploy("v4", canary=False, batch_size="100%")
    assert deployed.state == "COMPLETED", deployed.message
    assert fleet.running() == {"host-a": "v4", "host-b": "v4"}
    for _ in range(2):  # the second time nothing is left to be done
        back = start_run(fleet.lab, "rollback-fleet/default", {"fleet_id": deployed.run_id})
        ended = outcome(fleet.lab, back)
        assert ended.state == "COMPLETED", ended.message
        assert fleet.running() == {"host-a": "v1", "host-b": "v1"}
    assert len(runs_of(fleet.lab, deployed.run_id)) == 4


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"hosts": ["host-x"]}, "hosts: no block remote-host/host-x is saved"),
        ({"canary": "host-x"}, "canary: 'host-x' is none of the hosts host-a, host-b"),
        ({"services": ["fleet-wob"]}, "services: Prefect knows no service 'fleet-wob'; use one of fleet-web"),
        ({"resume": "1234"}, "resume: '1234' is no id of a flow run"),
        ({"batch_size": "0%"}, "batch_size"),
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
