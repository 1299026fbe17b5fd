"""One deployment as the API sees it: its record; before there is one, its run in Prefect.

Owns the order of the questions. The records decide: Prefect's word counts only for a run that never
reached them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound

from deployments.api_problems import Refusal, Unavailable, WorkflowNotFound
from deployments.api_services import Services
from tasks.events import clean_text
from tasks.records import RecordsUnreachable, WorkflowRecord, WorkflowState, WorkflowUnknown

FLOW = "deploy-container"
POLL_SECONDS = 0.5
MAX_MESSAGE = 2000
_QUOTED_INPUT = re.compile(r"\s*\[type=[^\n]*")


class RecordMissing(Refusal):
    """Prefect completed the run, but the records do not hold it"""

    slug, status = "record-missing", 404
    next_step = "Unless the record was pruned, compare DATABASE_URL of the API with that of the worker."


@dataclass(frozen=True, kw_only=True)
class NotBegun:
    """A run without a record: still to be taken by a worker, or `ended` before any work began."""

    workflow_id: str
    container_name: str | None
    remote_host: str | None
    image_tag: str
    prefect_state: str
    ended: bool
    error_message: str | None
    created_at: datetime
    updated_at: datetime

    @property
    def current_state(self) -> WorkflowState:
        """PENDING, or FAILED for a run that Prefect ended."""
        return WorkflowState.FAILED if self.ended else WorkflowState.PENDING


Found = WorkflowRecord | NotBegun


def has_ended(found: Found) -> bool:
    """True when nothing more will happen to it."""
    return found.ended if isinstance(found, NotBegun) else found.current_state.terminal


class Workflows:
    """Finds deployments, and waits for their end."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def find(self, workflow_id: str) -> Found:
        """The deployment; raises `WorkflowNotFound`, `RecordMissing`, or what a service raises."""
        record = await self._record(workflow_id)
        if record is not None:
            return record
        run = await self._run(workflow_id)
        if run.state is not None and run.state.is_final():
            # It may have begun and ended between the two questions.
            record = await self._record(workflow_id)
        if record is None and run.state_type is StateType.COMPLETED:
            raise RecordMissing(f"flow run {workflow_id} is Completed")
        return record or _not_begun(run)

    async def wait(
        self, workflow_id: str, limit_seconds: float, is_gone: Callable[[], Awaitable[bool]]
    ) -> Found | None:
        """The deployment at its end; earlier when time is up, the caller is gone or the API stops.

        None when nobody could say where it stands: a service that is down for a while ends no waiting,
        since whoever is refused here might start the deployment a second time.
        """
        deadline = time.monotonic() + limit_seconds
        while True:
            found = await self._find_if_possible(workflow_id)
            if found is not None and has_ended(found):
                return found
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0 or self._services.stopping.is_set() or await is_gone():
                return found
            await asyncio.sleep(min(POLL_SECONDS, left_seconds))

    async def _find_if_possible(self, workflow_id: str) -> Found | None:
        try:
            return await self.find(workflow_id)
        except (Unavailable, RecordsUnreachable):
            return None

    async def _record(self, workflow_id: str) -> WorkflowRecord | None:
        async with self._services.records() as records:
            try:
                return await records.get(workflow_id)
            except WorkflowUnknown:
                return None

    async def _run(self, workflow_id: str) -> FlowRun:
        unknown = WorkflowNotFound("neither the records nor Prefect know this workflow id")
        try:
            run_id = UUID(workflow_id)
        except ValueError:
            raise unknown from None
        async with self._services.prefect() as client:
            try:
                run = await client.read_flow_run(run_id)
                flow = await client.read_flow(run.flow_id)
            except ObjectNotFound as exc:
                raise unknown from exc
        # A run of another flow is none of a deployment; another spelling of the id would be a second one.
        if flow.name != FLOW or str(run.id) != workflow_id:
            raise unknown
        return run


def _not_begun(run: FlowRun) -> NotBegun:
    ended = run.state is not None and run.state.is_final()
    now = datetime.now(UTC)
    return NotBegun(
        workflow_id=str(run.id),
        container_name=run.parameters.get("container_name"),
        remote_host=run.parameters.get("remote_host"),
        image_tag=run.parameters.get("image_tag", "latest"),
        prefect_state=run.state_name or "Unknown",
        ended=ended,
        error_message=_message(run) if ended else None,
        created_at=run.created or now,
        updated_at=run.updated or now,
    )


def _message(run: FlowRun) -> str:
    """Why Prefect ended the run, in one line; pydantic's quotes of the values are cut off."""
    told = (run.state.message if run.state else None) or "no cause was given"
    plain = " ".join(_QUOTED_INPUT.sub("", told).split())
    return clean_text(f"Prefect ended the run as {run.state_name}; the records hold no work of it: {plain}")[
        :MAX_MESSAGE
    ]
