"""What the Prefect server says of itself, of a work pool and of Prefect deployments. Changes nothing."""

from __future__ import annotations

import asyncio

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from tasks.findings import PlaceInPrefect, Pool, Prefect

PREFECT_SECONDS = 10.0


async def ask_prefect() -> Prefect:
    """Version of the server, or why there is none; never starts one in this process."""
    if not PREFECT_API_URL.value():
        return Prefect(problem="PREFECT_API_URL is not set")
    try:
        async with asyncio.timeout(PREFECT_SECONDS), get_client() as client:
            return Prefect(await client.api_version(), client.client_version())
    except TimeoutError:
        return Prefect(problem=f"{PREFECT_API_URL.value()}: no answer in {PREFECT_SECONDS:.0f} s")
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as exc:
        cause = " ".join(str(exc).split()) or type(exc).__name__
        return Prefect(problem=f"{PREFECT_API_URL.value()}: {cause}")


async def place_of(pool_name: str, deployments: tuple[str, ...], prefect: Prefect) -> PlaceInPrefect | None:
    """The pool, and which of the Prefect deployments are not there; None without a server."""
    if prefect.problem:
        return None
    async with get_client() as client:
        pool = await find_pool(client, pool_name)
        missing = [name for name in deployments if not await _is_registered(client, name)]
    return PlaceInPrefect(pool_name, pool, tuple(missing))


async def find_pool(client: PrefectClient, name: str) -> Pool | None:
    """The work pool with its workers, or None when there is none."""
    try:
        pool = await client.read_work_pool(name)
    except ObjectNotFound:
        return None
    workers = await client.read_workers_for_work_pool(name)
    online = sum(worker.status is WorkerStatus.ONLINE for worker in workers)
    return Pool(pool.name, pool.is_paused, online)


async def _is_registered(client: PrefectClient, name: str) -> bool:
    try:
        await client.read_deployment_by_name(name)
    except ObjectNotFound:
        return False
    return True
