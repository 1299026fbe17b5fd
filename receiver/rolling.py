"""The rolling way: the new version starts beside the old one, is proven, and then takes its public ports.

Nothing is stopped before the route has moved and the old version is idle. What leads back is in the ledger
before the route moves: the old one's route, and how to start it again. Imports no HTTP server.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from docker.models.containers import Container

from receiver.binding import bind_error
from receiver.contract import LABEL_DEPLOYMENT, DeploymentConfig, HostState, PortMapping, Stage
from receiver.engine import LOOPBACK
from receiver.ledger import Entry, Undo, utc_now
from receiver.operations import (
    NEVER,
    Operations,
    StepFailed,
    aside_name,
    required,
)
from receiver.routes import Route, Target, route_for

# Below those of outgoing connections, so that a container finds its port free when it starts again.
LOOPBACK_PORTS = range(20_000, 32_000)
RESTORE_DRAIN_SECONDS = 30
_ANSWER_SECONDS = 10.0
S = HostState


class RollingOperations(Operations):
    """The steps of a rolling deployment; those not named here are taken as for `recreate`."""

    starts_from = S.PREPARED
    is_proven_in = S.DRAINING

    # -- stage 3 ---------------------------------------------------------------------------------

    def _check_ports(self, entry: Entry, current: Container | None) -> None:
        """The public ports, and whether HAProxy would take them."""
        if not self.engine.is_local:
            raise StepFailed("strategy rolling needs an engine on this machine; use recreate")
        super()._check_ports(entry, current)
        ports = {mapping.container_port: LOOPBACK_PORTS[0] for mapping in self._config.port_mappings}
        self.proxy.check(self._route_to(Target(container_id="", ports=ports)))

    def _proxied_ports(self, entry: Entry) -> set[tuple[int, str]]:
        """Those of other services, too: the proxy knows which of them can be shared by host name."""
        return {(bind.host_port, "tcp") for route in self.proxy.routes().routes for bind in route.binds}

    @property
    def _config(self) -> DeploymentConfig:
        return self.entry.request.deployment_config

    def _make(
        self, image_id: str, name: str, labels: Mapping[str, str], environment: Mapping[str, str]
    ) -> str:
        return self.engine.create_container(image_id, name, self._on_loopback(), labels, environment)

    def _on_loopback(self) -> DeploymentConfig:
        """The configuration with each container port on a loopback port of its own.

        Chosen at random and without a lock: should two deployments ever choose the same, one fails to start,
        and its old version serves.
        """
        wanted = sorted({mapping.container_port for mapping in self._config.port_mappings})
        free = _free_ports(len(wanted), self.engine.promised_ports())
        mappings = [
            PortMapping(host_port=port, container_port=inner, host_ip=LOOPBACK)
            for inner, port in zip(wanted, free, strict=True)
        ]
        return self._config.model_copy(update={"port_mappings": mappings})

    def _take_name(self, container_id: str) -> None:
        """Not yet: it starts beside the old one, which serves."""

    # -- stage 4 ---------------------------------------------------------------------------------

    def _health_url(self) -> str | None:
        """The new container itself, not what the public port leads to."""
        check = self.entry.request.health_check_config
        if check.health_endpoint is None:
            return None
        inner = check.port or self._config.port_mappings[0].container_port
        ports = self.engine.loopback_ports(required(self.entry.facts.container_id))
        if inner in ports:
            return f"http://{LOOPBACK}:{ports[inner]}{check.health_endpoint}"
        return super()._health_url()

    def _note_interruption(self) -> None:
        """Told at the end: it is not over yet."""

    async def switch_traffic(self) -> None:
        """Let the public ports lead to the new container; one that holds them itself is stopped first."""
        self._entry_in(S.VALIDATING, S.MOVING, S.DRAINING)
        async with self._step("switch_traffic", Stage.VALIDATE):
            await self._in_turn(self._switch)

    def _switch(self) -> None:
        entry = self._entry_in(S.VALIDATING, S.MOVING, S.DRAINING)
        if entry.state is S.DRAINING:
            return
        if entry.state is S.VALIDATING:
            entry = self._record_undo(entry, S.MOVING)
        undo = entry.undo or Undo()
        if undo.previous_container_id and not undo.route:
            self._free_public_ports(undo.previous_container_id)
        self._entry_in(S.MOVING)
        self.proxy.set_route(self._route_to(self._target(required(entry.facts.container_id))))
        self._exchange_names(undo.previous_container_id, required(entry.facts.container_id))
        self.ledger.move(self.deployment_id, S.DRAINING, service_interruption_ms=_silent_ms(undo))
        self._gate("traffic_switched", Stage.VALIDATE, passed=True)

    def _free_public_ports(self, previous: str) -> None:
        """The old container publishes them itself, as `recreate` made it: once, there is a gap."""
        self.engine.set_restart_policy(previous, NEVER)
        self.engine.stop(previous, self._config.stop_timeout_seconds)

    def _target(self, container_id: str) -> Target:
        return Target(container_id=container_id, ports=self.engine.loopback_ports(container_id))

    def _route_to(self, target: Target) -> Route:
        """The service's route as this deployment wants it, in the slot beside the one that serves."""
        service = self.entry.request.container_name
        fresh, known = route_for(service, self._config, target), self.proxy.route(service)
        return fresh.with_slots_of(known).leading_to(target) if known else fresh

    def _exchange_names(self, previous: str | None, container_id: str) -> None:
        name = self.entry.request.container_name
        if previous is not None:
            self.engine.rename(previous, aside_name(name, "previous", previous))
        self.engine.rename(container_id, name)

    async def drain_existing_container(self) -> None:
        """Requests in flight on the old container end; at the limit they are closed."""
        self._entry_in(S.DRAINING)
        async with self._step("drain_existing_container", Stage.VALIDATE):
            undo, limit = self.entry.undo or Undo(), self._config.drain_timeout_seconds
            closed = await self._drained(undo.previous_container_id, limit) if undo.route else 0
        said_of_it = f"{closed} closed after {limit} s" if closed else ""
        self._gate("previous_container_idle", Stage.VALIDATE, passed=True, message=said_of_it)

    async def _drained(self, container_id: str | None, limit_seconds: float) -> int:
        route = self.proxy.route(self.entry.request.container_name)
        slot = route.slot_of(container_id) if route and container_id else None
        if route is None or slot is None or slot == route.active:
            return 0
        return await asyncio.to_thread(self.proxy.drain, route, slot, limit_seconds)

    async def stop_existing_container(self) -> None:
        """Stop the old container, which is idle, and keep it for the way back."""
        self._entry_in(S.DRAINING)
        async with self._step("stop_existing_container", Stage.VALIDATE):
            await self._in_turn(self._stop_previous)

    def _stop_previous(self) -> None:
        """The old one; and any other of this name that a deployment without rollback left running."""
        entry = self._entry_in(S.DRAINING)
        others = {
            str(made.id)
            for made in self.engine.containers_of(entry.request.container_name)
            if made.attrs["State"]["Running"] and LABEL_DEPLOYMENT in made.labels
        }
        previous = entry.undo.previous_container_id if entry.undo else None
        for other in ({previous} if previous else set()) | others - {entry.facts.container_id}:
            self.engine.set_restart_policy(other, NEVER)
            self.engine.stop(other, self._config.stop_timeout_seconds)

    # -- the way back ----------------------------------------------------------------------------

    async def _undo(self, undo: Undo) -> bool:
        """The old one takes the requests again before the new one is stopped; nobody is cut off."""
        if undo.stop_began_at is not None:
            await self._in_turn(lambda: self._check_way_back(undo.previous_container_id))
            await self._in_turn(lambda: self._lead_back(undo))
            if undo.previous_container_id and undo.was_running:
                await self._check_previous(undo.previous_container_id)
            if undo.route:
                await self._drained(self.entry.facts.container_id, self._patience())
        await self._in_turn(self._stop_new)
        await self._in_turn(self._remove_failed)
        return undo.previous_container_id is not None

    def _patience(self) -> float:
        return min(self._config.drain_timeout_seconds, RESTORE_DRAIN_SECONDS)

    def _lead_back(self, undo: Undo) -> None:
        name, previous = self.entry.request.container_name, undo.previous_container_id
        for made in self.engine.containers_of_deployment(self.deployment_id):
            self.engine.rename(str(made.id), aside_name(name, "failed", str(made.id)))
        if not undo.route:
            self.proxy.remove_route(name)  # before the old one: it publishes the ports itself
        if previous is not None:
            self._bring_back(previous, undo)

    def _route_back(self, before: Route, *, is_up: bool) -> None:
        """Once the old one answers, in whichever slot it has by now."""
        serving, now = before.serving, self.proxy.route(before.service)
        if serving is None:
            raise StepFailed(f"the route of {before.service} led nowhere before")
        if is_up:
            _wait_until(lambda: all(_answers(port) for port in serving.ports.values()), _ANSWER_SECONDS)
        self.proxy.set_route((before.with_slots_of(now) if now else before).leading_to(serving))


def _free_ports(count: int, promised: set[int]) -> list[int]:
    found: list[int] = []
    for port in random.sample(LOOPBACK_PORTS, len(LOOPBACK_PORTS)):
        if len(found) == count:
            return found
        if port not in promised and bind_error(port, host_ip=LOOPBACK) is None:
            found.append(port)
    raise StepFailed(f"no loopback port from {LOOPBACK_PORTS[0]} to {LOOPBACK_PORTS[-1]} is free")


def _answers(port: int) -> bool:
    """True when HTTP is spoken there; a port that only accepts is the engine's, not yet the service's."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=2) as line:
            line.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
            return bool(line.recv(1))
    except OSError:
        return False


def _wait_until(fact: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not fact() and time.monotonic() < deadline:
        time.sleep(0.05)


def _silent_ms(undo: Undo) -> int | None:
    """Milliseconds in which nothing served: none where a route moved, None where nothing had served."""
    if not undo.was_running or undo.stop_began_at is None:
        return None
    silence = utc_now() - datetime.fromisoformat(undo.stop_began_at)
    return 0 if undo.route else int(silence.total_seconds() * 1000)
