"""A fleet's flow runs: each deployment and each rollback is one of its own, started once and watched.

No more are under way at a time than there are slots (`MAX_CONCURRENT_DEPLOYMENTS`). A Prefect server that is
away is waited for; what the records say of a run wins over what Prefect says.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.logging import get_run_logger
from sqlalchemy.exc import DBAPIError

from tasks.dispatch import fleet_tag
from tasks.errors import GantryError
from tasks.fleet_board import Board, Cell, Place
from tasks.records import Records
from tasks.states import WorkflowRecord
from tasks.wording import on_host

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 120.0
REPORT_SECONDS = 30.0
_PAGE = 200
_PURPOSES = {"deploy-container": "deploy", "rollback-container": "back"}
T = TypeVar("T")
Judge = Callable[[WorkflowRecord | None, str], tuple[Cell, str]]
MayBegin = Callable[[], bool]


class PrefectDeploymentMissing(GantryError):
    """A Prefect deployment that the fleet starts is not registered"""

    next_step = (
        "Register the control side: python -m deployments.setup; then run the fleet again with resume."
    )


@dataclass
class Runs:
    """Starts and watches the runs of one kind (`flow_name`) for places of the board."""

    board: Board
    records: Records
    flow_name: str
    parallel: int
    judge: Judge
    show: Callable[[], Awaitable[None]]

    async def work(
        self, wanted: Sequence[tuple[Place, Mapping[str, Any]]], may_begin: MayBegin = lambda: True
    ) -> None:
        """Run all of `wanted` (a place and its parameters) to their ends; begins none once it may not."""
        waiting, under_way = list(wanted), list[Place]()
        attempts = await patiently(lambda: ended_attempts(self.board.fleet_id)) if waiting else Counter()
        while under_way or (waiting and may_begin()):
            while waiting and len(under_way) < self.parallel and may_begin():
                place, parameters = waiting.pop(0)
                await self._start(place, parameters, attempts[(self.flow_name, *place.unit.key)])
                under_way.append(place)
            await self.show()
            await asyncio.sleep(POLL_SECONDS)
            under_way = await self._look(under_way)
        await self.show()

    async def _start(self, place: Place, parameters: Mapping[str, Any], attempt: int) -> None:
        """The same attempt again gives the run that was started for it."""
        container, host = place.unit.key
        purpose, fleet_id = _PURPOSES[self.flow_name], self.board.fleet_id
        name = f"{self.flow_name}/default"
        try:
            run = await patiently(
                lambda: arun_deployment(
                    name,
                    parameters=dict(parameters),
                    flow_run_name=_run_name(self.flow_name, place),
                    timeout=0,
                    tags=[fleet_tag(fleet_id)],
                    idempotency_key=f"fleet-{fleet_id}-{purpose}-{host}-{container}-{attempt}",
                )
            )
        except ObjectNotFound as exc:
            raise PrefectDeploymentMissing(f"Prefect knows no deployment {name!r}") from exc
        place.run_id, place.began = str(run.id), datetime.now(UTC)
        place.cell, place.detail, place.seconds = Cell.UNDER_WAY, "scheduled", None

    async def _look(self, under_way: Sequence[Place]) -> list[Place]:
        """Ask how they stand; those that go on."""
        if not under_way:
            return []
        runs = await patiently(lambda: _runs_by_id([place.run_id for place in under_way]))
        ids = [workflow_id_of(run) for run in runs.values()]
        records = await patiently(lambda: self.records.found(ids))
        for place in under_way:
            run = runs.get(place.run_id)
            self._judge(place, run, records.get(workflow_id_of(run)) if run else None)
        return [place for place in under_way if place.cell is Cell.UNDER_WAY]

    def _judge(self, place: Place, run: FlowRun | None, record: WorkflowRecord | None) -> None:
        if place.began is not None:
            place.seconds = (datetime.now(UTC) - place.began).total_seconds()
        if not _has_ended(run, record, datetime.now(UTC)):
            place.detail = record.current_state.value if record else "scheduled"
            return
        message = (run.state.message or run.state.name or "") if run and run.state else "Prefect lost its run"
        place.end(*self.judge(record, message))
        told = f"{place.unit.image} on {place.unit.host}: {place.cell.value} {place.detail}"
        get_run_logger().info("%s", told.strip())


def _has_ended(run: FlowRun | None, record: WorkflowRecord | None, now: datetime) -> bool:
    """By Prefect, or, when its process is dead, by the records: a live one still writes its report."""
    if run is None or run.state is None or run.state.is_final():
        return True
    ended_at = record.completed_at if record else None
    return ended_at is not None and (now - ended_at).total_seconds() > REPORT_SECONDS


def workflow_id_of(run: FlowRun) -> str:
    """As `open_workflow` names it: a run that Prefect repeats has a workflow for each time."""
    return str(run.id) if run.run_count <= 1 else f"{run.id}-{run.run_count}"


async def runs_of_fleet(fleet_id: str) -> list[tuple[str, FlowRun]]:
    """Every run that carries the fleet's tag, with the name of its flow."""
    found: list[FlowRun] = []
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[fleet_tag(fleet_id)]))
    async with get_client() as client:
        while page := await client.read_flow_runs(
            flow_run_filter=wanted, sort=FlowRunSort.ID_DESC, limit=_PAGE, offset=len(found)
        ):
            found += page
            if len(page) < _PAGE:
                break
        names = {run.flow_id: (await client.read_flow(run.flow_id)).name for run in _one_of_each_flow(found)}
    return [(names[run.flow_id], run) for run in found]


async def ended_attempts(fleet_id: str) -> Counter[tuple[str, str, str]]:
    """How many runs of each flow have ended, by flow, container and host."""
    return Counter(
        (flow_name, str(run.parameters.get("container_name")), str(run.parameters.get("remote_host")))
        for flow_name, run in await runs_of_fleet(fleet_id)
        if run.state is not None and run.state.is_final()
    )


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Call a Prefect server, or the records, that may be away for a while."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await call()
        except ObjectNotFound:
            raise
        except (httpx.HTTPError, PrefectException, OSError, DBAPIError) as exc:
            if time.monotonic() > deadline:
                raise
            get_run_logger().warning("no answer, trying again: %s: %s", type(exc).__name__, exc)
        await asyncio.sleep(POLL_SECONDS)


async def runs_that_lead(fleet_id: str) -> list[FlowRun]:
    """Runs of `deploy-fleet` that go on, also between two batches: the first, and those that resume it."""
    begun = [StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=begun))
    flows = FlowFilter(name=FlowFilterName(any_=["deploy-fleet"]))
    async with get_client() as client:
        found = await client.read_flow_runs(flow_filter=flows, flow_run_filter=FlowRunFilter(state=states))
    return [run for run in found if fleet_id in {str(run.id), str(run.parameters.get("resume"))}]


async def _runs_by_id(ids: Sequence[str]) -> dict[str, FlowRun]:
    found: dict[str, FlowRun] = {}
    async with get_client() as client:
        for at in range(0, len(ids), _PAGE):
            part = [UUID(run_id) for run_id in ids[at : at + _PAGE]]
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=part))
            found |= {str(run.id): run for run in await client.read_flow_runs(flow_run_filter=wanted)}
    return found


def _one_of_each_flow(runs: Sequence[FlowRun]) -> list[FlowRun]:
    return list({run.flow_id: run for run in runs}.values())


def _run_name(flow_name: str, place: Place) -> str:
    if flow_name == "deploy-container":
        return on_host(place.unit.image, place.unit.host)
    return f"roll back {place.unit.parameters.container_name} → {place.unit.host}"
