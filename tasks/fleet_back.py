"""Taking a fleet back: which version of each container ran before it, by the host's own list.

What somebody else has deployed since is not touched; where nothing ran before, nothing is gone back to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

from blocks.receiver_client import ReceiverError
from blocks.remote_host import find_remote_host
from receiver.contract import ContainerVersion
from tasks.errors import ParametersRefused
from tasks.fleet_board import Board, Cell, Place, is_rollback, newest
from tasks.fleet_plan import Unit
from tasks.fleet_runs import runs_of_fleet, runs_that_lead
from tasks.parameters import DeploymentParameters
from tasks.records import Records
from tasks.states import WorkflowRecord
from tasks.versions import read_versions

_ASKED_AT_ONCE = 16
Wanted = tuple[Place, dict[str, Any]]


class NothingToGoBackTo(Exception):
    """The container is left as it is"""


def target(
    versions: Sequence[ContainerVersion], deployed: str | None, of_fleet: Collection[str]
) -> ContainerVersion:
    """The version that ran before the fleet; raises `NothingToGoBackTo`.

    `versions` are the host's, newest first; `deployed` is the fleet's deployment that should run, and
    `of_fleet` are all that the fleet made.
    """
    running = next((version for version in versions if version.role == "running"), None)
    if running is None or running.deployment_id != deployed:
        what = f"{running.image_tag} ({running.deployment_id})" if running else "nothing"
        raise NothingToGoBackTo(f"{what} runs there by now, which is not the fleet's")
    for version in versions:
        if version.role == "kept" and version.can_be_restored and version.deployment_id not in of_fleet:
            return version
    raise NothingToGoBackTo("the host keeps no version from before the fleet")


async def plan(board: Board, records: Records) -> list[Wanted]:
    """Rollbacks that undo the fleet, a place with its parameters each; the others are told why not."""
    all_of_it = await records.of_correlation(board.fleet_id)
    last = newest(all_of_it)
    of_fleet = {
        record.deployment_id for record in all_of_it if record.deployment_id and not is_rollback(record)
    }
    at_once = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def ask(place: Place) -> Wanted | None:
        record = last.get(place.unit.key)
        if record is None or is_rollback(record) or not record.success:
            return None
        async with at_once:
            return await _wanted(place, record, of_fleet)

    found = await asyncio.gather(*(ask(place) for place in board.places))
    return [wanted for wanted in found if wanted is not None]


async def _wanted(place: Place, record: WorkflowRecord, of_fleet: Collection[str]) -> Wanted | None:
    host = await find_remote_host(place.unit.host, record.remote_port)
    try:
        (container,) = await read_versions(host, record.container_name)
        to = target(container.versions, record.deployment_id, of_fleet)
    except ReceiverError as exc:
        place.end(Cell.NOT_ROLLED_BACK, str(exc))
        return None
    except (NothingToGoBackTo, ValueError) as exc:
        place.end(Cell.LEFT, str(exc))
        return None
    return place, {
        "remote_host": place.unit.host,
        "remote_port": record.remote_port,
        "container_name": record.container_name,
        "to_version": to.deployment_id,
    }


async def board_of(fleet_id: str, records: Records) -> Board:
    """What a fleet did, from the records; raises `ParametersRefused` where that cannot be taken back now."""
    fix = "give the id that the summary of deploy-fleet shows"
    found = await records.of_correlation(fleet_id)
    if not found:
        raise ParametersRefused("fleet_id", f"the records know no deployment of fleet {fleet_id!r}", fix)
    await _check_ended(fleet_id)
    places = [_place(record) for record in newest(found).values()]
    return Board(fleet_id, sorted(places, key=lambda place: place.unit.key))


async def _check_ended(fleet_id: str) -> None:
    runs = await runs_of_fleet(fleet_id)
    alive = [run.name for _, run in runs if run.state is not None and not run.state.is_final()]
    alive += [run.name for run in await runs_that_lead(fleet_id)]
    if alive:
        raise ParametersRefused(
            "fleet_id",
            f"{len(alive)} of its runs go on ({', '.join(alive[:3])})",
            "cancel deploy-fleet, wait for its deployments to end, then roll back",
        )


def _place(record: WorkflowRecord) -> Place:
    parameters = DeploymentParameters(
        container_name=record.container_name, remote_host=record.remote_host, image_tag=record.image_tag
    )
    unit = Unit(record.container_name, record.remote_host, parameters)
    return Place(unit, *_standing(record))


def _standing(record: WorkflowRecord) -> tuple[Cell, str]:
    if not record.success:
        return Cell.FAILED, str(record.error_message or record.current_state)
    return (Cell.ROLLED_BACK, "") if is_rollback(record) else (Cell.DONE_BEFORE, "")
