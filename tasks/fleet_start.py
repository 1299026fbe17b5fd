"""A fleet before its first deployment: parameters checked, hosts asked, what is done already left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from pydantic import ValidationError

from blocks.receiver_client import ReceiverError
from blocks.records_database import find_records_url
from blocks.remote_host import find_remote_host, saved_host_names
from tasks import fleet_plan, fleet_services, precheck
from tasks.active import DEFAULT_SLOTS, SLOTS
from tasks.errors import ParametersRefused
from tasks.fleet_board import SERVING, Board, Cell, Place, is_deployed, newest
from tasks.fleet_plan import FleetParameters, OnUnreachable, Unit
from tasks.records import Records

_ASKED_AT_ONCE = 32


@dataclass
class Fleet:
    """One fleet under way."""

    asked: FleetParameters
    board: Board
    records: Records
    batches: list[list[str]]
    parallel: int

    @property
    def fleet_id(self) -> str:
        """The id of the fleet's first run; all its deployments carry it as their correlation id."""
        return self.board.fleet_id

    @property
    def counts_unreachable(self) -> bool:
        """Whether a host that does not answer is a failure."""
        return self.asked.on_unreachable is OnUnreachable.FAIL

    def is_done(self) -> bool:
        """Each service runs on each host, but those that were skipped as chosen."""
        well = SERVING if self.counts_unreachable else SERVING | {Cell.UNREACHABLE}
        return all(place.cell in well for place in self.board.places)


@asynccontextmanager
async def prepared(asked: FleetParameters, resume: str | None) -> AsyncIterator[Fleet]:
    """The fleet, its records open; raises `ParametersRefused` before anything has begun."""
    fleet_id = this_run()
    if resume is not None:
        fleet_id, asked = await _first_run(resume)
    units = fleet_services.units_of(
        asked, await fleet_services.registered_services(), await saved_host_names()
    )
    hosts = fleet_plan.hosts_of(units)
    fleet_plan.choose_canary(asked.canary, hosts)  # what is wrong in it is told before hosts are asked
    missing = await missing_hosts(units)
    check_reachable(missing, asked.on_unreachable)
    canary = fleet_plan.choose_canary(asked.canary, hosts, set(missing))
    async with await Records.open(await find_records_url()) as records:
        board = Board(fleet_id, [Place(unit) for unit in units], canary)
        done = newest(await records.of_correlation(fleet_id)) if resume is not None else {}
        for place in board.places:
            _settle(place, missing, is_done=is_deployed(place.unit, done))
        order = fleet_plan.batches([host for host in hosts if host not in missing], canary, asked.batch_size)
        yield Fleet(asked, board, records, order, await slots())


def this_run() -> str:
    """Id of the flow run."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("a fleet is deployed inside a flow run only")
    return str(context.flow_run.id)


async def slots() -> int:
    """How many deployments may be at work at a time: a run beyond that only waits, and costs a process."""
    async with get_client() as client:
        try:
            found = await client.read_global_concurrency_limit_by_name(SLOTS)
        except ObjectNotFound:
            return DEFAULT_SLOTS
    return max(1, found.limit) if found.active else DEFAULT_SLOTS


async def _first_run(resume: str) -> tuple[str, FleetParameters]:
    """The run that a fleet began with, and what it was asked for; a resumed run leads to it."""
    given = await _parameters_of(resume)
    if earlier := given.get("resume"):
        return await _first_run(str(earlier))
    try:
        known = {name: given[name] for name in FleetParameters.model_fields if name in given}
        return resume, FleetParameters.model_validate(known)
    except ValidationError as exc:
        raise ParametersRefused("resume", f"run {resume}: {exc.errors()[0]['msg']}", "start anew") from exc


async def _parameters_of(run_id: str) -> dict[str, Any]:
    fix = "give the id of a run of deploy-fleet, as its summary shows it; or start anew without resume"
    try:
        async with get_client() as client:
            run = await client.read_flow_run(UUID(run_id))
            flow = await client.read_flow(run.flow_id)
    except ValueError as exc:
        raise ParametersRefused("resume", f"{run_id!r} is no id of a flow run", fix) from exc
    except ObjectNotFound as exc:
        raise ParametersRefused("resume", f"Prefect knows no flow run {run_id}", fix) from exc
    if flow.name != "deploy-fleet":
        raise ParametersRefused("resume", f"{run_id} is a run of {flow.name}", fix)
    return dict(run.parameters)


def _settle(place: Place, missing: dict[str, str], *, is_done: bool) -> None:
    if is_done:
        place.end(Cell.DONE_BEFORE)
    elif place.unit.host in missing:
        place.end(Cell.UNREACHABLE, missing[place.unit.host])


def check_reachable(missing: Mapping[str, str], chosen: OnUnreachable) -> None:
    """Raise `ParametersRefused` unless hosts that cannot be deployed to, with why, may be left out."""
    if missing and chosen is OnUnreachable.FAIL:
        told = "; ".join(f"{host}: {why}" for host, why in missing.items())
        raise ParametersRefused(
            "hosts", f"not to be deployed to: {told}", "mend them (doctor), or give on_unreachable=skip"
        )


async def missing_hosts(units: Sequence[Unit]) -> dict[str, str]:
    """Hosts that cannot be deployed to, and why; all are asked at once, each at the ports of its services."""
    receivers = list(dict.fromkeys((unit.host, unit.parameters.remote_port) for unit in units))
    at_once = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def ask(name: str, port: int) -> str | None:
        async with at_once:
            try:
                await precheck.look(await find_remote_host(name, port), f"fleet-{this_run()}")
            except ReceiverError as exc:
                return str(exc)
            return None

    answers = await asyncio.gather(*(ask(*receiver) for receiver in receivers))
    found = {host: why for (host, _), why in zip(receivers, answers, strict=True) if why}
    for host, why in found.items():
        get_run_logger().warning("%s cannot be deployed to: %s", host, why)
    return found
