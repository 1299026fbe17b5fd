"""The ways back from the control host, weakest demand first. Each gives the host's status, or None."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from blocks.receiver_client import ReceiverError
from blocks.remote_host import RemoteHost, find_remote_host
from receiver.contract import DeploymentStatus, HostState
from tasks import dispatch, outcome
from tasks.errors import GantryError, RetryPolicy
from tasks.policies import operation
from tasks.wording import UNDO, run_name_of

R = TypeVar("R")
OWN_RESTORE_SECONDS = 45.0
WORKER_RESTORE_SECONDS = 60.0
_BEING_UNDONE = frozenset({HostState.FAILED, HostState.RESTORING})


@dataclass(frozen=True)
class Attempt:
    """One rollback: where, what, and the run on the host that may still be at it."""

    host: RemoteHost
    deployment_id: str
    workflow_id: str
    flow_run_id: UUID | None

    async def look(self) -> DeploymentStatus | None:
        """What the host says now."""
        return await dispatch.last_status(self.host, self.deployment_id, correlation_id=self.workflow_id)


async def begin(
    remote_host: str, remote_port: int, deployment_id: str, workflow_id: str | None, flow_run_id: str | None
) -> Attempt:
    """Find the host of a rollback."""
    host = await find_remote_host(remote_host, remote_port)
    return Attempt(
        host, deployment_id, workflow_id or deployment_id, UUID(flow_run_id) if flow_run_id else None
    )


def is_settled(status: DeploymentStatus | None) -> bool:
    """True when the host has nothing left to undo."""
    return status is not None and status.state.settled


def wants_restore(status: DeploymentStatus | None) -> bool:
    """True while something is left to undo; also after a restore that failed, whose cause may be gone."""
    return not is_settled(status) or (status is not None and status.state is HostState.RESTORE_FAILED)


async def wait_for_host(attempt: Attempt) -> DeploymentStatus | None:
    """Give the host's own flow, or its guardian, the time to restore; a run that hangs is ended.

    A deployment that no operation of the host has begun is given up: nothing is to be undone.
    """
    began, status = time.monotonic(), await attempt.look()
    if status and not is_settled(status) and status.state not in _BEING_UNDONE and attempt.flow_run_id:
        await _try("ending the run on the host", dispatch.stop_run(attempt.flow_run_id))
    while status and not is_settled(status) and time.monotonic() - began < OWN_RESTORE_SECONDS:
        if not status.operations and status.state not in _BEING_UNDONE:
            await _try("the receiver", _signed_abort(attempt.host, attempt.deployment_id))
        await asyncio.sleep(dispatch.POLL_SECONDS)
        status = await attempt.look() or status
    return status


async def restore_by_worker(attempt: Attempt, status: DeploymentStatus | None) -> DeploymentStatus | None:
    """Run `restore-container` in the host's own work pool; `status` is what the host said before."""
    start = dispatch.start_run_on_host.with_options(task_run_name=run_name_of("start_run_on_host", UNDO))
    image = f"{status.container_name}:{status.image_tag}" if status else None
    flow_run_id = await _try(
        "restore-container",
        start("restore-container", attempt.host, attempt.deployment_id, attempt.workflow_id, image),
    )
    if flow_run_id is None:
        return None
    return await _try(
        "restore-container",
        dispatch.follow(
            attempt.host,
            attempt.deployment_id,
            flow_run_id,
            is_settled,
            WORKER_RESTORE_SECONDS,
            correlation_id=attempt.workflow_id,
        ),
    )


@operation("restore_by_receiver", UNDO, policy=RetryPolicy(timeout_ms=300_000))
async def _signed_restore(host: RemoteHost, deployment_id: str) -> DeploymentStatus:
    async with host.receiver() as receiver:
        return await receiver.restore(deployment_id)


async def _signed_abort(host: RemoteHost, deployment_id: str) -> DeploymentStatus:
    async with host.receiver() as receiver:
        return await receiver.abort(deployment_id)


async def give_up(host: RemoteHost, status: DeploymentStatus | None) -> None:
    """Tell the host that a package it holds whole will not be deployed; one in part is kept to go on with."""
    if status is not None and status.state is HostState.READY and not status.operations:
        await _try("the receiver", _signed_abort(host, status.deployment_id))


async def discard_upload(host: RemoteHost, status: DeploymentStatus | None) -> None:
    """Have the host delete a package that has arrived in part; nobody will send the rest."""
    if status is not None and status.state is HostState.RECEIVING:
        await _try("the receiver", _signed_abort(host, status.deployment_id))


async def restore_by_receiver(attempt: Attempt) -> DeploymentStatus | None:
    """Ask the receiver itself to restore, by a signed call; if it refuses, what it says of the host."""
    restored = await _try("the receiver", _signed_restore(attempt.host, attempt.deployment_id))
    return restored or await attempt.look()


async def _try(way: str, call: Coroutine[Any, Any, R]) -> R | None:
    """The call's result, or None with a warning: the next way back is tried."""
    try:
        return await call
    except (GantryError, ReceiverError, PrefectException, httpx.HTTPError, TimeoutError) as exc:
        get_run_logger().warning("rollback by %s did not work: %s", way, exc)
        return None


def unreachable(attempt: Attempt) -> dict[str, Any]:
    """The rollback result when the host could not be asked: its guardian restores by itself."""
    return outcome.not_rolled_back(
        f"the host at {attempt.host.base_url} cannot be reached; its guardian restores by itself, "
        "look there with 'docker ps -a --filter label=gantry.container_name'"
    )
