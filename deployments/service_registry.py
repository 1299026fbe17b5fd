"""Registers a folder of service files with Prefect: what is in the folder is in Prefect, time and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
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

from deployments.register import CONTROL_POOL, ensure_work_pool, register_flow
from deployments.service_files import ServiceFile
from deployments.service_folder import FOLDER, Service, ServicesRefused, read_folder

TAG = "gantry-service"
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
    """Make or update the Prefect deployments of all services; raises `ServicesRefused` before the first.

    Relative build contexts start from `working_dir` when a deployment runs. Prefect deployments whose
    file is gone are named, not deleted.
    """
    services = read_folder(folder)
    await ensure_work_pool(CONTROL_POOL)
    for service in services:
        await _register(service, working_dir)
    names = {name for service in services for name in service.targets}
    async for name in _without_file(names):
        print(
            f"deploy-container/{name} has no file in {folder} any more; delete it with:\n"
            f"  prefect deployment delete deploy-container/{name}"
        )


async def _register(service: Service, working_dir: Path) -> None:
    from flows.deploy import deploy_container

    for name, host in service.targets.items():
        parameters = service.file.parameters(service.name, host)
        await register_flow(
            deploy_container,
            name,
            CONTROL_POOL,
            working_dir,
            parameters=parameters,
            description=service.file.description or f"Deploy {parameters['container_name']} to {host}.",
            tags=[TAG, *service.file.tags],
            **_when(service.file),
        )


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
