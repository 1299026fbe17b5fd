"""Workflows whose run died: why it ended, what the host made of it, and how long that is waited for.

Prefect's state says why a run ended, never what runs on a host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from blocks.receiver_client import ReceiverError
from blocks.records_database import find_records_url
from receiver.contract import DeploymentStatus
from tasks import active, dispatch, outcome
from tasks.errors import ERROR_CLASSES, GantryError
from tasks.parameters import health_check_seconds
from tasks.records import Records
from tasks.states import WorkflowRecord
from tasks.workflow import Workflow, failure_in, reopen_workflow, stage_of

_ASK_SECONDS = 1.0


@asynccontextmanager
async def open_records() -> AsyncIterator[Records]:
    """The records of this control side."""
    async with await Records.open(await find_records_url()) as records:
        yield records


async def unfinished(
    records: Records, workflow_id: str | None, container_name: str | None, remote_host: str | None
) -> list[WorkflowRecord]:
    """Workflows that have not ended, oldest first; raises `WorkflowUnknown` for an id that is not there."""
    if workflow_id is not None:
        record = await records.get(workflow_id)
        return [] if record.current_state.terminal else [record]
    found = await records.recent(container_name, remote_host, limit=1000, unfinished=True)
    return sorted(found, key=lambda record: record.created_at)


@asynccontextmanager
async def taken_over(records: Records, record: WorkflowRecord) -> AsyncIterator[Workflow | None]:
    """The workflow to be ended, alone with its container; None while its run lives, or when it has ended."""
    async with active.settling_if_free(records, record.container_name, record.remote_host) as is_free:
        if not is_free:
            yield None
            return
        async with continued(records, record.workflow_id) as workflow:
            yield workflow


@asynccontextmanager
async def continued(records: Records, workflow_id: str) -> AsyncIterator[Workflow | None]:
    """The same, by a caller who is alone with the container already."""
    record = await records.get(workflow_id)
    if record.current_state.terminal:
        yield None
        return
    async with reopen_workflow(records, record) as workflow:
        yield workflow


async def find_on_host(workflow: Workflow) -> DeploymentStatus | None:
    """Where the host stands; also one that took the deployment just before the run died.

    Raises `ReceiverError` when the host cannot be asked.
    """
    status = await dispatch.status_of_workflow(workflow.host, workflow.workflow_id)
    if status is not None:
        workflow.deployment_id = status.deployment_id
    return status


async def cause_of(workflow: Workflow) -> tuple[GantryError, bool]:
    """Why the workflow's run ended, as an error of its stage; and whether a person cancelled it."""
    record = await workflow.record()
    state = await _state_of_run(record.flow_run_id)
    is_cancelled = state is not None and (state.is_cancelled() or state.is_cancelling())
    if record.error_code is not None:  # it was being rolled back
        return ERROR_CLASSES[record.error_code](record.error_message or ""), is_cancelled
    told = f"Prefect says {state.name}" if state is not None else "Prefect does not know the run"
    said = "the run was cancelled" if is_cancelled else f"the run's process is gone ({told})"
    stage = stage_of(workflow.state)
    return failure_in(stage, f"{said} while {workflow.state}", "Deploy again."), is_cancelled


async def _state_of_run(flow_run_id: str | None) -> State | None:
    if flow_run_id is None:
        return None
    try:
        async with get_client() as client:
            return (await client.read_flow_run(UUID(flow_run_id))).state
    except (PrefectException, httpx.HTTPError) as exc:
        get_run_logger().warning("Prefect cannot be asked for run %s: %s", flow_run_id, exc)
        return None


async def find_host_run(workflow: Workflow) -> None:
    """The run on the host that may still be at work."""
    try:
        workflow.host_run = await dispatch.run_of_workflow(workflow.workflow_id)
    except (PrefectException, httpx.HTTPError) as exc:
        get_run_logger().warning("Prefect cannot be asked for the run on the host: %s", exc)


async def let_host_finish(workflow: Workflow, status: DeploymentStatus) -> None:
    """Give a host that is at work the time that its deployment may take."""
    asked = workflow.parameters
    seconds = asked.deployment_timeout_ms / 1000 + health_check_seconds(asked.health_check_config)
    deadline = time.monotonic() + seconds
    told = status
    while not outcome.has_ended(told) and time.monotonic() < deadline:
        await asyncio.sleep(_ASK_SECONDS)
        try:
            told = await find_on_host(workflow) or told
        except ReceiverError as exc:
            get_run_logger().warning("%s", exc)
            return
