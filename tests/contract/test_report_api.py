"""What a host says of itself, over the real application with the fake engine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from blocks.receiver_client import ReceiverClient, ReceiverConfig, ReceiverRefused
from receiver import contract
from receiver.contract import (
    DeploymentConfig,
    DeployRequest,
    HostReport,
    HostState,
    PortMapping,
    Strategy,
)
from receiver.engine import PublishedPort
from receiver.ledger import Ledger
from receiver.proxy import Proxy
from receiver.routes import Routes, Target, route_for
from tests.contract.caller import KEY, Caller, FakeEngine, slug


async def report(caller: Caller, query: str = "") -> HostReport:
    """The answer to a signed call."""
    response = await caller.call("GET", f"{contract.HOST_PATH}{query}")
    assert response.status_code == 200, response.text
    return HostReport.model_validate_json(response.content)


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that this process listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


async def test_a_host_tells_engine_time_and_disks(caller: Caller) -> None:
    """With the device of each folder that a deployment writes to."""
    told = await report(caller)
    assert told.engine == contract.HostEngine(
        version="20.10.24", architecture="amd64", os="linux", storage_driver="overlay2"
    )
    assert abs(datetime.now(UTC) - told.time) < timedelta(seconds=5)
    state_dir = str(caller.app.state.service.settings.state_dir)
    disk = next(disk for disk in told.disks if disk.path == state_dir)
    assert 0 < disk.free_bytes <= disk.total_bytes
    assert disk.device
    assert (told.open_deployments, told.ports) == ([], [])


async def test_no_setting_that_is_told_holds_a_secret(caller: Caller) -> None:
    """The allow-list is told, the key is not."""
    told = await report(caller)
    assert told.settings["IP_WHITELIST"] == "127.0.0.0/8"
    assert KEY.decode() not in told.model_dump_json()
    assert not [name for name in told.settings if "KEY" in name]


async def test_a_port_is_free_or_held_by_a_process_or_a_container(
    caller: Caller, engine: FakeEngine, taken_port: int
) -> None:
    """In the order in which they were asked for; a container of ours is told by its name."""
    engine.published = (
        PublishedPort(18999, "udp", "web", "web"),
        PublishedPort(18998, "tcp", "other", None),
    )
    query = f"?port=18999/udp&port=18998&port={taken_port}/tcp&port=18999/tcp"
    ours, foreign, process, free = (await report(caller, query)).ports
    assert (ours.free, ours.holder, ours.container_name) == (False, "container web", "web")
    assert (foreign.free, foreign.holder, foreign.container_name) == (False, "container other", None)
    assert (process.port, process.free) == (taken_port, False)
    assert "(pid " in (process.holder or "")
    assert (free.port, free.protocol, free.free, free.holder) == (18999, "tcp", True, None)


@pytest.mark.parametrize("port", ["web", "0/tcp", "65536", "80/sctp", "8080%2Ftcp%20"])
async def test_a_port_that_is_none_is_malformed(caller: Caller, port: str) -> None:
    """The message says how to write one."""
    response = await caller.call("GET", f"{contract.HOST_PATH}?port={port}")
    assert (response.status_code, slug(response)) == (422, "malformed-request")
    assert "8080/tcp" in response.json()["detail"]


async def test_what_is_not_at_rest_is_told(caller: Caller) -> None:
    """An upload that waits, and a failed restore until a later deployment of the container is kept."""
    ledger: Ledger = caller.app.state.service.ledger
    broken = await announced_and_moved(ledger, HostState.RESTORING, HostState.RESTORE_FAILED)
    waiting, _ = ledger.create(DeployRequest(container_name="other"), HostState.RECEIVING)
    told = (await report(caller)).open_deployments
    assert [(found.deployment_id, found.state) for found in told] == [
        (broken, HostState.RESTORE_FAILED),
        (waiting.deployment_id, HostState.RECEIVING),
    ]
    assert not any(found.is_held for found in told)
    await announced_and_moved(ledger, HostState.PREPARED, HostState.SWITCHING, HostState.VALIDATING)
    kept = ledger.in_states(HostState.VALIDATING)[0].deployment_id
    ledger.move(kept, HostState.KEPT)
    assert [found.container_name for found in (await report(caller)).open_deployments] == ["other"]


async def announced_and_moved(ledger: Ledger, *way: HostState) -> str:
    """A deployment of `web` that went this way."""
    entry, _ = ledger.create(DeployRequest(container_name="web", image_tag="v1"), HostState.READY)
    for state in way:
        ledger.move(entry.deployment_id, state)
    return entry.deployment_id


@pytest.mark.parametrize("haproxy", ["haproxy", "no-such-proxy"])
async def test_the_proxy_is_told_to_those_who_ask(caller: Caller, haproxy: str) -> None:
    """A sender that knows no such field refuses it."""
    service = caller.app.state.service
    settings = replace(service.settings, haproxy=haproxy)
    caller.app.state.service = replace(service, settings=settings)
    is_there = Proxy(settings).is_there
    silent = await caller.call("GET", contract.HOST_PATH)
    assert "proxy" not in silent.json()
    nothing = (await report(caller, "?proxy=true")).proxy
    assert nothing
    assert (nothing.version is not None, nothing.runs, nothing.services) == (is_there, False, [])
    config = DeploymentConfig(
        strategy=Strategy.ROLLING, port_mappings=[PortMapping(host_port=1, container_port=1)]
    )
    routes = Routes(routes=(route_for("web", config, Target(container_id="one", ports={1: 20001})),))
    (settings.proxy_dir / "routes.json").write_text(routes.model_dump_json())
    dead = (await report(caller, "?proxy=true")).proxy
    assert dead
    assert (dead.runs, dead.services, dead.left_out) == (False, ["web"], [])


async def test_without_its_engine_a_host_tells_the_rest(caller: Caller, engine: FakeEngine) -> None:
    """200: what is wrong is what was asked for."""
    engine.down = True
    told = await report(caller, "?port=18997/tcp")
    assert told.engine is None
    assert [port.free for port in told.ports] == [True]
    assert told.disks


async def test_the_report_is_for_those_who_sign_and_are_on_the_list(caller: Caller) -> None:
    """401 without a signature and with another key; 403 from elsewhere, with the address to be added."""
    assert (await caller.send("GET", contract.HOST_PATH)).status_code == 401
    assert (await replace(caller, key=b"x" * 40).call("GET", contract.HOST_PATH)).status_code == 401
    foreign = await replace(caller, peer="10.9.9.9").call("GET", contract.HOST_PATH)
    assert (foreign.status_code, foreign.json()["extra"]) == (403, {"peer": "10.9.9.9"})


async def test_our_client_reads_the_report(caller: Caller) -> None:
    """As a model; a refusal rises with what the host said beside its words."""
    config = ReceiverConfig(base_url="http://receiver", signing_key=KEY)
    transport = httpx.ASGITransport(app=caller.app, client=("127.0.0.1", 50_000))
    async with ReceiverClient(config, transport=transport) as client:
        told = await client.report(["18997/tcp"])
        assert [(port.port, port.free) for port in told.ports] == [(18997, True)]
        assert (await client.report()).ports == []
        assert (await client.report(["18997/tcp"], proxy=True)).proxy
        assert (await client.report(proxy=True)).proxy
    elsewhere = httpx.ASGITransport(app=caller.app, client=("10.9.9.9", 50_000))
    async with ReceiverClient(config, transport=elsewhere) as client:
        with pytest.raises(ReceiverRefused) as refused:
            await client.report()
    assert refused.value.refusal.extra == {"peer": "10.9.9.9"}
