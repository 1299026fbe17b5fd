"""Runs on the host through its work pool, and what the host says of them.

A flow run on the host takes only a deployment id. Its outcome is read from the receiver, never from
Prefect's state: that only says that the run ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import TagsContext, TaskRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelling

from blocks.receiver_client import ReceiverClient, ReceiverError, ReceiverRefused
from blocks.remote_host import RemoteHost
from receiver.contract import DeploymentStatus, HostState, Stage
from tasks.errors import DeploymentFailed, DeploymentLost, RetryPolicy, StageTimeout
from tasks.policies import operation

POLL_SECONDS = 0.15
RUN_POLL_SECONDS = 2.0
START_DEADLINE_SECONDS = 90.0
DEAD_AFTER_SECONDS = 10.0
NOT_FOUND = 404
_UNENDED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]
_DISPATCH = RetryPolicy(max_attempts=3, timeout_ms=30_000)
_VERBS = {"receive-container": "receive", "restore-container": "undo"}
_FLEET = "fleet:"
Reached = Callable[[DeploymentStatus], bool]
Heard = Callable[[DeploymentStatus], Awaitable[None]]


def workflow_tag(workflow_id: str) -> str:
    """The tag that all flow runs of a workflow carry."""
    return f"workflow:{workflow_id}"


def fleet_tag(fleet_id: str) -> str:
    """The tag that all deployments and rollbacks of a fleet carry; the fleet is their correlation id."""
    return f"{_FLEET}{fleet_id}"


def fleet_of(tags: Iterable[str]) -> str | None:
    """The fleet that a flow run with these tags belongs to."""
    return next((tag.removeprefix(_FLEET) for tag in tags if tag.startswith(_FLEET)), None)


@contextmanager
def untagged() -> Iterator[None]:
    """Tasks within get no tags: Prefect asks its server for a slot for each, and fails without an answer."""
    with TagsContext(current_tags=set()):
        yield


@operation("start_run_on_host", Stage.DEPLOY, policy=_DISPATCH)
async def start_run_on_host(
    flow_name: str, host: RemoteHost, deployment_id: str, workflow_id: str, image: str | None = None
) -> UUID:
    """Start `<flow_name>/<host>`; returns the flow run's id. The same call again gives the same run.

    The run is named by `image`, or by the deployment where that is not known.
    """
    name = f"{flow_name}/{host.deployment_name}"
    try:
        with _as_the_flow():
            run = await run_deployment(  # type: ignore[misc]  # async within a task, by prefect's dispatch
                name,
                parameters={"deployment_id": deployment_id},
                flow_run_name=f"{_VERBS[flow_name]} {image or deployment_id[:8]} on {host.name}",
                timeout=0,
                tags=[workflow_tag(workflow_id)],
                idempotency_key=f"{flow_name}-{deployment_id}",
            )
    except ObjectNotFound as exc:
        raise DeploymentFailed(
            f"Prefect knows no deployment {name!r}",
            next_step=f"Register the host: python -m deployments.register --host {host.deployment_name}",
            retryable=False,
        ) from exc
    flow_run_id: UUID = run.id
    return flow_run_id


@contextmanager
def _as_the_flow() -> Iterator[None]:
    """What starts here is a part of the flow: Prefect's graph hides what belongs to a task inside of it."""
    token = TaskRunContext.__var__.set(None)  # type: ignore[arg-type]  # as outside of any task
    try:
        yield
    finally:
        TaskRunContext.__var__.reset(token)


async def follow(
    host: RemoteHost,
    deployment_id: str,
    flow_run_id: UUID,
    reached: Reached,
    timeout_seconds: float,
    *,
    correlation_id: str | None = None,
    heard: Heard | None = None,
) -> DeploymentStatus:
    """Watch the host until `reached`; a receiver that is away or busy is asked again until the deadline.

    Raises `StageTimeout`, or `DeploymentFailed` when the run ended or never began and the host waits.
    """
    began, idle = time.monotonic(), _Idle(host, flow_run_id)
    last: DeploymentStatus | None = None
    async with host.receiver(correlation_id=correlation_id) as receiver:
        while time.monotonic() - began < timeout_seconds:
            status = await _ask(receiver, deployment_id)
            last = status or last
            if status is not None and heard is not None:
                await heard(status)
            if status is not None and reached(status):
                return status
            if trouble := await idle.trouble(status):
                # The run may have begun since the host was asked: only what holds before and after counts.
                status = await _ask(receiver, deployment_id)
                if status is not None and _is_idle(status):
                    raise trouble
            await asyncio.sleep(POLL_SECONDS)
    state = last.state if last else "unreachable"
    raise StageTimeout(f"the host was {state} for {timeout_seconds:.0f} s on end; the stage's time is up")


async def _ask(receiver: ReceiverClient, deployment_id: str) -> DeploymentStatus | None:
    """The host's status; None, with a warning, when it may be had later."""
    try:
        return await receiver.status(deployment_id)
    except ReceiverError as exc:
        if not exc.retryable:
            raise
        get_run_logger().warning("%s; asking again", exc)
        return None


def _is_idle(status: DeploymentStatus) -> bool:
    """The host has the whole package, and nobody there works on it."""
    return status.state is HostState.READY and not status.is_held


class _Idle:
    """For how long a host has had work that nobody does, and why."""

    def __init__(self, host: RemoteHost, flow_run_id: UUID) -> None:
        self._host, self._flow_run_id = host, flow_run_id
        self._since = time.monotonic()
        self._next_look = self._since + RUN_POLL_SECONDS

    async def trouble(self, status: DeploymentStatus | None) -> DeploymentFailed | None:
        """Why it will stay so, if it will; Prefect is asked every few seconds."""
        now = time.monotonic()
        if status is None or not _is_idle(status):
            self._since = now
            return None
        if now < self._next_look:
            return None
        self._next_look = now + RUN_POLL_SECONDS
        return await run_trouble(self._host, self._flow_run_id, now - self._since)


async def run_trouble(host: RemoteHost, flow_run_id: UUID, idle_seconds: float) -> DeploymentFailed | None:
    """Why an idle host will stay idle: its run has ended or died, or nobody took it in time."""
    async with get_client() as client:
        run = await client.read_flow_run(flow_run_id)
        is_over = run.state is None or run.state.is_final()
        if idle_seconds > START_DEADLINE_SECONDS and run.start_time is None and not is_over:
            return await _not_taken(client, host.work_pool_name, run)
    if run.state is None or is_over:
        message = (run.state.message or run.state.name) if run.state else "it has no state"
        return DeploymentFailed(
            f"the run on the host ended before it began to work: {message}",
            next_step=f"Read the log of flow run {flow_run_id}.",
        )
    running_seconds = run.estimated_run_time.total_seconds()
    if min(idle_seconds, running_seconds) > DEAD_AFTER_SECONDS:
        return DeploymentFailed(
            f"the run on the host died: Prefect has it {run.state.name} for {running_seconds:.0f} s, "
            "but no process there works on the deployment",
            next_step=f"Read the log of the host's worker and of flow run {flow_run_id}, then deploy again.",
        )
    return None


async def _not_taken(client: PrefectClient, pool: str, run: FlowRun) -> DeploymentFailed:
    waited = f"{START_DEADLINE_SECONDS:.0f} s"
    if run.state is not None and run.state.is_pending():
        return DeploymentFailed(
            f"a worker of pool {pool!r} took the run, but did not begin it in {waited}",
            next_step="Read the log of the host's worker, then deploy again.",
        )
    if (await client.read_work_pool(pool)).is_paused:
        return DeploymentFailed(
            f"the work pool {pool!r} is paused, so that no worker took the run in {waited}",
            next_step=f"prefect work-pool resume {pool}, then deploy again.",
        )
    return DeploymentFailed(
        f"no worker of pool {pool!r} took the run in {waited}",
        next_step=f"On the host: prefect worker start --pool {pool} --type process",
    )


async def last_status(
    host: RemoteHost,
    deployment_id: str | None,
    *,
    correlation_id: str | None = None,
    patience_seconds: float = 0,
) -> DeploymentStatus | None:
    """What the host says now; None when it cannot be asked in time; raises `DeploymentLost`."""
    deadline = time.monotonic() + patience_seconds
    while deployment_id is not None:
        status = await _last_status(host, deployment_id, correlation_id)
        if status is not None or time.monotonic() >= deadline:
            return status
        await asyncio.sleep(1)
    return None


async def _last_status(
    host: RemoteHost, deployment_id: str, correlation_id: str | None
) -> DeploymentStatus | None:
    async with host.receiver(correlation_id=correlation_id) as receiver:
        try:
            return await receiver.status(deployment_id)
        except ReceiverError as exc:
            _raise_when_unknown(exc)
            get_run_logger().warning("%s", exc)
            return None


async def status_of_workflow(host: RemoteHost, workflow_id: str) -> DeploymentStatus | None:
    """What the host says of the deployment that a workflow announced; None when it announced none.

    Raises `ReceiverError` when the host cannot be asked.
    """
    async with host.receiver(correlation_id=workflow_id) as receiver:
        try:
            return await receiver.status_of_workflow(workflow_id)
        except ReceiverRefused as exc:
            if exc.status != NOT_FOUND:
                raise
            return None


def _raise_when_unknown(exc: ReceiverError) -> None:
    if isinstance(exc, ReceiverRefused) and exc.status == NOT_FOUND:
        raise DeploymentLost(exc.detail) from exc


async def run_of_workflow(workflow_id: str) -> UUID | None:
    """The newest run on the host that a workflow started, while it has not ended."""
    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[workflow_tag(workflow_id)]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNENDED)),
    )
    async with get_client() as client:
        found = await client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["receive-container"])),
            flow_run_filter=wanted,
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
    return found[0].id if found else None


async def stop_run(flow_run_id: UUID) -> None:
    """Ask Prefect to end a run on the host; what it had begun is undone by the host's guardian."""
    async with get_client() as client:
        await client.set_flow_run_state(flow_run_id, Cancelling())
