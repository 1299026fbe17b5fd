"""Work pools, and the limit on deployments at work at the same time, as set-up wants them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from deployments.setup_items import Item, SetupRefused, item
from tasks.active import DEFAULT_SLOTS, SLOTS

CONTROL_POOL = "control"
DOCKER_TEMPLATE = Path(__file__).with_name("work_pools") / "docker.json"


async def process_pool(name: str) -> Item:
    """A pool of type process; its template is the worker's own."""
    return await _pool(name, "process", None)


async def docker_pool(name: str) -> Item:
    """A pool of type docker with `work_pools/docker.json`: each run in a container of its own."""
    return await _pool(name, "docker", json.loads(DOCKER_TEMPLATE.read_text()))


async def _pool(name: str, kind: str, template: dict[str, Any] | None) -> Item:
    async with get_client() as client:
        try:
            found = await client.read_work_pool(name)
        except ObjectNotFound:
            found = None
    if found is not None and found.type != kind:
        raise SetupRefused(
            f"the work pool {name!r} is of type {found.type}, not {kind}: delete it "
            f"(prefect work-pool delete {name}) or give another name"
        )
    fits = found is None or template is None or found.base_job_template == template

    async def apply() -> None:
        async with get_client() as client:
            if found is None:
                wanted = WorkPoolCreate(name=name, type=kind, base_job_template=template or {})
                with suppress(ObjectAlreadyExists):  # a worker that just started has made it
                    await client.create_work_pool(wanted)
            else:
                await client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))

    differs = [] if fits else ["base job template"]
    return item("work pool", name, exists=found is not None, differs=differs, apply=apply)


async def deployment_limit(limit: int) -> Item:
    """The global concurrency limit that every deployment takes a slot of."""
    async with get_client() as client:
        try:
            found = await client.read_global_concurrency_limit_by_name(SLOTS)
        except ObjectNotFound:
            found = None

    async def apply() -> None:
        async with get_client() as client:
            await client.upsert_global_concurrency_limit_by_name(SLOTS, limit)

    differs = [f"{found.limit} -> {limit}"] if found and found.limit != limit else []
    return item("concurrency limit", SLOTS, exists=found is not None, differs=differs, apply=apply)


def max_concurrent_deployments(environ: Mapping[str, str] = os.environ) -> int:
    """`MAX_CONCURRENT_DEPLOYMENTS`, by default 5; raises `SetupRefused`."""
    told = environ.get("MAX_CONCURRENT_DEPLOYMENTS", "").strip() or str(DEFAULT_SLOTS)
    if not re.fullmatch(r"[1-9][0-9]{0,3}", told):
        raise SetupRefused(f"MAX_CONCURRENT_DEPLOYMENTS={told!r}: give a whole number from 1 to 9999")
    return int(told)
