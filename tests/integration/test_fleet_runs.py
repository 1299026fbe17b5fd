"""A fleet's flow runs on a real Prefect server and real records; the test plays the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Failed
from prefect.testing.utilities import prefect_test_harness

from tasks import fleet_runs
from tasks.fleet_board import Board, Cell, Place, deployed_cell
from tasks.fleet_plan import Unit
from tasks.fleet_runs import Runs
from tasks.parameters import DeploymentParameters
from tasks.records import NewWorkflow, Records
from tasks.states import WorkflowState


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    """A Prefect server and database of this module's own."""
    with prefect_test_harness():
        yield


@pytest.fixture(autouse=True)
async def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_runs, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(fleet_runs, "REPORT_SECONDS", 0.5)

    @flow(name="deploy-container")
    def deploy_container(container_name: str, remote_host: str) -> None: ...

    await (await deploy_container.ato_deployment(name="default")).aapply()


@pytest.fixture
async def records(tmp_path: Path) -> AsyncIterator[Records]:
    """New records."""
    async with await Records.open(f"sqlite:///{tmp_path / 'records.db'}") as records:
        yield records


def board(fleet_id: str, hosts: int) -> Board:
    """One service on so many hosts."""
    units = [
        Unit("web", f"host-{n}", DeploymentParameters(container_name="web", remote_host=f"host-{n}"))
        for n in range(hosts)
    ]
    return Board(fleet_id, [Place(unit) for unit in units])


def wanted(board: Board) -> list[tuple[Place, dict[str, Any]]]:
    """Each place with the parameters that the stand-in flow takes."""
    return [(place, {"container_name": "web", "remote_host": place.unit.host}) for place in board.places]


async def nothing() -> None:
    """Show nothing."""


async def unended(fleet_id: str) -> list[FlowRun]:
    """The fleet's runs that go on."""
    found = await fleet_runs.runs_of_fleet(fleet_id)
    return [run for _, run in found if run.state is not None and not run.state.is_final()]


async def first_run(fleet_id: str) -> str:
    """Id of the first run, as soon as it is there."""
    for _ in range(200):
        if alive := await unended(fleet_id):
            return str(alive[0].id)
        await asyncio.sleep(0.05)
    raise AssertionError("no run was started")


async def test_no_more_are_under_way_than_there_are_slots(records: Records) -> None:
    """Five hosts, two at a time; each run is one of its own, under the fleet's tag."""
    five, most = board("limited", 5), 0

    @flow
    async def fleet() -> None:
        await Runs(five, records, "deploy-container", 2, deployed_cell, nothing).work(wanted(five))

    working, ended = asyncio.create_task(fleet()), 0
    while not working.done():
        alive = await unended("limited")
        most = max(most, len(alive))
        if alive and len(alive) == min(2, 5 - ended):  # no sooner, so that two are seen
            ended += 1
            async with get_client() as client:
                await client.set_flow_run_state(alive[0].id, Failed(message="no"), force=True)
        await asyncio.sleep(0.1)
    await working
    assert (most, ended) == (2, 5)
    assert len({place.run_id for place in five.places}) == 5
    assert {(place.cell, place.detail) for place in five.places} == {(Cell.FAILED, "no")}


async def test_a_run_under_way_is_taken_up_and_one_that_ended_is_followed_by_another(
    records: Records,
) -> None:
    """As for a fleet whose run died: the same run until it has ended, whatever the number of fleets."""
    ids: list[str] = []
    states: list[State[Any] | None] = [None, Failed(message="no"), Completed()]
    for state in states:
        place = board("resumed", 1).places[0]

        @flow
        async def start(place: Place = place) -> None:
            runs = Runs(Board("resumed", [place]), records, "deploy-container", 1, deployed_cell, nothing)
            attempts = await fleet_runs.ended_attempts("resumed")
            await runs._start(place, wanted(Board("resumed", [place]))[0][1], attempts.total())

        await start()
        ids.append(place.run_id)
        if state is not None:
            async with get_client() as client:
                await client.set_flow_run_state((await unended("resumed"))[0].id, state, force=True)
    assert ids[0] == ids[1] != ids[2]


async def test_the_records_end_a_run_that_prefect_still_has_running(records: Records) -> None:
    """Its process died and `reconcile` wrote down that the host keeps the new container."""
    one = board("dead", 1)

    @flow
    async def fleet() -> None:
        await Runs(one, records, "deploy-container", 1, deployed_cell, nothing).work(wanted(one))

    working = asyncio.create_task(fleet())
    run_id = await first_run("dead")
    new = NewWorkflow(workflow_id=run_id, correlation_id="dead", container_name="web", remote_host="host-0")
    way = [state for state in WorkflowState if not state.terminal and state is not WorkflowState.ROLLING_BACK]
    await records.create(new)
    for state, following in zip(way, [*way[1:], WorkflowState.COMPLETED], strict=True):
        await records.advance(new.workflow_id, state, following)
    await asyncio.wait_for(working, 10)
    assert one.places[0].cell is Cell.DEPLOYED
    assert [record.workflow_id for record in await records.of_correlation("dead")] == [new.workflow_id]
