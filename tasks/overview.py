"""What runs on a host, as a table artifact that each deployment and each rollback brings up to date.

What runs is the host's word; where it answers, and when it was proven, is what the records know of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import httpx
from prefect.artifacts import acreate_table_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.utilities.slugify import slugify
from sqlalchemy.exc import DBAPIError

from blocks.receiver_client import ReceiverError
from blocks.remote_host import RemoteHost
from receiver.contract import ContainerVersion, ContainerVersions
from tasks.records import Records
from tasks.states import WorkflowRecord
from tasks.wording import moment

_PATIENCE_SECONDS = 5.0
_COLUMNS = ("version", "state", "url", "since", "health")
NOTHING = "nothing runs"


def key_of(host: RemoteHost) -> str:
    """`host-b-containers`: the artifact's key, one for each host."""
    name = slugify(host.name)
    return f"{name}-containers" if name.startswith("host-") else f"host-{name}-containers"


async def refresh(host: RemoteHost, records: Records) -> None:
    """Ask the host and show its table; one that cannot be had in time is a warning, and stays as it was."""
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            rows = await _read(host, records)
            await acreate_table_artifact(
                table=rows, key=key_of(host), description=f"What runs on {host.name} ({host.address})"
            )
    except (ReceiverError, DBAPIError, OSError, httpx.HTTPError, PrefectException) as exc:
        get_run_logger().warning(
            "the table of %s is not up to date: %s: %s", host.name, type(exc).__name__, exc
        )


async def _read(host: RemoteHost, records: Records) -> list[dict[str, str]]:
    async with host.receiver() as receiver:
        found = await receiver.versions()
    ids = [version.deployment_id for container in found for version in container.versions]
    return rows_of(found, await records.of_deployments(ids))


def rows_of(found: Sequence[ContainerVersions], known: Mapping[str, WorkflowRecord]) -> list[dict[str, str]]:
    """One row for each container, by name; `known` are workflows by the host's deployment id."""
    rows = [_row(container, known) for container in found if container.versions]
    return sorted(rows, key=lambda row: row["container"])


def _row(container: ContainerVersions, known: Mapping[str, WorkflowRecord]) -> dict[str, str]:
    serving = next((version for version in container.versions if version.role == "running"), None)
    kept = [version.image_tag for version in container.versions if version.role == "kept"]
    return {
        "container": container.container_name,
        **(_serving(serving, known) if serving else dict.fromkeys(_COLUMNS, "") | {"version": NOTHING}),
        "kept": ", ".join(kept),
    }


def _serving(version: ContainerVersion, known: Mapping[str, WorkflowRecord]) -> dict[str, str]:
    workflow = known.get(version.deployment_id)
    values = (
        version.image_tag,
        "running" if version.running else "stopped",
        (workflow.deployed_url or "no port") if workflow else "unknown",
        moment(version.created_at),
        _health(workflow),
    )
    return dict(zip(_COLUMNS, values, strict=True))


def _health(workflow: WorkflowRecord | None) -> str:
    """When the version was proven last: by its deployment."""
    if workflow is None or not workflow.success or workflow.completed_at is None:
        return "unknown"
    return f"passed {moment(workflow.completed_at)}"
