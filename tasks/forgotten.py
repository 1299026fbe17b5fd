"""Packages that a host keeps whole for deployments that failed while it could not be told so."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from prefect.logging import get_run_logger

from blocks.remote_host import RemoteHost, find_remote_host
from receiver.contract import HostState
from tasks.records import Records

_LOOKED_BACK = timedelta(days=1)


async def give_up_forgotten(records: Records) -> list[str]:
    """Have the hosts of the last day's failures drop what waits there to be deployed; the workflows' ids.

    All are asked at once; one that is still silent is asked the next time.
    """
    failed = defaultdict[tuple[str, int], set[str]](set)
    for record in await records.failed_since(datetime.now(UTC) - _LOOKED_BACK):
        failed[record.remote_host, record.remote_port].add(record.workflow_id)
    found = await asyncio.gather(*(_ask(name, port, ids) for (name, port), ids in failed.items()))
    return [workflow_id for given_up in found for workflow_id in given_up]


async def _ask(name: str, port: int, failed: Collection[str]) -> list[str]:
    try:
        return await _give_up(await find_remote_host(name, port), failed)
    except Exception as exc:  # noqa: BLE001 - such as a host whose key is gone: the others are asked
        get_run_logger().warning("%s: %s", name, exc)
        return []


async def _give_up(host: RemoteHost, failed: Collection[str]) -> list[str]:
    found = []
    async with host.receiver() as receiver:
        for entry in (await receiver.report()).open_deployments:
            if entry.state is HostState.READY and not entry.is_held and entry.workflow_id in failed:
                await receiver.abort(entry.deployment_id)
                get_run_logger().info("%s gives up %s, which failed", host.name, entry.deployment_id)
                found.append(str(entry.workflow_id))
    return found
