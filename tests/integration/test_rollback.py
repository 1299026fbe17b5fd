"""`rollback-container` and `list-versions` against a real receiver and engine, and a real Prefect server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import uvicorn
from prefect import State, flow
from prefect.testing.utilities import prefect_test_harness
from pydantic import SecretBytes, SecretStr

from blocks.hmac_secret import HmacSecret
from blocks.remote_host import RemoteHost
from flows.rollback import rollback_container
from flows.versions import list_versions
from receiver.app import create_app
from receiver.contract import HostState
from receiver.operations import RestoreFailed
from tests.contract.caller import KEY
from tests.integration.host_rig import Rig, host_rig, take_up_to
from tests.services import free_port

DEADLINE_SECONDS = 60


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    """A Prefect server that knows no work pool of the host: its worker is gone."""
    with prefect_test_harness(server_startup_timeout=60):
        yield


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One host for all tests here."""
    with host_rig() as found:
        yield found


@pytest.fixture
def name() -> str:
    """A container name of the test's own."""
    return f"svc-{uuid4().hex[:10]}"


@pytest.fixture
async def port(rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[int]:
    """The host's receiver on loopback; the control host has its key."""
    monkeypatch.setenv("HMAC_SECRET_KEY", KEY.decode())
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path))
    settings = replace(rig.host.settings, hmac_keys=(SecretBytes(KEY),))
    app = create_app(settings, ledger=rig.host.ledger, engine=rig.host.engine)
    number = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=number, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield number
    server.should_exit = True
    await serving


async def until(fact: Callable[[], bool]) -> None:
    """Return when the fact holds; fail at the deadline."""
    for _ in range(DEADLINE_SECONDS * 50):
        if fact():
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"not within {DEADLINE_SECONDS} s")


async def run(**parameters: Any) -> State[Any]:
    """How a run of `rollback-container` ends."""
    state: State[Any] = await rollback_container(
        **{"remote_host": "127.0.0.1", **parameters}, return_state=True
    )
    return state


async def test_a_restore_that_failed_is_tried_again(rig: Rig, name: str, port: int) -> None:
    """While its cause is there the run ends Failed and says why; without it the old container serves."""
    old = rig.serve(name)
    operations = rig.announce(name)
    await take_up_to(operations, "stop_existing_container")
    intruder = rig.serve(name)
    with pytest.raises(RestoreFailed):
        await rig.host.restore(operations.deployment_id)
    asked = {"remote_port": port, "deployment_id": operations.deployment_id}
    hopeless = await run(**asked)
    assert hopeless.is_failed()
    assert str(hopeless.message).startswith("not rolled back: ")
    assert "is held by container" in str(hopeless.message)
    assert "\n" not in str(hopeless.message)
    intruder.remove(force=True)
    mended = await run(**asked)
    assert mended.is_completed(), mended.message
    assert (await mended.aresult())["previous_container_restored"]
    assert rig.fresh(old).status == "running"
    assert rig.state(operations) is HostState.RESTORED


async def test_a_deployment_that_is_kept_is_not_undone_and_the_caller_has_the_result(
    rig: Rig, name: str, port: int
) -> None:
    """As a subflow the result reaches its caller, though the run ends Failed."""
    kept = await rig.deploy(name, "v1")

    @flow
    async def parent() -> Any:
        state = await run(remote_port=port, deployment_id=kept.deployment_id)
        return state.is_failed(), await state.aresult(raise_on_failure=False)

    is_failed, undone = await parent()
    assert is_failed
    assert (undone["success"], undone["host_state"]) == (False, "kept")
    assert rig.docker.containers.get(name).status == "running"


async def test_a_host_that_is_away_is_told_in_the_run_s_message(name: str, port: int) -> None:
    """Nothing was begun."""
    ended = await run(remote_port=free_port(), container_name=name)
    assert ended.is_failed()
    assert str(ended.message).startswith("REMOTE_ENDPOINT_UNREACHABLE: ")


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({}, "neither was given"),
        ({"container_name": "web", "deployment_id": "d-1"}, "both were given"),
        ({"deployment_id": "d-1", "to_version": "v1"}, "to_version"),
    ],
    ids=["neither", "both", "a version of a deployment"],
)
async def test_it_must_be_clear_what_is_rolled_back(parameters: dict[str, Any], named: str) -> None:
    """Refused before the host is asked, with what to give."""
    refused = await run(**parameters)
    assert refused.is_failed()
    assert "ParametersRefused" in str(refused.message)
    assert named in str(refused.message)


async def test_every_saved_host_is_listed_and_one_that_is_silent_is_named(
    rig: Rig, name: str, port: int
) -> None:
    """The rows of the others are there all the same; an unknown name has none."""
    await rig.deploy(name, "v1")
    secret = HmacSecret(current=SecretStr(KEY.decode()))
    await secret.save("listed", overwrite=True)
    saved = await HmacSecret.load("listed")
    await RemoteHost(address="127.0.0.1", port=port, hmac_secret=saved).save("listed-a", overwrite=True)
    rows = await list_versions(container_name=name)
    assert isinstance(rows, list)
    assert [(row["remote_host"], row["image_tag"], row["role"]) for row in rows] == [
        ("listed-a", "v1", "running")
    ]
    assert await list_versions(remote_host="listed-a", container_name="nobody") == []
    await RemoteHost(address="127.0.0.1", port=free_port(), hmac_secret=saved).save("listed-b")
    state: State[Any] = await list_versions(container_name=name, return_state=True)
    assert state.is_failed()
    assert "listed-b: " in str(state.message)
    assert await state.aresult(raise_on_failure=False) == rows
