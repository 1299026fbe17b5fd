"""The streaming sender against the real receiver: cuts, restarts, and bytes of another sender."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import httpx
import pytest
from blake3 import blake3
from fastapi import FastAPI

from blocks import package_stream
from blocks.package_stream import Replaced
from blocks.receiver_client import ReceiverClient, ReceiverConfig, ReceiverRefused, ReceiverUnreachable
from receiver import packages
from receiver.contract import DeploymentStatus, HostState, PackageAnnouncement
from tests.contract.caller import KEY, Caller, announcement
from tests.contract.conftest import MakeApp
from tests.contract.test_stream import PACKAGE, opened

CHUNK_BYTES = 500_000
Fault = Callable[[httpx.Request, int], bool]


@pytest.fixture(autouse=True, params=[0, math.inf], ids=["one by one", "sent ahead"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick way to the host, and a slow one."""
    monkeypatch.setattr(package_stream, "SLOW_BYTES_PER_SECOND", request.param)


@dataclass
class Growing:
    """A package of which `here` bytes are made; each read makes one chunk more."""

    whole: bytes = PACKAGE
    here: int = 0
    replaced_at: int | None = None
    was_replaced: bool = False
    told: bytes | None = None

    async def look(self) -> None:
        """Nothing changes by looking."""

    async def read(self, offset: int, size_bytes: int, /) -> bytes:
        self.here = max(self.here, offset + size_bytes)
        if self.replaced_at is not None and offset >= self.replaced_at:
            self.whole, self.replaced_at = self.whole[::-1], None
            raise Replaced
        return self.whole[offset : offset + size_bytes]

    async def digest(self, size_bytes: int, /) -> str | None:
        if size_bytes > len(self.whole):
            return None
        return blake3(self.whole[:size_bytes]).hexdigest()

    def announcement(self) -> PackageAnnouncement | None:
        return announcement(self.told or self.whole) if self.here >= len(self.whole) else None


@dataclass
class Wire(httpx.AsyncBaseTransport):
    """The way to the receiver: counts what is sent, and breaks where `fault` says so.

    A broken call never came there, or its answer is lost.
    """

    app: FastAPI
    fault: Fault = lambda _request, _number: False
    loses_answers: bool = False
    calls: list[str] = field(default_factory=list)
    sent_bytes: int = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request.method)
        breaks = self.fault(request, len(self.calls))
        if breaks and not self.loses_answers:
            raise httpx.ReadError("cut")
        inner = httpx.ASGITransport(app=self.app, client=("127.0.0.1", 50_000))
        answer = await inner.handle_async_request(request)
        if breaks:
            raise httpx.ReadError("cut")
        if request.method == "PATCH" and answer.status_code == 204:
            self.sent_bytes += len(request.content)
        return answer


@asynccontextmanager
async def client_over(wire: Wire) -> AsyncIterator[ReceiverClient]:
    """A client that does not wait long."""
    config = ReceiverConfig("http://receiver", KEY, first_pause_seconds=0.001)
    async with ReceiverClient(config, transport=wire) as client:
        yield client


async def send(wire: Wire, deployment_id: str, source: Growing) -> tuple[int, DeploymentStatus]:
    """Send it; the bytes that the host took, and what it says then."""
    async with client_over(wire) as client:
        taken = await package_stream.send(client, deployment_id, source, chunk_bytes=CHUNK_BYTES)
        return taken, await client.status(deployment_id)


async def test_a_package_is_sent_while_it_grows_and_announced_at_its_end(app: FastAPI) -> None:
    """One look, the chunks, and one announcement, which makes it ready."""
    wire = Wire(app)
    taken, status = await send(wire, await opened(Caller(app)), Growing())
    after_the_first = CHUNK_BYTES // (2 if package_stream.SLOW_BYTES_PER_SECOND else 1)
    chunks = 1 - (CHUNK_BYTES - len(PACKAGE)) // after_the_first
    assert (taken, status.state, status.package_bytes) == (len(PACKAGE), HostState.READY, len(PACKAGE))
    assert wire.calls == ["HEAD", *["PATCH"] * chunks, "POST", "GET"]


async def test_a_finished_package_is_announced_at_once(app: FastAPI) -> None:
    """The host knows its size from the first byte on."""
    wire = Wire(app)
    _, status = await send(wire, await opened(Caller(app)), Growing(here=len(PACKAGE)))
    assert status.state is HostState.READY
    assert wire.calls[:4] == ["HEAD", "POST", "HEAD", "PATCH"]


@pytest.mark.parametrize("loses_answers", [False, True], ids=["calls are lost", "answers are lost"])
async def test_each_third_call_is_cut_and_no_byte_goes_twice(app: FastAPI, loses_answers: bool) -> None:
    """In the middle of a layer or at the end: it goes on with what the host holds."""
    wire = Wire(app, fault=lambda _request, number: number % 3 == 0, loses_answers=loses_answers)
    deployment_id = await opened(Caller(app))
    async with client_over(wire) as client:
        taken = await package_stream.send(client, deployment_id, Growing(), chunk_bytes=CHUNK_BYTES)
    assert (await Caller(app).status(deployment_id)).state is HostState.READY
    assert wire.sent_bytes <= taken == len(PACKAGE)


async def test_a_receiver_that_starts_again_in_the_middle_is_gone_on_with(make_app: MakeApp) -> None:
    """Its running hash is lost, and made again from its file."""
    wire = Wire(make_app())
    deployment_id = await opened(Caller(wire.app))

    def restart(request: httpx.Request, _number: int) -> bool:
        began_again = request.method == "PATCH" and wire.sent_bytes == 2 * CHUNK_BYTES and not restarted
        if began_again:
            restarted.append(True)
            wire.app = make_app()
        return began_again

    restarted: list[bool] = []
    wire.fault = restart
    taken, status = await send(wire, deployment_id, Growing())
    assert (restarted, taken, status.state) == ([True], len(PACKAGE), HostState.READY)
    assert wire.sent_bytes == len(PACKAGE)


async def test_a_dead_sender_s_bytes_are_gone_on_with_when_they_are_the_same(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the digest of what is held; others are dropped, and the whole is sent."""
    monkeypatch.setattr(packages, "ORPHANED_AFTER", timedelta(0))
    for begun, sent_bytes in ((PACKAGE[:CHUNK_BYTES], len(PACKAGE) - CHUNK_BYTES), (b"other", len(PACKAGE))):
        await Caller(app).patch(await opened(Caller(app)), 0, begun)
        wire = Wire(app)
        taken, status = await send(wire, await opened(Caller(app)), Growing())
        assert (taken, wire.sent_bytes, status.state) == (sent_bytes, sent_bytes, HostState.READY)


async def test_a_package_that_is_made_anew_with_other_bytes_is_sent_anew(app: FastAPI) -> None:
    """Its writer died: what the host holds is not the beginning of the new one."""
    source = Growing(replaced_at=2 * CHUNK_BYTES)
    wire = Wire(app)
    _, status = await send(wire, await opened(Caller(app)), source)
    assert (status.state, wire.calls.count("DELETE")) == (HostState.READY, 1)
    assert wire.sent_bytes == 2 * CHUNK_BYTES + len(PACKAGE)


async def test_a_wrong_announcement_is_the_end(app: FastAPI) -> None:
    """Not tried again: the bytes are gone from the host."""
    deployment_id = await opened(Caller(app))
    with pytest.raises(ReceiverRefused, match="BLAKE3"):
        await send(Wire(app), deployment_id, Growing(told=PACKAGE[::-1]))
    assert (await Caller(app).status(deployment_id)).state is HostState.REJECTED


async def test_a_host_that_stays_away_is_given_up(app: FastAPI) -> None:
    """After as many tries as were asked for."""
    wire = Wire(app, fault=lambda request, _number: request.method == "PATCH")
    async with client_over(wire) as client:
        with pytest.raises(ReceiverUnreachable):
            await package_stream.send(client, await opened(Caller(app)), Growing(), max_resumes=2)
    assert wire.calls.count("PATCH") == 3
