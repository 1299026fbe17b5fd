"""Registers a folder of service files with Prefect: what is in the folder is in Prefect, time and again."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterTags,
    FlowFilter,
    FlowFilterName,
)
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy

from deployments.service_files import ServiceFile
from deployments.service_folder import FOLDER, Service, ServicesRefused, read_folder
from deployments.setup_flows import FlowDeployment, flow_deployment
from deployments.setup_items import Change, Item, settle
from deployments.setup_pools import CONTROL_POOL, process_pool
from tasks.registration import run_command

TAG = "gantry-service"
_ENTRYPOINT = "flows.deploy.deploy_container"
_PAGE = 100


def register_services(folder: str = str(FOLDER)) -> None:
    """The build step of `prefect.yaml`: a mistake in a file ends it, and nothing is registered."""
    try:
        asyncio.run(register_folder(Path(folder), Path.cwd()))
    except ServicesRefused as exc:
        # Prefect shows any other exception as a traceback of its own inside.
        raise SystemExit(
            f"{exc}\nNothing was registered; correct the service files and deploy again."
        ) from exc


async def register_folder(folder: Path, working_dir: Path) -> None:
    """Make or update the Prefect deployments of all services; raises `ServicesRefused` before the first."""
    services = await service_items(folder, working_dir)
    await settle([await process_pool(CONTROL_POOL), *services], print, plan=False)


async def service_items(folder: Path, working_dir: Path) -> list[Item]:
    """What set-up does with the folder; raises `ServicesRefused`.

    Relative build contexts start from `working_dir` when a deployment runs. Prefect deployments whose
    file is gone are named, not deleted.
    """
    services = read_folder(folder)
    wanted = [each for service in services for each in deployments_of(service, working_dir)]
    items = [await flow_deployment(each) for each in wanted]
    return items + [_left(name, folder) async for name in _without_file({each.name for each in wanted})]


def deployments_of(service: Service, working_dir: Path) -> Iterator[FlowDeployment]:
    """The Prefect deployments that a service file gives."""
    for name, host in service.targets.items():
        parameters = service.file.parameters(service.name, host)
        settings = {
            "parameters": parameters,
            "description": service.file.description or f"Deploy {parameters['container_name']} to {host}.",
            "tags": [TAG, *service.file.tags],
            "job_variables": {
                "working_dir": str(working_dir),
                "command": run_command(sys.executable, "flows.deploy"),
            },
            **_when(service.file),
        }
        yield FlowDeployment(_ENTRYPOINT, name, CONTROL_POOL, settings)


def _when(file: ServiceFile) -> dict[str, Any]:
    """What starts runs, and how many; empty where the file says nothing, which takes away what was there."""
    limit = file.concurrency and ConcurrencyLimitConfig(
        limit=file.concurrency.limit,
        collision_strategy=ConcurrencyLimitStrategy(file.concurrency.collision_strategy),
    )
    schedules = [file.schedule] if file.schedule else []
    return {
        "concurrency_limit": limit,
        "schedules": [
            DeploymentScheduleCreate(schedule=schedule.for_prefect(), active=schedule.active)
            for schedule in schedules
        ],
    }


def _left(name: str, folder: Path) -> Item:
    full_name = f"deploy-container/{name}"
    detail = f"has no file in {folder} any more; delete it with: prefect deployment delete {full_name}"
    return Item("Prefect deployment", full_name, Change.LEFT_OUT, detail)


async def _without_file(names: Collection[str]) -> AsyncIterator[str]:
    """Names of our Prefect deployments besides `names`."""
    offset = 0
    async with get_client() as client:
        while True:
            page = await client.read_deployments(
                flow_filter=FlowFilter(name=FlowFilterName(any_=["deploy-container"])),
                deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])),
                limit=_PAGE,
                offset=offset,
            )
            for found in page:
                if found.name not in names:
                    yield found.name
            if len(page) < _PAGE:
                return
            offset += _PAGE
