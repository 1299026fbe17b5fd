"""What a Prefect server knows of a host: blocks, work pool, Prefect deployments; made, and taken away.

Knows flows only as they are handed in: tasks do not import flows.
"""

from __future__ import annotations

from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import WorkerStatus, WorkPool
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.processutils import command_to_string

from blocks.hmac_secret import HmacSecret
from blocks.remote_host import RemoteHost

HOST_FLOWS = ("receive-container", "restore-container")


async def ensure_work_pool(name: str) -> WorkPool:
    """The work pool of type process, made when it is not there.

    Made first and read second: a worker that starts at the same moment makes its pool too.
    """
    async with get_client() as client:
        try:
            return await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        except ObjectAlreadyExists:
            return await client.read_work_pool(name)


def run_command(python: str, module: str) -> str:
    """What a worker starts a flow run with: a copy of a process that has imported `module` already.

    A worker that is not told starts two processes for each run, and both import Prefect.
    """
    return command_to_string([python, "-m", "tasks.warm_start", module])


def host_variables(host: RemoteHost) -> dict[str, str]:
    """Job variables of what the host's worker runs."""
    return {"command": run_command(host.worker_python, "flows.receive")} if host.worker_python else {}


async def register_flow(flow: Flow[Any, Any], name: str, pool: str, variables: dict[str, str]) -> None:
    """Make or update the Prefect deployment `<flow>/<name>`, by module path."""
    deployment = await flow.ato_deployment(
        name=name, entrypoint_type=EntrypointType.MODULE_PATH, job_variables=variables
    )
    await deployment.aapply(work_pool_name=pool)


async def save_host(name: str, host: RemoteHost, secret: HmacSecret) -> RemoteHost:
    """Blocks `hmac-secret/<name>` and `remote-host/<name>`; the host leads to the saved key."""
    await secret.asave(name, overwrite=True)
    whole = host.model_copy(update={"hmac_secret": await HmacSecret.aload(name)})
    await whole.asave(name, overwrite=True)
    return whole


async def has_worker(pool: str) -> bool:
    """True when a worker of the pool is online."""
    async with get_client() as client:
        workers = await client.read_workers_for_work_pool(pool)
    return any(worker.status is WorkerStatus.ONLINE for worker in workers)


async def forget_host(name: str, pool: str) -> list[str]:
    """Take away the host's Prefect deployments, blocks and work pool; returns what was there."""
    async with get_client() as client:
        gone = []
        for flow_name in HOST_FLOWS:
            deployment = f"{flow_name}/{name}"
            try:
                found = await client.read_deployment_by_name(deployment)
            except ObjectNotFound:
                continue
            await client.delete_deployment(found.id)
            gone.append(f"deployment {deployment}")
        for slug in (RemoteHost.get_block_type_slug(), HmacSecret.get_block_type_slug()):
            try:
                block = await client.read_block_document_by_name(name, slug)
            except ObjectNotFound:
                continue
            await client.delete_block_document(block.id)
            gone.append(f"block {slug}/{name}")
        try:
            await client.delete_work_pool(pool)
        except ObjectNotFound:
            return gone
    return [*gone, f"work pool {pool}"]
