"""One deployment at a time per container and host, on both databases: held once, and never by the dead."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from deployments.register import limit_deployments
from tasks.active import DeploymentUnderWay, alone, held_if_free, settling_if_free, slot
from tasks.records import NewWorkflow, Records

PROJECT = Path(__file__).resolve().parents[2]
HOLDER = """
import asyncio, sys
from tasks.active import held_if_free
from tasks.records import Records

async def main(url):
    async with await Records.open(url) as records, held_if_free(records, "web", "host-b") as is_held:
        print(is_held, flush=True)
        await asyncio.sleep(600)

asyncio.run(main(sys.argv[1]))
"""


async def test_a_container_on_a_host_is_held_once(records_url: str) -> None:
    """Another container, or the same on another host, is free."""
    async with await Records.open(records_url) as records:
        async with held_if_free(records, "web", "host-b") as first:
            async with held_if_free(records, "web", "host-b") as again:
                assert (first, again) == (True, False)
            async with held_if_free(records, "web", "host-c") as elsewhere:
                assert elsewhere
        async with held_if_free(records, "web", "host-b") as afterwards:
            assert afterwards


async def test_a_deployment_waits_while_the_one_before_it_is_being_ended(records_url: str) -> None:
    """Whoever ends a dead run's workflow is no deployment: nobody is refused for it."""
    async with await Records.open(records_url) as records:
        began = asyncio.Event()

        async def settle() -> None:
            async with settling_if_free(records, "web", "host-b") as is_held:
                assert is_held
                began.set()
                await asyncio.sleep(1.5)

        settling = asyncio.create_task(settle())
        await began.wait()
        async with alone(records, "web", "host-b", 0, print):
            assert settling.done()
            async with settling_if_free(records, "web", "host-b") as is_held:
                assert not is_held
        await settling


async def test_a_killed_holder_holds_nothing(records_url: str) -> None:
    """SIGKILL frees the container, with nothing to clear up."""
    async with await Records.open(records_url) as records:
        holder = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLDER, records_url, stdout=asyncio.subprocess.PIPE, cwd=PROJECT
        )
        try:
            assert holder.stdout is not None
            assert await asyncio.wait_for(holder.stdout.readline(), 60) == b"True\n"
            async with held_if_free(records, "web", "host-b") as is_held:
                assert not is_held
        finally:
            holder.kill()
            await holder.wait()
        async with asyncio.timeout(60), alone(records, "web", "host-b", 50, print):
            pass


async def test_who_is_refused_is_told_who_deploys_since_when(records_url: str) -> None:
    """At once, or after the time that it may wait."""
    async with await Records.open(records_url) as records, alone(records, "web", "host-b", 0, print):
        new = NewWorkflow(workflow_id="w-1", container_name="web", remote_host="host-b", image_tag="v7")
        record = await records.create(new)
        since = record.created_at.isoformat(timespec="seconds")
        told: list[str] = []
        with pytest.raises(DeploymentUnderWay, match="web on host-b is being deployed") as refused:
            async with alone(records, "web", "host-b", 1.5, told.append):
                pytest.fail("two deployments at once")
        assert f"(v7, PENDING) since {since} by w-1" in str(refused.value)
        assert len(told) == 1


async def test_no_more_deployments_at_once_than_the_limit_allows() -> None:
    """MAX_CONCURRENT_DEPLOYMENTS=2: of five that want to deploy, two do at any moment, and all in the end."""
    at_work, most, done = 0, 0, 0

    async def deploy() -> None:
        nonlocal at_work, most, done
        async with slot():
            at_work += 1
            most = max(most, at_work)
            await asyncio.sleep(0.2)
            at_work -= 1
            done += 1

    with prefect_test_harness(server_startup_timeout=60):
        await limit_deployments(2)
        async with asyncio.timeout(120):
            await asyncio.gather(*(deploy() for _ in range(5)))
    assert (most, done) == (2, 5)
