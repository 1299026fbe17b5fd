"""What hosts keep of a container, and going back to a version of it by hand: one signed call each.

Which version that is, the host says; here it is asked, shown and announced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.artifacts import acreate_table_artifact
from prefect.utilities.slugify import slugify

from blocks.receiver_client import ReceiverError, ReceiverRefused
from blocks.remote_host import RemoteHost, find_remote_host, saved_remote_hosts
from receiver.contract import (
    ContainerVersions,
    DeployAccepted,
    RollbackRequest,
    RollbackTarget,
    Stage,
)
from tasks.dispatch import NOT_FOUND
from tasks.errors import OPERATION_POLICIES, DeploymentFailed, ParametersRefused, RetryPolicy
from tasks.parameters import DeploymentParameters
from tasks.policies import operation
from tasks.stage import StageRun

COLUMNS = ("container_name", "image_tag", "role", "running", "created_at", "deployment_id", "note")
_ASKING = RetryPolicy(timeout_ms=15_000)
_PREVIOUS, _LOST = "a rollback goes here", "cannot be restored"


class RollbackParameters(DeploymentParameters):
    """What a rollback by hand was asked for, and the version that it goes back to; for the records."""

    to_version: str | None = None
    kept_deployment_id: str


def check_choice(deployment_id: str | None, container_name: str | None, to_version: str | None) -> None:
    """Raise `ParametersRefused` unless it is clear what is to be rolled back."""
    if (deployment_id is None) == (container_name is None):
        given = "neither was given" if container_name is None else "both were given"
        raise ParametersRefused(
            "deployment_id, container_name",
            given,
            "give container_name to go back to a kept version, or deployment_id to undo a deployment",
        )
    if to_version is not None and container_name is None:
        raise ParametersRefused(
            "to_version", "it goes with container_name alone", "leave out to_version or deployment_id"
        )


# -- going back ----------------------------------------------------------------------------------


@operation("find_kept_version", Stage.PACKAGE, policy=_ASKING)
async def find_kept_version(
    host: RemoteHost, container_name: str, to_version: str | None, correlation_id: str | None = None
) -> RollbackTarget:
    """The version that a rollback would go back to now; raises what the host refuses."""
    async with host.receiver(correlation_id=correlation_id) as receiver:
        return await receiver.rollback_target(container_name, to_version)


@operation("send_rollback_request", Stage.TRANSFER, policy=OPERATION_POLICIES["send_deployment_request"])
async def send_rollback_request(
    host: RemoteHost, container_name: str, kept_deployment_id: str, workflow_id: str
) -> DeployAccepted:
    """Announce a deployment of the kept version; returns the host's deployment id."""
    request = RollbackRequest(to=kept_deployment_id, workflow_id=workflow_id)
    async with host.receiver(correlation_id=workflow_id) as receiver:
        return await receiver.rollback_to(container_name, request, f"{workflow_id}-rollback")


async def plan(
    container_name: str, remote_host: str, remote_port: int, to_version: str | None
) -> RollbackParameters:
    """Ask the host where the rollback goes; nothing is begun yet. Raises `ReceiverError`."""
    host = await find_remote_host(remote_host, remote_port)
    target = await find_kept_version(host, container_name, to_version)
    return RollbackParameters(
        container_name=container_name,
        remote_host=remote_host,
        remote_port=remote_port,
        image_tag=target.version.image_tag,
        health_check_config=target.health_check_config,
        to_version=to_version,
        kept_deployment_id=target.version.deployment_id,
    )


def check_same(target: RollbackTarget, asked: RollbackParameters) -> None:
    """Raise `DeploymentFailed` when the previous version has become another one since it was asked for."""
    if target.version.deployment_id != asked.kept_deployment_id:
        raise DeploymentFailed(
            f"the version to go back to was {asked.kept_deployment_id} and is {target.version.deployment_id} "
            "by now: another deployment has ended meanwhile",
            next_step="Look what runs, then roll back again.",
            retryable=False,
        )


def remark(stage: StageRun, message: str) -> None:
    """Say what the last operation of a stage came to."""
    stage.operations[-1] = stage.operations[-1].model_copy(update={"message": message})


# -- showing -------------------------------------------------------------------------------------


async def hosts_to_ask(remote_host: str | None, remote_port: int) -> list[RemoteHost]:
    """The named host, or all that are saved."""
    if remote_host is not None:
        return [await find_remote_host(remote_host, remote_port)]
    return await saved_remote_hosts()


@operation("read_versions", policy=_ASKING)
async def read_versions(host: RemoteHost, container_name: str | None) -> list[ContainerVersions]:
    """What a host keeps, of one container or of all; nothing of one that it does not know."""
    async with host.receiver() as receiver:
        try:
            return await receiver.versions(container_name)
        except ReceiverRefused as exc:
            if exc.status != NOT_FOUND or container_name is None:
                raise
            return []


async def running_version(remote_host: str, remote_port: int, container_name: str) -> str | None:
    """Image tag of what runs under a container's name; None where nothing does, or the host does not say."""
    host = await find_remote_host(remote_host, remote_port)
    try:
        found = await read_versions(host, container_name)
    except ReceiverError:  # what follows asks the host again, and tells it better
        return None
    running = [version for container in found for version in container.versions if version.role == "running"]
    return running[0].image_tag if running else None


def rows_of(host: RemoteHost, found: Sequence[ContainerVersions]) -> list[dict[str, Any]]:
    """One row for each version, by container and newest first."""
    return [
        {
            "remote_host": host.name,
            "container_name": container.container_name,
            "image_tag": version.image_tag,
            "role": version.role,
            "running": version.running,
            "created_at": version.created_at.isoformat(timespec="seconds"),
            "deployment_id": version.deployment_id,
            "can_be_restored": version.can_be_restored,
            "note": _note(version.deployment_id == container.previous, version.can_be_restored),
        }
        for container in found
        for version in container.versions
    ]


def _note(is_previous: bool, can_be_restored: bool) -> str:
    if not can_be_restored:
        return _LOST
    return _PREVIOUS if is_previous else ""


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text, for a log."""
    cells = [COLUMNS, *(tuple(_cell(row[name]) for name in COLUMNS) for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


async def show(host: RemoteHost, rows: list[dict[str, Any]]) -> None:
    """Write the table artifact `versions-<host>`."""
    await acreate_table_artifact(
        table=rows, key=f"versions-{slugify(host.name)}", description=f"What {host.name} keeps"
    )
