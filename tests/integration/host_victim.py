"""A process that takes a deployment's steps and stops short at a chosen point, to be killed there."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from receiver.locks import FIRST_STEP_SECONDS, GRACE_SECONDS
from receiver.operations import Host
from tests.integration.host_rig import open_host, take_up_to

# Each call that changes the engine, or moves the deployment on, in the order of a deployment that replaces
# a running container. "Before" one is "after" the one above it.
POINTS = (
    "tag_image",
    "create_container",
    "move to prepared",
    "move to switching",
    "set_restart_policy",
    "stop",
    "rename",
    "rename again",
    "start",
    "move to validating",
    "move to kept",
)
# The same for a rolling deployment, where the new container starts beside the old one.
ROLLING_POINTS = (
    *("create_container", "start", "move to validating", "move to moving", "rename"),
    *("move to draining", "set_restart_policy", "stop", "move to kept"),
)
_ENGINE_CALLS = ("tag_image", "create_container", "set_restart_policy", "stop", "rename", "start")
_processes = get_context("forkserver")


@contextmanager
def victims(host: Host, docker_socket: Path, points: dict[str, str]) -> Iterator[None]:
    """One process per deployment id, each stopped short before its point; SIGKILL at the block's end."""
    _processes.set_forkserver_preload([__name__])
    started = []
    for deployment_id, point in points.items():
        reached = _processes.Event()
        where = (host.settings.state_dir, docker_socket, deployment_id, point, reached)
        process = _processes.Process(target=_be_victim, args=where, daemon=True)
        process.start()
        started.append((point, process, reached))
    try:
        for point, process, reached in started:
            assert reached.wait(30), f"the process never came to {point!r}: exit code {process.exitcode}"
        yield
    finally:
        for _, process, _ in started:
            process.kill()
            process.join(10)
    assert {process.exitcode for _, process, _ in started} == {-signal.SIGKILL}


@contextmanager
def hanging_victim(host: Host, docker_socket: Path, deployment_id: str, point: str) -> Iterator[None]:
    """A process that stops short before its point, long after its step should have ended."""
    _processes.set_forkserver_preload([__name__])
    reached = _processes.Event()
    where = (host.settings.state_dir, docker_socket, deployment_id, point, reached)
    process = _processes.Process(target=_be_victim, args=(*where, -GRACE_SECONDS), daemon=True)
    process.start()
    try:
        assert reached.wait(30), f"the process never came to {point!r}: exit code {process.exitcode}"
        yield
        process.join(20)
        assert process.exitcode == -signal.SIGKILL, "the guardian ends it"
    finally:
        process.kill()
        process.join(10)


def _be_victim(
    state_dir: Path,
    docker_socket: Path,
    deployment_id: str,
    point: str,
    reached: Event,
    seconds: float = FIRST_STEP_SECONDS,
) -> None:
    host = open_host(state_dir, docker_socket)
    _stop_short(host, point, reached)
    with host.hold(deployment_id) as hold:
        hold.within(seconds)
        asyncio.run(take_up_to(host.operations(deployment_id), "keep"))


def _stop_short(host: Host, point: str, reached: Event) -> None:
    seen: list[str] = []

    def come_to(call: str) -> None:
        seen.append(f"{call} again" if call in seen else call)
        if seen[-1] == point:
            reached.set()
            time.sleep(600)

    for name in _ENGINE_CALLS:
        setattr(host.engine, name, _told(name, getattr(host.engine, name), come_to))
    move = host.ledger.move

    def told_move(deployment_id: str, to_state: Any, **news: Any) -> Any:
        come_to(f"move to {to_state}")
        return move(deployment_id, to_state, **news)

    setattr(host.ledger, "move", told_move)  # noqa: B010 - mypy knows no assignment to a method


def _told(name: str, call: Callable[..., Any], come_to: Callable[[str], None]) -> Callable[..., Any]:
    def told(*arguments: Any) -> Any:
        come_to(name)
        return call(*arguments)

    return told
