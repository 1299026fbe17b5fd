"""What is done to a deployment under way, and how everything comes back."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType

from deployments.lab import Control, Host
from tests.e2e.deploying import prefect_api, wait_for
from tests.faults import facts
from tests.faults.site import Site

BROKER_THAT_IS_GONE = "127.0.0.1:9"
POSTGRESQL = f"postgresql://postgres@127.0.0.1:{facts.POSTGRESQL_PORT}/postgres"


class Scope(IntEnum):
    """Who else feels a fault: nobody, what runs on the same host, everything."""

    RUN = 1
    HOST = 2
    LAB = 3


@dataclass
class Scene:
    """Where a fault strikes: one host, the runs that deploy to it, and what is to be taken back."""

    site: Site
    host: Host
    run_ids: list[str] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)
    undo: ExitStack = field(default_factory=ExitStack)

    @property
    def control(self) -> Control:
        """The control side."""
        return self.site.lab.control


Act = Callable[[Scene], None]


def _nothing(_: Scene) -> None:
    """For faults that have nothing to do then."""


@dataclass(frozen=True)
class Fault:
    """`strike` while a process is held at the point, `meanwhile` until it is to end, then `heal`.

    `prepare` is done before the deployment is started; `environment` is added to that of its flow run.
    """

    name: str
    scope: Scope
    strike: Act = _nothing
    heal: Act = _nothing
    prepare: Act = _nothing
    meanwhile: Act = _nothing
    runs: int = 1
    asks_from_host: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def lasting(seconds: float) -> Act:
    """How long a fault lasts: that is part of the fault, nothing is waited for."""
    return lambda _: time.sleep(seconds)


def until_at_rest(scene: Scene) -> None:
    """Until the host has settled by itself: no control side, no Prefect."""

    def at_rest() -> bool:
        entries = [entry for name in scene.containers for entry in facts.ledger(scene.host, name)]
        return all(entry["state"] in _SETTLED for entry in entries)

    with suppress(AssertionError):  # what has not settled by then is found by the invariant
        wait_for(at_rest, "the host is at rest", seconds=60)


_SETTLED = {"receiving", "kept", "restored", "rejected", "aborted"}


def _kill_flow(scene: Scene) -> None:
    for run_id in scene.run_ids:
        _kill(facts.processes_of_run(run_id))


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _kill_host_worker(scene: Scene) -> None:
    scene.host.services["worker"].kill()
    _kill(facts.flow_processes(scene.host))


def _start_workers(scene: Scene) -> None:
    """As a service manager does with those that ended."""
    sides: list[Control | Host] = [scene.control, *scene.site.lab.hosts.values()]
    for side in sides:
        if not side.services["worker"].alive:
            side.start_worker()


def _start_server(scene: Scene) -> None:
    scene.control.start_server()
    _start_workers(scene)


def _cut(*, incoming: bool, outgoing: bool) -> Act:
    return lambda scene: scene.host.cut_network(incoming=incoming, outgoing=outgoing)


def _lock_records(scene: Scene) -> None:
    """Another program writes to the file and does not come to an end."""
    rival = sqlite3.connect(facts.home(scene.site.lab) / "records.db", isolation_level=None, timeout=20)
    scene.undo.callback(rival.close)
    rival.execute("BEGIN EXCLUSIVE")


def _end_postgresql(scene: Scene) -> None:
    """At once, as when its machine lost its power."""
    server = scene.control.services["postgresql"].process
    server.send_signal(signal.SIGQUIT)
    server.wait(30)


def _cancel(scene: Scene) -> None:
    for run_id in scene.run_ids:
        body = {"state": {"type": "CANCELLING"}}
        prefect_api(scene.site.lab, "POST", f"/flow_runs/{run_id}/set_state", body)


def _clock(offset_seconds: float, name: str) -> Fault:
    return Fault(
        f"clock_{name}",
        Scope.HOST,
        prepare=lambda scene: scene.host.set_clock(offset_seconds),
        heal=lambda scene: scene.host.set_clock(None),
    )


def _network(name: str, *, incoming: bool, outgoing: bool, meanwhile: Act) -> Fault:
    return Fault(
        name,
        Scope.HOST,
        strike=_cut(incoming=incoming, outgoing=outgoing),
        meanwhile=meanwhile,
        heal=lambda scene: scene.host.heal_network(),
        asks_from_host=True,
    )


_ALL = (
    Fault("kill_flow", Scope.RUN, strike=_kill_flow),
    Fault("cancel", Scope.RUN, strike=_cancel),
    Fault("broker_gone", Scope.RUN, environment={"KAFKA_BOOTSTRAP_SERVERS": BROKER_THAT_IS_GONE}),
    Fault("same_millisecond", Scope.RUN, runs=2),
    Fault(
        "kill_host_worker",
        Scope.HOST,
        strike=_kill_host_worker,
        heal=lambda scene: scene.host.start_worker(),
    ),
    Fault(
        "kill_receiver",
        Scope.HOST,
        strike=lambda scene: scene.host.services["receiver"].kill(),
        heal=lambda scene: scene.host.start_receiver(),
    ),
    Fault(
        "kill_engine",
        Scope.HOST,
        strike=lambda scene: scene.host.kill_engine(),
        heal=lambda scene: scene.host.start_engine(),
    ),
    Fault(
        "reboot",
        Scope.HOST,
        strike=lambda scene: scene.host.power_off(),
        heal=lambda scene: scene.host.boot(),
    ),
    _network("cut_to_host", incoming=True, outgoing=False, meanwhile=lasting(6)),
    _network("cut_from_host", incoming=False, outgoing=True, meanwhile=lasting(6)),
    _network("cut_both_ways", incoming=True, outgoing=True, meanwhile=lasting(6)),
    _network("cut_until_at_rest", incoming=True, outgoing=True, meanwhile=until_at_rest),
    Fault(
        "disk_full_host",
        Scope.HOST,
        strike=lambda scene: scene.host.fill_disk(),
        meanwhile=lasting(10),
        heal=lambda scene: scene.host.free_disk(),
    ),
    _clock(10, "10_s"),
    _clock(61, "61_s"),
    _clock(960, "16_min"),
    Fault(
        "clock_steps_back",
        Scope.HOST,
        prepare=lambda scene: scene.host.set_clock(0),
        strike=lambda scene: scene.host.step_clock(-45),
        heal=lambda scene: scene.host.set_clock(None),
    ),
    Fault(
        "disk_full_control",
        Scope.LAB,
        strike=lambda scene: scene.control.fill_disk(),
        meanwhile=lasting(10),
        heal=lambda scene: scene.control.free_disk(),
    ),
    Fault(
        "server_gone",
        Scope.LAB,
        strike=lambda scene: scene.control.services["server"].kill(),
        meanwhile=lasting(5),
        heal=_start_server,
    ),
    Fault(
        "records_locked",
        Scope.LAB,
        strike=_lock_records,
        meanwhile=lasting(15),
        heal=lambda scene: scene.undo.close(),
    ),
    Fault(
        "records_gone",
        Scope.LAB,
        environment={"DATABASE_URL": POSTGRESQL},
        prepare=lambda scene: scene.site.start_postgresql(),
        strike=_end_postgresql,
        meanwhile=lasting(15),
        heal=lambda scene: scene.site.start_postgresql(),
    ),
)
BY_NAME: Mapping[str, Fault] = MappingProxyType({fault.name: fault for fault in _ALL})
