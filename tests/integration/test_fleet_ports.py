"""A fleet asks each receiver at the port of the service's file; a real Prefect server and a real receiver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvicorn
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from receiver.app import create_app
from receiver.ledger import Ledger
from receiver.settings import from_environment
from tasks import fleet_back, fleet_start
from tasks.fleet_board import Board, Place
from tasks.fleet_plan import Unit
from tasks.parameters import DeploymentParameters
from tasks.records import NewWorkflow, Records
from tasks.states import Facts, WorkflowState
from tests.contract.caller import KEY, Caller, FakeEngine
from tests.contract.test_versions_api import FakeSite
from tests.integration.test_rollback import until
from tests.services import free_port

HOST = "127.0.0.1"


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    """A Prefect server and database of this module's own."""
    with prefect_test_harness(server_startup_timeout=60):
        yield


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[FakeSite, int]]:
    """A receiver with a fake engine, at a port of its own; the control host has its key."""
    monkeypatch.setenv("HMAC_SECRET_KEY", KEY.decode())
    given = {"HMAC_SECRET_KEY": KEY.decode(), "HOOK_RECEIVER_STATE_DIR": str(tmp_path)}
    settings, engine, port = from_environment(given), FakeEngine(), free_port()
    settings.make_folders()
    ledger = Ledger(settings.ledger_path)
    app = create_app(settings, ledger=ledger, engine=engine.as_engine())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield FakeSite(Caller(app), ledger, "web", engine), port
    server.should_exit = True
    await serving
    ledger.close()


def unit(port: int) -> Unit:
    """The service with this `remote_port` in its file."""
    parameters = DeploymentParameters(
        container_name="web", remote_host=HOST, remote_port=port, image_tag="v2"
    )
    return Unit("web", HOST, parameters)


async def test_a_host_is_missing_where_the_port_of_a_service_is_silent(site: tuple[FakeSite, int]) -> None:
    """The receiver's own port is asked, and no other."""
    _, port = site

    @flow
    async def fleet() -> list[dict[str, str]]:
        return [await fleet_start.missing_hosts([unit(asked)]) for asked in (port, free_port())]

    found, lost = await fleet()
    assert found == {}
    assert list(lost) == [HOST]


async def test_a_fleet_is_taken_back_at_the_port_that_it_was_deployed_to(
    site: tuple[FakeSite, int], tmp_path: Path
) -> None:
    """The host is asked there, and the run of `rollback-container` is told."""
    host, port = site
    old, new = await host.deploy("v1"), await host.deploy("v2")
    way = [state for state in WorkflowState if not state.terminal and state is not WorkflowState.ROLLING_BACK]
    async with await Records.open(f"sqlite:///{tmp_path / 'records.db'}") as records:
        await records.create(
            NewWorkflow(
                workflow_id="w1",
                correlation_id="f1",
                container_name="web",
                remote_host=HOST,
                remote_port=port,
                image_tag="v2",
            )
        )
        for state, following in zip(way, [*way[1:], WorkflowState.COMPLETED], strict=True):
            await records.advance("w1", state, following, Facts(deployment_id=new))
        (wanted,) = await fleet_back.plan(Board("f1", [Place(unit(port))]), records)
    assert wanted[1] == {
        "remote_host": HOST,
        "remote_port": port,
        "container_name": "web",
        "to_version": old,
    }
