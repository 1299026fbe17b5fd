"""Going back by hand, on the control host: what is refused, and how versions are shown."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from blocks.remote_host import RemoteHost
from receiver.contract import (
    ContainerVersion,
    ContainerVersions,
    HealthCheckConfig,
    ImageAnnouncement,
    RollbackTarget,
)
from tasks.errors import DeploymentFailed, ParametersRefused
from tasks.parameters import DeploymentParameters
from tasks.versions import RollbackParameters, check_choice, check_same, render, rows_of

DIGEST = "sha256:" + "a" * 64
ASKED = RollbackParameters(container_name="web", remote_host="host-b", kept_deployment_id="d-1")


def version(deployment_id: str, *, can_be_restored: bool = True) -> ContainerVersion:
    """A kept version."""
    return ContainerVersion(
        deployment_id=deployment_id,
        image_tag="v1",
        image_id=DIGEST,
        created_at=datetime(2026, 1, 31, 12, 0, tzinfo=UTC),
        running=False,
        role="kept",
        can_be_restored=can_be_restored,
    )


def test_a_previous_version_that_has_become_another_one_stops_the_rollback() -> None:
    """Between the question and the lock another deployment ended: nobody asked to undo that one."""
    image = ImageAnnouncement(config_digest=DIGEST, layers=[], architecture="amd64", size_bytes=1)
    for deployment_id in ("d-1", "d-2"):
        target = RollbackTarget(
            version=version(deployment_id), image=image, health_check_config=HealthCheckConfig()
        )
        if deployment_id == ASKED.kept_deployment_id:
            check_same(target, ASKED)
            continue
        with pytest.raises(DeploymentFailed, match="was d-1 and is d-2") as refused:
            check_same(target, ASKED)
        assert not refused.value.retryable


@pytest.mark.parametrize("choice", [(None, None, None), ("d-1", "web", None), ("d-1", None, "v1")])
def test_an_unclear_choice_is_refused(choice: tuple[str | None, str | None, str | None]) -> None:
    """One of the two, and a version only with a container."""
    with pytest.raises(ParametersRefused):
        check_choice(*choice)


@pytest.mark.parametrize("choice", [("d-1", None, None), (None, "web", None), (None, "web", "v1")])
def test_a_clear_choice_is_taken(choice: tuple[str | None, str | None, str | None]) -> None:
    """Undo a deployment, go back, go back to a version."""
    check_choice(*choice)


def test_reconcile_reads_a_rollback_s_record_as_a_deployment_s() -> None:
    """What the records keep of a rollback holds all that a deployment's parameters need."""
    kept = ASKED.model_dump(mode="json")
    assert set(DeploymentParameters.model_fields) < set(kept)


def test_the_table_says_where_a_rollback_goes_and_what_is_lost() -> None:
    """One line for each version below the names of the columns, in one width."""
    found = ContainerVersions(
        container_name="web",
        versions=[version("d-2"), version("d-1", can_be_restored=False)],
        previous="d-2",
    )
    rows = rows_of(RemoteHost(address="host-b"), [found])
    assert [row["note"] for row in rows] == ["a rollback goes here", "cannot be restored"]
    head, *lines = render(rows).splitlines()
    assert head.split()[:3] == ["container_name", "image_tag", "role"]
    assert len(lines) == 2
    assert len({line.index("d-") for line in lines}) == 1
    assert lines[0].endswith("d-2            a rollback goes here")
    assert render([]).count("\n") == 0
