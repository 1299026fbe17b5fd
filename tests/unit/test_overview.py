"""What runs on a host, as a table."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

import pytest

from blocks.remote_host import RemoteHost
from receiver.contract import ContainerVersion, ContainerVersions
from tasks.overview import NOTHING, key_of, rows_of
from tasks.states import WorkflowRecord, WorkflowState

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def version(tag: str, role: Literal["running", "kept"], *, running: bool) -> ContainerVersion:
    """A version whose deployment is called after its tag."""
    return ContainerVersion(
        deployment_id=f"d-{tag}",
        image_tag=tag,
        image_id="sha256:" + "a" * 64,
        created_at=NOW,
        running=running,
        role=role,
        can_be_restored=True,
    )


def workflow(tag: str, **fields: Any) -> WorkflowRecord:
    """A completed workflow of that deployment; fields replace."""
    given: dict[str, Any] = {
        "workflow_id": "w1",
        "correlation_id": "w1",
        "container_name": "web",
        "image_tag": tag,
        "remote_host": "host-a",
        "remote_port": 8001,
        "current_state": WorkflowState.COMPLETED,
        "created_at": NOW,
        "updated_at": NOW,
        "completed_at": NOW,
        "success": True,
        "deployment_id": f"d-{tag}",
        "deployed_url": "http://10.0.0.7:8060",
    }
    return WorkflowRecord(**given | fields)


def row(*versions: ContainerVersion, known: WorkflowRecord | None = None) -> dict[str, str]:
    """The row of one container with these versions."""
    found = [ContainerVersions(container_name="web", versions=list(versions), previous=None)]
    (only,) = rows_of(found, {str(known.deployment_id): known} if known else {})
    return only


def test_a_row_tells_what_serves_since_when_and_where_and_what_is_kept() -> None:
    """The host's word on what runs, the records' on where it answers and when it was proven."""
    kept = (version("v1", "kept", running=False), version("v0", "kept", running=False))
    assert row(version("v2", "running", running=True), *kept, known=workflow("v2")) == {
        "container": "web",
        "version": "v2",
        "state": "running",
        "since": "2026-11-23 12:00 UTC",
        "health": "passed 2026-11-23 12:00 UTC",
        "url": "http://10.0.0.7:8060",
        "kept": "v1, v0",
    }


def test_what_the_records_do_not_know_is_called_unknown() -> None:
    """Deployed from another control host, or pruned."""
    told = row(version("v2", "running", running=False))
    assert (told["state"], told["health"], told["url"]) == ("stopped", "unknown", "unknown")


@pytest.mark.parametrize(
    "known", [workflow("v2", success=False), workflow("v2", success=None, completed_at=None)]
)
def test_a_version_that_was_not_proven_is_not_called_healthy(known: WorkflowRecord) -> None:
    """A failed container that was left on purpose, for one."""
    assert row(version("v2", "running", running=True), known=known)["health"] == "unknown"


def test_a_container_of_which_nothing_runs_is_shown_with_what_is_kept() -> None:
    """That is what somebody looks for."""
    told = row(version("v1", "kept", running=False))
    assert (told["version"], told["kept"]) == (NOTHING, "v1")


def test_containers_come_by_name_and_those_without_a_version_not_at_all() -> None:
    """One row each."""
    versions = [version("v1", "running", running=True)]
    found = [
        ContainerVersions(container_name=name, versions=versions if name != "gone" else [], previous=None)
        for name in ("web", "api", "gone")
    ]
    assert [told["container"] for told in rows_of(found, {})] == ["api", "web"]


@pytest.mark.parametrize(
    ("address", "key"), [("host-b", "host-b-containers"), ("10.0.0.7", "host-10-0-0-7-containers")]
)
def test_each_host_has_a_key_of_its_own(address: str, key: str) -> None:
    """With letters that Prefect takes."""
    assert key_of(RemoteHost(address=address)) == key
