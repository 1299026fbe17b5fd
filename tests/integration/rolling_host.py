"""What happens on a host with rolling services; run in the host's network, where its ports are.

python -m tests.integration.rolling_host SCENARIO STATE_FOLDER DOCKER_SOCKET
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from docker import DockerClient

from deployments.lab import Host as Node
from receiver import neighbours, operations
from receiver.contract import ErrorCode, HealthCheckConfig, HostState
from receiver.guardian import Guardian
from receiver.operations import Operations
from receiver.proxy import Proxy
from receiver.proxy_keeper import ProxyKeeper
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
    assert _arp_ms("docker0") == neighbours.LOOK_MS
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


def _arp_ms(interface: str) -> int:
    return int(Path(f"/proc/sys/net/ipv4/neigh/{interface}/retrans_time_ms").read_text())


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


async def measured(rig: Rig, updates: int) -> None:
    """Updates by both strategies under load; prints what `tests.bench.rolling` reads."""
    found = [await _series(rig, strategy, updates) for strategy in ("rolling", "recreate")]
    sys.stdout.write(json.dumps(found) + "\n")


async def _series(rig: Rig, strategy: str, updates: int) -> dict[str, Any]:
    name, port, taken = f"measured-{strategy}", 18981, list[tuple[float, float]]()
    await deploy(rig, name, "v0", port, strategy=strategy)
    with load("127.0.0.1", port, SLOW) as outcome, wrk(port) as told:
        for number in range(1, updates + 1):
            began = time.monotonic()
            if strategy == "rolling" and number % 5 == 0:
                await _there_and_back(rig, name, port)
                continue
            await deploy(rig, name, f"v{number % 3}", port, strategy=strategy)
            taken.append((began, time.monotonic()))
            await asyncio.sleep(0.2)  # so that the clients see the end of each silence
    last = rig.docker.containers.get(name)
    Proxy(rig.host.settings).remove_route(name)
    last.remove(force=True)
    return {
        "strategy": strategy,
        "updates": updates,
        "rollbacks": updates - len(taken),
        "requests": outcome.requests,
        "failures": len(outcome.failures),
        "wrk_requests": told[0],
        "wrk_failures": told[1],
        "silent_seconds": statistics.median(outcome.silence(*times) for times in taken),
        "update_seconds": statistics.median(ended - began for began, ended in taken),
    }


async def _there_and_back(rig: Rig, name: str, port: int) -> None:
    made = announce(rig, name, "v4", port)
    with rig.host.hold(made.deployment_id):
        await take_up_to(made, "switch_traffic")
        await made.restore()


@contextmanager
def wrk(port: int) -> Iterator[list[int]]:
    """Sixteen kept connections until the block ends; then the list holds requests and failures."""
    command = ["wrk", "-t1", "-c16", "-d9999s", "--timeout", "10s", f"http://127.0.0.1:{port}/"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    told: list[int] = []
    try:
        yield told
    finally:
        client.send_signal(signal.SIGINT)
        said, _ = client.communicate(timeout=20)
        errors = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", said)
        others = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
        requests = re.search(r"(\d+) requests in", said)
        failed = sum(map(int, errors.groups())) if errors else 0
        told += [int(requests[1]) if requests else 0, failed + (int(others[1]) if others else 0)]


@contextmanager
def kept_proxy(rig: Rig) -> Iterator[None]:
    """HAProxy is started when it is needed, as the daemon does it."""
    is_over = threading.Event()

    def keep() -> None:
        while not is_over.wait(0.05):
            ProxyKeeper(rig.host.settings).keep_running()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        is_over.set()
        keeper.join()


def main(scenario: str, state_dir: str, docker_socket: str, *numbers: str) -> None:
    """Run a scenario; an assertion that fails ends the process with its text."""
    operations.RESTORED_QUIET_SECONDS = 0.2
    host = open_host(Path(state_dir), Path(docker_socket))
    docker = DockerClient(base_url=f"unix://{docker_socket}")
    rig = Rig(cast("Node", None), docker, host)
    with kept_proxy(rig):
        asyncio.run(SCENARIOS[scenario](rig, *map(int, numbers)))


SCENARIOS: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    each.__name__: each for each in (updates, undone_recreate, broken, killed, measured)
}

if __name__ == "__main__":
    main(*sys.argv[1:])
