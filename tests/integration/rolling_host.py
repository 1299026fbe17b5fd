"""What happens on a host with rolling services; run in the host's network, where its ports are.

python -m tests.integration.rolling_host SCENARIO STATE_FOLDER DOCKER_SOCKET
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from docker import DockerClient

from deployments.lab import Host as Node
from receiver import operations
from receiver.contract import ErrorCode, HealthCheckConfig, HostState
from receiver.guardian import Guardian
from receiver.operations import Operations
from receiver.proxy import Proxy
from tests.integration.host_rig import Rig, open_host, take, take_up_to
from tests.integration.host_victim import ROLLING_POINTS, victims
from tests.load import ask, load

S = HostState
UPDATES = 10
SLOW = "/cgi-bin/slow"
WEB = (
    "mkdir -p /www/cgi-bin && echo $VERSION > /www/index.html && "
    "printf '#!/bin/sh\\necho; sleep 2; echo '$VERSION > /www/cgi-bin/slow && chmod +x /www/cgi-bin/slow && "
    "exec httpd -f -p 80 -h /www"
)
HEALTH = HealthCheckConfig(health_endpoint="/", quiet_period_ms=100, max_retries=5, retry_interval_ms=200)


def announce(rig: Rig, name: str, version: str, port: int, **config: Any) -> Operations:
    """A deployment of the web service."""
    return rig.announce(
        name,
        version,
        health=HEALTH,
        **{
            "command": ["/bin/sh", "-c", WEB],
            "port_mappings": [{"host_port": port, "container_port": 80}],
            "strategy": "rolling",
            **config,
        },
    )


async def deploy(rig: Rig, name: str, version: str, port: int, **config: Any) -> Operations:
    """A deployment taken to its good end, by a holder of the lock."""
    made = announce(rig, name, version, port, **config)
    with rig.host.hold(made.deployment_id):
        await take_up_to(made, "retire")
    assert rig.state(made) is S.KEPT
    assert ask("127.0.0.1", port) == version
    return made


async def updates(rig: Rig) -> None:
    """From `recreate` to `rolling`, on and back under load, and to `recreate` again."""
    name, port = "roll-updates", 18951
    await deploy(rig, name, "v0", port, strategy="recreate")
    first = await deploy(rig, name, "v1", port)
    assert (first.entry.facts.service_interruption_ms or 0) > 0, "the old one held the port itself"
    with load("127.0.0.1", port, SLOW) as outcome:
        for number in range(UPDATES // 2):
            made = await deploy(rig, name, f"v{number % 2 + 2}", port)
            assert made.entry.facts.service_interruption_ms == 0
            undone = announce(rig, name, "v4", port)
            await take_up_to(undone, "switch_traffic")
            assert ask("127.0.0.1", port) == "v4"
            undone.fail(ErrorCode.TIMEOUT, "for the test")
            await rig.host.restore(undone.deployment_id)
            assert ask("127.0.0.1", port) == f"v{number % 2 + 2}"
    assert outcome.failures == [], outcome
    assert set(outcome.answers) == {"v1", "v2", "v3", "v4"}, outcome
    status = rig.host.ledger.status(undone.deployment_id)
    assert (status.state, status.facts.previous_container_restored) == (S.RESTORED, True)
    running = [each for each in rig.host.engine.made_containers(name) if each.running]
    assert [(each.name, each.image_tag) for each in running] == [(name, "v2")]
    await deploy(rig, name, "v5", port, strategy="recreate")
    assert Proxy(rig.host.settings).route(name) is None
    back = announce(rig, name, "v6", port)
    await take_up_to(back, "switch_traffic")
    await rig.host.restore(back.deployment_id)
    assert ask("127.0.0.1", port) == "v5"


async def undone_recreate(rig: Rig) -> None:
    """A failed `recreate` of a rolling service gives HAProxy its ports back."""
    name, port = "roll-recreate", 18952
    await deploy(rig, name, "v1", port)
    made = announce(rig, name, "v2", port, strategy="recreate")
    await take_up_to(made, "start_container")
    await rig.host.restore(made.deployment_id)
    assert ask("127.0.0.1", port) == "v1"
    assert Proxy(rig.host.settings).route(name) is not None


async def broken(rig: Rig) -> None:
    """A version that is not well never gets a request."""
    name, port = "roll-broken", 18953
    old = await deploy(rig, name, "v1", port)
    made = announce(rig, name, "v2", port, command=["/bin/sh", "-c", "exec sleep 1000"])
    with load("127.0.0.1", port, SLOW) as outcome:
        await take_up_to(made, "check_container_status")
        try:
            await take(made, "validate_health_endpoint")
        except Exception as exc:  # noqa: BLE001 - told to the ledger
            made.fail(ErrorCode.HEALTH_CHECK_FAILED, str(exc))
        await rig.host.restore(made.deployment_id)
    assert (outcome.failures, set(outcome.answers)) == ([], {"v1"}), outcome
    assert rig.names(name)[0] == name
    assert rig.docker.containers.get(name).id == old.entry.facts.container_id


async def killed(rig: Rig) -> None:
    """Wherever SIGKILL hits, one look later the old version serves by its name, and nothing else is there."""
    names = {point: (f"roll-kill-{at}", 18960 + at) for at, point in enumerate(ROLLING_POINTS)}
    rig.image("v1")
    await asyncio.gather(*(deploy(rig, name, "v1", port) for name, port in names.values()))
    made = {point: announce(rig, name, "v2", port) for point, (name, port) in names.items()}
    points = {operations.deployment_id: point for point, operations in made.items()}
    socket = Path(rig.host.settings.docker_host.removeprefix("unix://"))
    with victims(rig.host, socket, points):
        pass
    await Guardian(rig.host).look()
    for point, (name, port) in names.items():
        assert rig.state(made[point]) is S.RESTORED, (
            point,
            rig.host.ledger.status(made[point].deployment_id),
        )
        assert ask("127.0.0.1", port) == "v1", point
        assert rig.names(name) == [name], point


@contextmanager
def kept_proxy(rig: Rig) -> Iterator[None]:
    """HAProxy is started when it is needed, as the daemon does it."""
    is_over = threading.Event()

    def keep() -> None:
        while not is_over.wait(0.05):
            Proxy(rig.host.settings).keep_running()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        is_over.set()
        keeper.join()


def main(scenario: str, state_dir: str, docker_socket: str) -> None:
    """Run a scenario; an assertion that fails ends the process with its text."""
    operations.RESTORED_QUIET_SECONDS = 0.2
    host = open_host(Path(state_dir), Path(docker_socket))
    docker = DockerClient(base_url=f"unix://{docker_socket}")
    rig = Rig(cast("Node", None), docker, host)
    with kept_proxy(rig):
        asyncio.run(SCENARIOS[scenario](rig))


SCENARIOS = {each.__name__: each for each in (updates, undone_recreate, broken, killed)}

if __name__ == "__main__":
    main(*sys.argv[1:])
