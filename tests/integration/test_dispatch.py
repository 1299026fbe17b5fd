"""Starting runs on a host and watching them, against a real Prefect server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.states import Cancelled, Completed, Pending, Running, Scheduled
from prefect.testing.utilities import prefect_test_harness
from pydantic import SecretStr

from blocks.hmac_secret import HmacSecret
from blocks.receiver_client import ReceiverRefused
from blocks.remote_host import RemoteHost
from receiver.contract import DeploymentStatus, HostFacts, HostState
from tasks import dispatch, outcome
from tasks.errors import DeploymentFailed, DeploymentLost, StageTimeout
from tasks.registration import ensure_work_pool

NEVER_SECONDS = 30.0


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    """A Prefect server and database of this module's own."""
    with prefect_test_harness():
        yield


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(dispatch, "RUN_POLL_SECONDS", 0.1)


def host_at(port: int) -> RemoteHost:
    """A host whose receiver is on loopback."""
    return RemoteHost(address="127.0.0.1", port=port, hmac_secret=HmacSecret(current=SecretStr("k" * 32)))


async def run_in(state: State[Any]) -> UUID:
    """A flow run that stands in `state`; nobody runs it."""

    @flow
    def receive_container() -> None: ...

    async with get_client() as client:
        run = await client.create_flow_run(receive_container, state=state)
    return run.id


def answer(state: HostState, *, is_held: bool = False) -> tuple[int, bytes]:
    """The receiver's answer to a question for the status."""
    now = datetime.now(UTC)
    status = DeploymentStatus(
        deployment_id="d1",
        workflow_id=None,
        container_name="web",
        image_tag="v1",
        state=state,
        is_held=is_held,
        upload_offset=0,
        package_bytes=None,
        facts=HostFacts(),
        operations=[],
        health_attempts=[],
        gates=[],
        created_at=now,
        updated_at=now,
    )
    return 200, status.model_dump_json().encode()


def problem(status: int) -> tuple[int, bytes]:
    """An answer that is no success."""
    told = {"type": "about:blank", "title": "No", "status": status, "detail": "not now", "next_step": "Wait."}
    return status, json.dumps(told).encode()


@asynccontextmanager
async def receiver(*answers: tuple[int, bytes] | None) -> AsyncIterator[RemoteHost]:
    """A receiver on loopback that gives these answers in turn, the last one for ever; None hangs up."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        given = left.pop(0) if len(left) > 1 else left[0]
        if given is not None:
            status, body = given
            head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield host_at(server.sockets[0].getsockname()[1])


@flow
async def follow(host: RemoteHost, run_id: UUID, seconds: float) -> DeploymentStatus:
    """`dispatch.follow` in a flow, for it logs."""
    return await dispatch.follow(host, "d1", run_id, outcome.has_ended, seconds)


# -- start -------------------------------------------------------------------------------------------


async def test_a_host_that_prefect_does_not_know_is_named_with_the_next_step() -> None:
    """The command that registers it."""

    @flow
    async def start() -> None:
        await dispatch.start_run_on_host("receive-container", host_at(8001), "d1", "w1")

    with pytest.raises(DeploymentFailed, match="no deployment 'receive-container/127-0-0-1'") as failed:
        await start()
    assert failed.value.next_step.endswith("python -m deployments.register --host 127-0-0-1")
    assert not failed.value.retryable


async def test_a_run_that_is_started_twice_is_one_run() -> None:
    """So an answer of the server that was lost does no harm."""

    @flow(name="receive-container")
    def receive_container(deployment_id: str) -> None: ...

    deployment = await receive_container.ato_deployment(name="127-0-0-1")
    await deployment.aapply()  # type: ignore[no-untyped-call, unused-ignore]

    @flow
    async def start(deployment_id: str) -> UUID:
        return await dispatch.start_run_on_host("receive-container", host_at(8001), deployment_id, "w1")

    first = await start("d1")
    assert await start("d1") == first
    assert await start("d2") != first
    async with get_client() as client:
        run = await client.read_flow_run(first)
    assert run.parameters == {"deployment_id": "d1"}
    assert "workflow:w1" in run.tags


async def test_a_work_pool_that_another_makes_at_the_same_moment_is_taken() -> None:
    """As a worker does that starts while its host is registered."""
    pools = await asyncio.gather(*(ensure_work_pool("at-the-same-moment") for _ in range(4)))
    assert len({pool.id for pool in pools}) == 1
    assert pools[0].type == "process"


# -- trouble -----------------------------------------------------------------------------------------


async def test_a_run_that_nobody_takes_is_told_with_the_workers_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the deadline, not before."""
    run_id, host = await run_in(Scheduled()), host_at(8001)
    await ensure_work_pool(host.work_pool_name)
    assert await dispatch.run_trouble(host, run_id, 1) is None
    monkeypatch.setattr(dispatch, "START_DEADLINE_SECONDS", 0.5)
    trouble = await dispatch.run_trouble(host, run_id, 1)
    assert trouble is not None
    assert "no worker of pool 'host-127-0-0-1' took the run" in str(trouble)
    assert "prefect worker start --pool host-127-0-0-1" in trouble.next_step


async def test_a_paused_pool_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not its worker that is away."""
    monkeypatch.setattr(dispatch, "START_DEADLINE_SECONDS", 0.5)
    run_id, host = await run_in(Scheduled()), host_at(8001)
    await ensure_work_pool(host.work_pool_name)
    async with get_client() as client:
        await client.update_work_pool(host.work_pool_name, WorkPoolUpdate(is_paused=True))
        try:
            trouble = await dispatch.run_trouble(host, run_id, 1)
        finally:
            await client.update_work_pool(host.work_pool_name, WorkPoolUpdate(is_paused=False))
    assert trouble is not None
    assert trouble.next_step == "prefect work-pool resume host-127-0-0-1, then deploy again."


async def test_a_run_that_its_worker_does_not_begin_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is there; its log says why."""
    monkeypatch.setattr(dispatch, "START_DEADLINE_SECONDS", 0.5)
    trouble = await dispatch.run_trouble(host_at(8001), await run_in(Pending()), 1)
    assert "took the run, but did not begin it" in str(trouble)


async def test_a_run_that_works_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: the stage has its own deadline."""
    monkeypatch.setattr(dispatch, "START_DEADLINE_SECONDS", 0.5)
    assert await dispatch.run_trouble(host_at(8001), await running(), 100) is None


# -- follow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [Completed(message="done"), Cancelled(message="by a person")])
async def test_a_run_that_ended_while_the_host_still_waits_is_told(ended: State[Any]) -> None:
    """With Prefect's message and the run to look at."""
    run_id = await run_in(ended)
    async with receiver(answer(HostState.READY)) as host:
        with pytest.raises(DeploymentFailed, match=f"before it began to work: {ended.message}") as failed:
            await follow(host, run_id, NEVER_SECONDS)
    assert str(run_id) in failed.value.next_step


async def running() -> UUID:
    """A run that Prefect has RUNNING, whatever became of its process."""
    run_id = await run_in(Scheduled())
    async with get_client() as client:
        await client.set_flow_run_state(run_id, Running())
    return run_id


async def test_a_run_whose_process_died_before_it_began_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect has it RUNNING for ever; the host has nobody who works on the deployment."""
    monkeypatch.setattr(dispatch, "DEAD_AFTER_SECONDS", 0.3)
    async with receiver(answer(HostState.READY)) as host:
        with pytest.raises(DeploymentFailed, match="the run on the host died"):
            await follow(host, await running(), NEVER_SECONDS)


async def test_a_host_that_works_on_a_waiting_package_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long load of the image is no death."""
    monkeypatch.setattr(dispatch, "DEAD_AFTER_SECONDS", 0.0)
    told = [answer(HostState.READY, is_held=True)] * 40
    async with receiver(*told, answer(HostState.KEPT)) as host:
        assert (await follow(host, await running(), NEVER_SECONDS)).state is HostState.KEPT


async def test_a_host_that_began_while_prefect_was_asked_is_followed_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run has ended by then, and the answer that the host waits is an old one."""
    run_id = await run_in(Completed())
    asked: list[int] = []
    look = dispatch.run_trouble

    async def look_and_count(*given: Any) -> DeploymentFailed | None:
        asked.append(1)
        return await look(*given)

    monkeypatch.setattr(dispatch, "run_trouble", look_and_count)
    monkeypatch.setattr(dispatch, "RUN_POLL_SECONDS", 0)
    async with receiver(answer(HostState.READY), answer(HostState.SWITCHING), answer(HostState.KEPT)) as host:
        assert (await follow(host, run_id, NEVER_SECONDS)).state is HostState.KEPT
    assert asked  # Prefect said that the run had ended, and the host was asked once more


@pytest.mark.parametrize("trouble", [None, problem(503), problem(429), problem(500)], ids=str)
async def test_a_receiver_that_is_away_or_busy_is_asked_again(trouble: tuple[int, bytes] | None) -> None:
    """A restart of the daemon in mid-deployment is no failure, nor is its run's end meanwhile."""
    run_id = await run_in(Completed())
    told = [answer(HostState.SWITCHING), *[trouble] * 12, answer(HostState.KEPT)]
    async with receiver(*told) as host:
        assert (await follow(host, run_id, NEVER_SECONDS)).state is HostState.KEPT


async def test_a_receiver_that_refuses_is_not_asked_again() -> None:
    """A wrong key stays wrong."""
    run_id = await run_in(Running())
    async with receiver(problem(401), answer(HostState.KEPT)) as host:
        with pytest.raises(ReceiverRefused):
            await follow(host, run_id, NEVER_SECONDS)


@pytest.mark.parametrize(
    ("given", "word"),
    [(answer(HostState.VALIDATING), "validating"), (None, "unreachable")],
    ids=["slow", "gone"],
)
async def test_a_stage_without_end_says_where_the_host_stood(
    given: tuple[int, bytes] | None, word: str
) -> None:
    """TIMEOUT, with the last that was heard."""
    run_id = await run_in(Running())
    async with receiver(given) as host:
        with pytest.raises(StageTimeout, match=f"the host was {word} for"):
            await follow(host, run_id, 0.5)


async def test_the_last_status_is_none_where_there_is_nobody_to_ask() -> None:
    """No deployment yet, or no host; one that its host has forgotten is lost, which is not the same."""

    @flow
    async def ask(host: RemoteHost, deployment_id: str | None) -> DeploymentStatus | None:
        return await dispatch.last_status(host, deployment_id)

    assert await ask(host_at(8001), None) is None
    async with receiver(problem(404)) as host:
        with pytest.raises(DeploymentLost):
            await ask(host, str(uuid4()))
    assert await ask(host, "d1") is None  # it has hung up
    async with receiver(answer(HostState.KEPT)) as host:
        found = await ask(host, "d1")
    assert found is not None
    assert found.state is HostState.KEPT
