"""Progress artifacts against a real Prefect server: what is shown, how often, and what it costs the work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.testing.utilities import prefect_test_harness

from tasks import progress


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    """A Prefect server of this module's own."""
    with prefect_test_harness():
        yield


async def wait_for(key: str, data: float) -> Artifact:
    """The artifact once it says so; updates are sent beside the work."""
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    deadline = time.monotonic() + 20
    async with get_client() as client:
        while True:
            found = await client.read_artifacts(artifact_filter=wanted)
            if found and found[0].data == data:
                assert len(found) == 1
                return found[0]
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.02)


async def test_work_is_shown_as_it_goes_on_and_ends_at_a_hundred() -> None:
    """Told from a thread, as the builder does it; one artifact, of the run that works."""

    @flow
    async def work() -> None:
        async with progress.shown("build-web", "Building web:v2") as tell:
            await asyncio.to_thread(tell, 40.0, "RUN make")
            assert (await wait_for("build-web", 40)).description == "Building web:v2: RUN make"
        assert (await wait_for("build-web", 100)).description == "Building web:v2: done"

    await work()
    assert (await wait_for("build-web", 100)).flow_run_id is not None


async def test_work_that_fails_is_left_where_it_broke_off() -> None:
    """And its own error rises."""

    async def break_off() -> None:
        async with progress.shown("build-bad", "Building bad:v1") as tell:
            tell(25.0, "RUN false")
            raise ZeroDivisionError

    @flow
    async def work() -> None:
        with pytest.raises(ZeroDivisionError):
            await break_off()
        assert (await wait_for("build-bad", 25)).description == "Building bad:v1: broke off"

    await work()


async def test_a_thousand_news_are_one_update_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is sent, the others are passed over."""
    sent: list[float] = []

    async def create(percent: float, *_: Any) -> int:
        sent.append(percent)
        return 1

    async def update(_: int, percent: float, *__: Any) -> None:
        sent.append(percent)

    monkeypatch.setattr(progress, "acreate_progress_artifact", create)
    monkeypatch.setattr(progress, "aupdate_progress_artifact", update)
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.2)
    async with progress.shown("k", "work") as tell:
        began = time.monotonic()
        for number in range(1000):
            tell(number / 10, "")
            await asyncio.sleep(0.0005)
        ticks = (time.monotonic() - began) / 0.2
    await asyncio.gather(*progress._sending)
    assert sent == sorted(sent)
    assert sent[-1] == 100
    assert 2 < len(sent) <= ticks + 3


async def test_a_server_that_takes_nothing_neither_delays_nor_fails_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is only shown is given up."""

    async def hang(*_: Any) -> NoReturn:
        await asyncio.sleep(3600)
        raise AssertionError

    async def refuse(*_: Any) -> NoReturn:
        raise httpx.ConnectError("away")

    @flow
    async def work() -> float:
        began = time.monotonic()
        async with progress.shown("k", "work") as tell:
            tell(50, "")
            await asyncio.sleep(0)
        return time.monotonic() - began

    for broken in (hang, refuse):
        monkeypatch.setattr(progress, "acreate_progress_artifact", broken)
        assert await work() < 1
