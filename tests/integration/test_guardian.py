"""A dead process leaves nothing behind: the guardian brings the old container back, by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from uuid import uuid4

import pytest

from receiver import operations as module
from receiver.contract import ErrorCode, HostState
from receiver.guardian import Guardian
from receiver.operations import Operations
from tests.integration.host_rig import Rig, assert_serves, host_rig, take_up_to
from tests.integration.host_victim import POINTS, hanging_victim, victims

S = HostState


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One host for all tests here; each has container names of its own."""
    with host_rig() as found:
        yield found


@pytest.fixture
def guardian(rig: Rig) -> Guardian:
    """A guardian of the host, as the daemon has one."""
    return Guardian(rig.host, interval_seconds=0.05)


@pytest.fixture(autouse=True)
def _short_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restored container is looked at again after 0.2 s instead of 1 s."""
    monkeypatch.setattr(module, "RESTORED_QUIET_SECONDS", 0.2)


@pytest.fixture
def name() -> str:
    """A container name of the test's own."""
    return f"svc-{uuid4().hex[:10]}"


async def until_restored(
    rig: Rig, operations: Operations, go_on: Callable[[], Awaitable[None]], deadline_seconds: float = 30
) -> None:
    """Return when the deployment is restored; fail at the deadline."""
    deadline = time.monotonic() + deadline_seconds
    while rig.state(operations) is not S.RESTORED:
        assert time.monotonic() < deadline, f"not in {deadline_seconds} s: {rig.state(operations)}"
        await go_on()


async def test_a_process_killed_anywhere_costs_nothing(rig: Rig, guardian: Guardian) -> None:
    """Wherever SIGKILL hits, one look later the old container runs under its name and policy, alone."""
    names = {point: f"svc-{uuid4().hex[:10]}" for point in POINTS}
    old = {point: rig.serve(name, "always") for point, name in names.items()}
    made = {point: rig.announce(name) for point, name in names.items()}
    points = {operations.deployment_id: point for point, operations in made.items()}
    with victims(rig.host, rig.node.docker_socket, points):
        await guardian.look()
        assert guardian.actions == 0, "the guardian took a deployment whose process lives"
    await guardian.look()
    for point, name in names.items():
        assert rig.state(made[point]) is S.RESTORED, point
        assert_serves(rig, old[point], name, "always")
    assert guardian.actions == len(POINTS)
    await guardian.look()
    assert guardian.actions == len(POINTS)


async def test_a_first_deployment_that_was_killed_leaves_nothing(
    rig: Rig, guardian: Guardian, name: str
) -> None:
    """There was no old container, so there is none afterwards."""
    operations = rig.announce(name)
    with victims(rig.host, rig.node.docker_socket, {operations.deployment_id: "move to kept"}):
        assert rig.names(name) == [name]
    await guardian.look()
    assert rig.state(operations) is S.RESTORED
    assert rig.names(name) == []


async def test_a_deployment_that_waits_for_its_first_step_is_left_alone(
    rig: Rig, guardian: Guardian, name: str
) -> None:
    """Ready and not begun is no unfinished work."""
    operations = rig.announce(name)
    await guardian.look()
    assert rig.state(operations) is S.READY


async def test_a_failure_that_asked_for_no_rollback_is_left_alone(
    rig: Rig, guardian: Guardian, name: str
) -> None:
    """Who said rollback_on_failure=False wants to look at the failed container."""
    rig.serve(name)
    operations = rig.announce(name, rollback_on_failure=False)
    await take_up_to(operations, "start_container")
    operations.fail(ErrorCode.HEALTH_CHECK_FAILED, "HTTP 500, expected 200")
    await guardian.look()
    assert rig.state(operations) is S.FAILED
    assert rig.docker.containers.get(name).id == operations.entry.facts.container_id


async def test_a_killed_switch_is_undone_also_without_rollback_on_failure(
    rig: Rig, guardian: Guardian, name: str
) -> None:
    """A process that died decided nothing: the old container serves again."""
    old = rig.serve(name)
    operations = rig.announce(name, rollback_on_failure=False)
    with victims(rig.host, rig.node.docker_socket, {operations.deployment_id: "start"}):
        pass
    await guardian.look()
    assert rig.state(operations) is S.RESTORED
    assert_serves(rig, old, name)


async def test_a_restore_that_cannot_work_is_told_once_and_not_repeated(
    rig: Rig, guardian: Guardian, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The previous container is gone: a person is called, the next look leaves it alone."""
    old = rig.serve(name)
    operations = rig.announce(name)
    await take_up_to(operations, "stop_existing_container")
    old.remove(force=True)
    await guardian.look()
    await guardian.look()
    assert rig.state(operations) is S.RESTORE_FAILED
    assert [record.levelname for record in caplog.records if name in str(vars(record))] == ["CRITICAL"]


async def test_a_running_guardian_restores_without_being_asked(
    rig: Rig, guardian: Guardian, name: str
) -> None:
    """It looks again and again."""
    old = rig.serve(name)
    operations = rig.announce(name)
    watch = asyncio.create_task(guardian.run())
    try:
        with rig.host.hold(operations.deployment_id):
            await take_up_to(operations, "start_container")
        await until_restored(rig, operations, lambda: asyncio.sleep(0.05))
    finally:
        watch.cancel()
    assert_serves(rig, old, name)


async def test_a_process_that_hangs_is_ended_at_its_deadline(rig: Rig, guardian: Guardian, name: str) -> None:
    """A stopped process holds the container for no longer than its step may take."""
    old = rig.serve(name)
    operations = rig.announce(name)
    with hanging_victim(rig.host, rig.node.docker_socket, operations.deployment_id, "start"):
        await guardian.look()
        await until_restored(rig, operations, guardian.look)
    assert_serves(rig, old, name)


async def test_an_engine_that_comes_back_later_is_waited_for(rig: Rig, guardian: Guardian, name: str) -> None:
    """While the engine is down nothing is given up; once it answers, the old container serves."""
    old = rig.serve(name)
    operations = rig.announce(name)
    await take_up_to(operations, "start_container")
    dockerd = rig.node.services["dockerd"]
    dockerd.kill()
    await guardian.look()
    assert rig.state(operations) is S.RESTORING
    assert guardian.actions == 0
    (dockerd.cwd / "dockerd.pid").unlink()
    dockerd.start()
    await until_restored(rig, operations, guardian.look)
    assert guardian.actions == 1
    assert_serves(rig, old, name)
