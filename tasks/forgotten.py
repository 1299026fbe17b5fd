"""Packages that a host keeps whole for deployments that failed while it could not be told so."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from prefect.logging import get_run_logger

from blocks.remote_host import RemoteHost, find_remote_host
from receiver.contract import HostState
from tasks.records import Records
from tasks.states import WorkflowRecord

_LOOKED_BACK = timedelta(days=1)


async def give_up_forgotten(records: Records) -> list[str]:
    """Have the hosts of the last day's failures drop what waits there to be deployed; the workflows' ids.

    A host that is still silent is asked the next time.
    """
    failed = sorted(await records.failed_since(datetime.now(UTC) - _LOOKED_BACK), key=_host_of)
    given_up: list[str] = []
    for (name, port), group in itertools.groupby(failed, key=_host_of):
        ids = {record.workflow_id for record in group}
        try:
            given_up += await _give_up(await find_remote_host(name, port), ids)
        except Exception as exc:  # noqa: BLE001 - such as a host whose key is gone: the others are asked
            get_run_logger().warning("%s: %s", name, exc)
    return given_up


def _host_of(record: WorkflowRecord) -> tuple[str, int]:
    return record.remote_host, record.remote_port


async def _give_up(host: RemoteHost, failed: Collection[str]) -> list[str]:
    found = []
    async with host.receiver() as receiver:
        for entry in (await receiver.report()).open_deployments:
            if entry.state is HostState.READY and not entry.is_held and entry.workflow_id in failed:
                await receiver.abort(entry.deployment_id)
                get_run_logger().info("%s gives up %s, which failed", host.name, entry.deployment_id)
                found.append(str(entry.workflow_id))
    return found
