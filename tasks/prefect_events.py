"""Each change of a workflow's state as Prefect events, for automations and the event feed of the UI.

The events are those of `tasks.events`, under Prefect's kind of names. Best effort: a deployment neither fails
nor waits for them (Kafka's events are the reliable ones). Imports no SQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkPool
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.utilities.urls import url_for

from receiver.contract import ErrorCode
from tasks.errors import RollbackFailed
from tasks.events import Event, EventType, jsonable
from tasks.states import WorkflowState

POOL_SECONDS = 2.0
FLUSH_SECONDS = 5.0
ROLLBACK_FAILED = "gantry.deployment.rollback-failed"
_T = EventType
# Health attempts are no change of state, and many: they are in Kafka and in the report.
NAMES: Mapping[EventType, str] = MappingProxyType(
    {
        _T.DEPLOYMENT_STARTED: "gantry.deployment.started",
        _T.DEPLOYMENT_STAGE_COMPLETED: "gantry.deployment.stage-completed",
        _T.DEPLOYMENT_COMPLETED: "gantry.deployment.completed",
        _T.DEPLOYMENT_FAILED: "gantry.deployment.failed",
        _T.DEPLOYMENT_ROLLBACK_INITIATED: "gantry.deployment.rollback-initiated",
        _T.DEPLOYMENT_ROLLBACK_COMPLETED: "gantry.deployment.rollback-completed",
        _T.DEPLOYMENT_DLQ: "gantry.dead-letter",
    }
)
_TOLD = (
    *("error_code", "error_message", "failure_stage", "severity", "action", "retry_count"),
    *("stage_name", "duration_ms", "total_duration_ms", "deployed_url", "rollback_performed"),
)
_MAX_CHARACTERS = 1000
Resource = dict[str, str]


@dataclass(frozen=True)
class Change:
    """A change of state that was recorded, with the events that it caused."""

    to_state: WorkflowState
    events: Sequence[Event]
    next_step: str = ""


@dataclass
class PrefectEvents:
    """Tells Prefect of one workflow; made by `telling`."""

    flow_run_id: str | None
    work_pool: str
    _waiting: asyncio.Queue[Change] = field(default_factory=asyncio.Queue)
    _pool: WorkPool | None = None

    def tell(self, change: Change) -> None:
        """Have a change sent in the background; returns at once."""
        self._waiting.put_nowait(change)

    async def work(self) -> None:
        """Send what was told, in its order, until cancelled."""
        while True:
            change = await self._waiting.get()
            try:
                await self._send(change)
            except Exception as exc:  # noqa: BLE001 - whatever it is, no deployment may suffer from it
                get_run_logger().warning("Prefect was not told of %s: %s", change.to_state, exc)
            finally:
                self._waiting.task_done()

    async def flush(self) -> None:
        """Return when all was sent; a message says when the time was too short."""
        try:
            await asyncio.wait_for(self._waiting.join(), FLUSH_SECONDS)
        except TimeoutError:
            get_run_logger().warning("Prefect was not told of all changes within %g s", FLUSH_SECONDS)

    async def _send(self, change: Change) -> None:
        if not change.events or not PREFECT_API_URL.value():  # without a URL Prefect would start a server
            return
        pool = await self._find_pool()
        named = [(name, event) for event in change.events for name in names_of(event)]
        for number, (name, event) in enumerate(named):
            emit_event(
                name,
                resource_of(event, change.to_state),
                occurred=event.at + timedelta(microseconds=number),  # the feed sorts by it
                related=list(related_to(event, self.flow_run_id, pool)),
                payload=payload_of(event, change.next_step, self.flow_run_id, self.work_pool),
            )

    async def _find_pool(self) -> WorkPool | None:
        """The host's work pool, asked for once; None while the server does not know it or does not answer."""
        if self._pool is None:
            try:
                async with asyncio.timeout(POOL_SECONDS), get_client() as client:
                    self._pool = await client.read_work_pool(self.work_pool)
            except (ObjectNotFound, TimeoutError):
                return None
        return self._pool


@asynccontextmanager
async def telling(flow_run_id: str | None, work_pool: str) -> AsyncIterator[PrefectEvents]:
    """Prefect hears of a workflow within the block.

    What is handed to Prefect's own queue by its end is sent before the process ends: Prefect sees to that.
    """
    teller = PrefectEvents(flow_run_id, work_pool)
    working = asyncio.create_task(teller.work())
    try:
        yield teller
        await teller.flush()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def names_of(event: Event) -> Iterator[str]:
    """Under which names Prefect hears of an event; a rollback that failed has one more."""
    if event.event_type in NAMES:
        yield NAMES[event.event_type]
    if event.event_type is EventType.DEPLOYMENT_FAILED and _code(event) == ErrorCode.ROLLBACK_FAILED:
        yield ROLLBACK_FAILED


def resource_of(event: Event, state: WorkflowState) -> Resource:
    """The container on its host; its labels are what an automation's `match` can ask for."""
    told = event.payload
    name, host = told["container_name"], told["remote_host"]
    return {
        "prefect.resource.id": f"gantry.container.{host}.{name}",
        "prefect.resource.name": f"{name} on {host}",
        "gantry.container_name": name,
        "gantry.remote_host": host,
        "gantry.image_tag": told["image_tag"],
        "gantry.workflow_id": event.workflow_id,
        "gantry.state": state.value,
        "gantry.error_code": _code(event),
    }


def related_to(event: Event, flow_run_id: str | None, pool: WorkPool | None) -> Iterator[Resource]:
    """Workflow, host, the host's work pool and the flow run.

    The host's pool stands before the one that Prefect adds by itself, that of the flow run: an action that
    infers its work pool takes the first.
    """
    host = event.payload["remote_host"]
    yield _resource(f"gantry.workflow.{event.workflow_id}", "workflow", event.workflow_id)
    yield _resource(f"gantry.host.{host}", "host", host)
    if pool is not None:
        yield _resource(f"prefect.work-pool.{pool.id}", "work-pool", pool.name) | {"gantry.remote_host": host}
    if flow_run_id is not None:
        yield {"prefect.resource.id": f"prefect.flow-run.{flow_run_id}", "prefect.resource.role": "flow-run"}


def payload_of(event: Event, next_step: str, flow_run_id: str | None, work_pool: str) -> dict[str, Any]:
    """What a notification says; without secrets, without what is not known, and short."""
    told = {name: event.payload.get(name) for name in _TOLD}
    if _code(event) == ErrorCode.ROLLBACK_FAILED:
        next_step = RollbackFailed.next_step
    run_url = url_for("flow-run", flow_run_id) if flow_run_id else None
    told |= {"workflow_id": event.workflow_id, "deployment_id": event.deployment_id}
    told |= {"next_step": next_step, "run_url": run_url, "work_pool": work_pool}
    return {name: _short(value) for name, value in jsonable(told).items() if value not in (None, "")}


def _code(event: Event) -> str:
    return str(event.payload.get("error_code") or "NONE")


def _resource(resource_id: str, role: str, name: str) -> Resource:
    return {
        "prefect.resource.id": resource_id,
        "prefect.resource.role": role,
        "prefect.resource.name": name,
    }


def _short(value: Any) -> Any:
    return value[:_MAX_CHARACTERS] if isinstance(value, str) else value
