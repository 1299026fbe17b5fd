"""What is done to containers: prepare, switch, validate, keep, restore; each idempotent, each journalled.

The old container serves until the new one is prepared, and is kept until the new one is proven.
What undoes a step is in the ledger before the step is taken. Imports no Prefect and no HTTP server.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import requests.exceptions
from docker.errors import APIError, DockerException, NotFound
from docker.models.containers import Container

from receiver import consul, contract, disk, health, neighbours
from receiver.contract import (
    DeploymentStatus,
    ErrorCode,
    HealthAttempt,
    HostState,
    ImageAnnouncement,
    PackageAnnouncement,
    QualityGate,
    Stage,
    Strategy,
)
from receiver.engine import Engine, LoadedImage, PortTaken
from receiver.ledger import Entry, Ledger, StateConflict, Undo, utc_now
from receiver.locks import Hold, container_lock
from receiver.preload import wait_until_fed
from receiver.proxy import Proxy, ProxyFailed
from receiver.routes import Route
from receiver.settings import ReceiverSettings

if TYPE_CHECKING:
    from receiver.rolling import RollingOperations

RESTORE_STAGE = "rollback"
NEVER = {"Name": "no", "MaximumRetryCount": 0}  # the restart policy of what is to stay down
FAILED_STOP_GRACE_SECONDS = 5
RESTORED_QUIET_SECONDS = 1.0
UNFINISHED = (
    HostState.PREPARED,
    HostState.SWITCHING,
    HostState.VALIDATING,
    HostState.MOVING,
    HostState.DRAINING,
    HostState.FAILED,
    HostState.RESTORING,
)
_UNTOUCHED = frozenset({HostState.RECEIVING, HostState.READY})
_RESTORE_TRIES = 3
_BEING_REMOVED = frozenset({"dead", "removing"})  # the engine changes nothing on these
# The thread of a step that was cut off at its deadline goes on; what comes next waits for its turn.
_turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


class StepFailed(Exception):
    """A step on the host failed"""


class RestoreFailed(StepFailed):
    """The previous container could not be restored"""


def left_unfinished(ledger: Ledger) -> list[Entry]:
    """Entries that a dead process may have left to undo, oldest first; whether it lives, the lock tells.

    A deployment that is ready belongs to them once its first step began, a failed one unless it asked
    for no rollback.
    """
    begun = [entry for entry in ledger.in_states(HostState.READY) if ledger.operations(entry.deployment_id)]
    others = [
        entry
        for entry in ledger.in_states(*UNFINISHED)
        if entry.state is not HostState.FAILED or entry.request.rollback_on_failure
    ]
    return sorted((*begun, *others), key=lambda entry: entry.created_at)


@dataclass(frozen=True)
class Host:
    """One host: its settings, its ledger, its engine, and the operations on its deployments."""

    settings: ReceiverSettings
    ledger: Ledger
    engine: Engine

    @contextmanager
    def hold(self, deployment_id: str, *, ends_itself: bool = False) -> Iterator[Hold]:
        """Hold the lock of the deployment's container; raises `LockHeld`."""
        name = self.ledger.get(deployment_id).request.container_name
        locks = self.settings.locks_dir
        with container_lock(locks, name, deployment_id, ends_itself=ends_itself) as hold:
            yield hold

    def operations(self, deployment_id: str) -> Operations:
        """The steps of one deployment; the caller holds its lock."""
        return steps_of(self.settings, self.ledger, self.engine, deployment_id)

    def rolling(self, deployment_id: str) -> RollingOperations:
        """The same for a rolling deployment; raises `StepFailed` for any other."""
        from receiver.rolling import RollingOperations  # here: they are built on these

        found = self.operations(deployment_id)
        if not isinstance(found, RollingOperations):
            raise StepFailed(f"deployment {deployment_id} is none of strategy rolling")
        return found

    async def restore(self, deployment_id: str) -> DeploymentStatus:
        """Bring the previous container back; a no-op where nothing is left to undo.

        Raises `LockHeld` while another process operates on the container.
        """
        with self.hold(deployment_id, ends_itself=True):
            state = self.ledger.get(deployment_id).state
            if state is HostState.RECEIVING:
                self.ledger.move(deployment_id, HostState.ABORTED)
            elif not state.settled or state is HostState.RESTORE_FAILED:
                await self.operations(deployment_id).restore()
        return self.ledger.status(deployment_id)

    async def abort(self, deployment_id: str) -> DeploymentStatus:
        """End a deployment that did not begin; one that did is restored. Idempotent.

        What did not begin needs no lock: a step that begins later is refused by the state.
        """
        has_begun = bool(self.ledger.operations(deployment_id))
        if not has_begun and self.ledger.get(deployment_id).state in _UNTOUCHED:
            with contextlib.suppress(StateConflict):
                self.ledger.move(deployment_id, HostState.ABORTED)
                return self.ledger.status(deployment_id)
        return await self.restore(deployment_id)


def steps_of(settings: ReceiverSettings, ledger: Ledger, engine: Engine, deployment_id: str) -> Operations:
    """The steps of one deployment, by its strategy."""
    from receiver.rolling import RollingOperations  # here: they are built on these

    config = ledger.get(deployment_id).request.deployment_config
    made_by = RollingOperations if config.way is Strategy.ROLLING else Operations
    return made_by(settings, ledger, engine, deployment_id)


@dataclass(frozen=True)
class Operations:
    """The steps of one deployment, under the specification's operation names."""

    starts_from: ClassVar[HostState] = HostState.SWITCHING
    is_proven_in: ClassVar[HostState] = HostState.VALIDATING

    settings: ReceiverSettings
    ledger: Ledger
    engine: Engine
    deployment_id: str

    @property
    def entry(self) -> Entry:
        """The deployment as the ledger has it now."""
        return self.ledger.get(self.deployment_id)

    @property
    def proxy(self) -> Proxy:
        """The host's HAProxy, which has this container's ports when a rolling deployment gave it them."""
        return Proxy(self.settings)

    def _entry_in(self, *states: HostState) -> Entry:
        """The entry, when it is in one of `states`, the last of which the step leads to.

        Fencing: raises `StateConflict` when the deployment was settled, or undone, meanwhile.
        """
        entry = self.entry
        if entry.state not in states:
            raise StateConflict(self.deployment_id, entry.state, states[-1])
        return entry

    async def _in_turn(self, work: Callable[[], None]) -> None:
        """Do `work` in a thread, after what an earlier step of this process still does to the engine."""

        def wait_and_work() -> None:
            with _turns[self.deployment_id]:
                work()

        await asyncio.to_thread(wait_and_work)

    @asynccontextmanager
    async def _step(self, name: str, stage: str) -> AsyncIterator[None]:
        """Journal the intent before and the fact after."""
        journal_id, began = self.ledger.begin_step(self.deployment_id, name, stage), time.monotonic()
        success, message = False, ""
        try:
            yield
            success = True
        except BaseException as exc:
            message = str(exc) or type(exc).__name__
            raise
        finally:
            duration_ms = int((time.monotonic() - began) * 1000)
            self.ledger.end_step(journal_id, success=success, duration_ms=duration_ms, message=message)

    def _gate(self, name: str, stage: Stage, *, passed: bool, message: str = "") -> None:
        gate = QualityGate(name=name, stage=stage, passed=passed, message=message)
        self.ledger.observe(self.deployment_id, gate)

    def package_path(self) -> Path:
        """Where the verified package lies."""
        return self.settings.packages_dir / f"{self.deployment_id}.tar"

    # -- stage 3 ---------------------------------------------------------------------------------

    async def deploy_container(self, environment: Mapping[str, str]) -> None:
        """Load the image and create the new container while the old one serves.

        What a dead process left of an earlier deployment of this container is undone first.
        """
        self._entry_in(HostState.READY, HostState.PREPARED)
        async with self._step("deploy_container", Stage.DEPLOY):
            for earlier in self._left_before():
                await steps_of(self.settings, self.ledger, self.engine, earlier).restore()
            await self._in_turn(lambda: self._prepare(environment))

    def _left_before(self) -> list[str]:
        name = self.entry.request.container_name
        found = [entry for entry in left_unfinished(self.ledger) if entry.request.container_name == name]
        return [entry.deployment_id for entry in found if entry.deployment_id != self.deployment_id]

    def _prepare(self, environment: Mapping[str, str]) -> None:
        entry = self._entry_in(HostState.READY, HostState.PREPARED)
        if entry.state is HostState.PREPARED:
            return
        current = self.engine.find_container(entry.request.container_name)
        _check_survives_its_stop(current)
        image = self._load(entry)
        self._check_ports(entry, current)
        self._entry_in(HostState.READY)
        container_id = self._create(entry, image, environment)
        # Without it clients wait a little longer: no reason to fail.
        with contextlib.suppress(DockerException, requests.exceptions.RequestException):
            neighbours.look_often(self.engine.bridge(container_id))
        identity = _identity(image, entry.request.image)
        self.ledger.move(self.deployment_id, HostState.PREPARED, container_id=container_id, **identity)
        self._gate("container_deployed", Stage.DEPLOY, passed=True, message=container_id[:12])

    def _check_room(self, entry: Entry) -> None:
        """Asked again: between announcement and now others may have filled the disks."""
        announced = entry.request.image
        if announced is None:
            return
        known = set(self.engine.known_layers(announced))
        self._check_omitted(entry, known)
        wanted_bytes = 0 if set(announced.layers) <= known else loaded_bytes(announced, entry.package)
        _ask_for_room(disk.Need(Path(self.engine.store().data_root), wanted_bytes, "the loaded image"))

    def _check_omitted(self, entry: Entry, known: set[str]) -> None:
        """What was not sent because it was here is still here; else nothing is touched."""
        omitted = entry.package.omitted_layers if entry.package else []
        gone = [layer for layer in omitted if layer not in known]
        if gone:
            raise StepFailed(
                f"{len(gone)} layer(s) that the engine had when this was announced are gone from it "
                f"({', '.join(gone)}), and the package does not hold them; deploy again: they are sent then"
            )

    def _check_room_to_switch(self) -> None:
        """While the old container still serves: what stops it and starts another has to be written down."""
        engine_disk = disk.Need(Path(self.engine.store().data_root), 0, "the switch")
        for need in (engine_disk, disk.Need(self.settings.state_dir, 0, "the switch")):
            _ask_for_room(need, disk.SWITCH_RESERVE_BYTES)

    def _load(self, entry: Entry) -> LoadedImage:
        announced = entry.request.image
        wait_until_fed(self.settings.packages_dir, entry)
        image = self._find_image(announced)
        if image is None:
            self._check_room(entry)
            image = self.engine.load_image(self.package_path(), announced, entry.package)
            self.ledger.note(self.deployment_id, **_identity(image, announced))
        self.engine.tag_image(image.image_id, entry.request.container_name, entry.request.image_tag)
        return image

    def _find_image(self, announced: ImageAnnouncement | None) -> LoadedImage | None:
        if announced is None:
            return None
        return self.engine.find_image(announced, self.ledger.image_ids(announced.config_digest))

    def _check_ports(self, entry: Entry, current: Container | None) -> None:
        try:
            self.engine.check_ports_free(entry.request.deployment_config, current, self._proxied_ports(entry))
        except PortTaken as exc:
            self._gate("no_port_conflicts", Stage.DEPLOY, passed=False, message=str(exc))
            raise
        self._gate("no_port_conflicts", Stage.DEPLOY, passed=True)

    def _proxied_ports(self, entry: Entry) -> set[tuple[int, str]]:
        """Host ports that HAProxy holds and this deployment may have."""
        route = self.proxy.route(entry.request.container_name)
        return {(bind.host_port, "tcp") for bind in route.binds} if route else set()

    def _create(self, entry: Entry, image: LoadedImage, environment: Mapping[str, str]) -> str:
        request, name = entry.request, f"{entry.request.container_name}-next-{self.deployment_id[:8]}"
        for leftover in self.engine.containers_of_deployment(self.deployment_id):
            self.engine.remove(str(leftover.id))
        labels = {
            contract.LABEL_CONTAINER: request.container_name,
            contract.LABEL_DEPLOYMENT: self.deployment_id,
            contract.LABEL_WORKFLOW: request.workflow_id or "",
            contract.LABEL_IMAGE_TAG: request.image_tag,
        }
        return self._make(image.image_id, name, labels, environment)

    def _make(
        self, image_id: str, name: str, labels: Mapping[str, str], environment: Mapping[str, str]
    ) -> str:
        config = self.entry.request.deployment_config
        return self.engine.create_container(image_id, name, config, labels, environment)

    async def stop_existing_container(self) -> None:
        """Stop the old container and keep it under a `-previous` name, its restart policy off."""
        self._entry_in(HostState.PREPARED, HostState.SWITCHING)
        async with self._step("stop_existing_container", Stage.DEPLOY):
            await self._in_turn(self._step_aside)

    def _step_aside(self) -> None:
        entry = self._entry_in(HostState.PREPARED, HostState.SWITCHING)
        if entry.state is HostState.PREPARED:
            entry = self._record_undo(entry)
        previous, name = entry.facts.previous_container_id, entry.request.container_name
        if previous is not None:
            self.engine.set_restart_policy(previous, NEVER)
            self.engine.stop(previous, entry.request.deployment_config.stop_timeout_seconds)
            self._entry_in(HostState.SWITCHING)
        self.proxy.remove_route(name)  # the new container publishes the ports itself
        if previous is not None:
            self.engine.rename(previous, aside_name(name, "previous", previous))

    def _record_undo(self, entry: Entry, state: HostState = HostState.SWITCHING) -> Entry:
        current = self.engine.find_container(entry.request.container_name)
        _check_survives_its_stop(current)
        self._check_room_to_switch()
        route = self.proxy.route(entry.request.container_name)
        undo = Undo(stop_began_at=utc_now().isoformat())
        if current is not None:
            undo = Undo(
                previous_container_id=current.id,
                restart_policy=current.attrs["HostConfig"]["RestartPolicy"],
                was_running=bool(current.attrs["State"]["Running"]),
                stop_began_at=utc_now().isoformat(),
                route=route.model_dump(mode="json") if route and _leads_to(route, current) else None,
            )
        return self.ledger.move(
            self.deployment_id,
            state,
            undo=undo,
            previous_container_id=undo.previous_container_id,
            previous_image_id=current.attrs["Image"] if current is not None else None,
        )

    async def start_container(self) -> None:
        """Start the new container, under its name where that is free."""
        self._entry_in(self.starts_from, HostState.VALIDATING)
        async with self._step("start_container", Stage.DEPLOY):
            await self._in_turn(self._start)

    def _start(self) -> None:
        entry = self._entry_in(self.starts_from, HostState.VALIDATING)
        if entry.state is HostState.VALIDATING:
            return
        container_id = required(entry.facts.container_id)
        self._take_name(container_id)
        try:
            self.engine.start(container_id)
        except APIError as exc:
            self._gate("container_started_without_errors", Stage.DEPLOY, passed=False, message=_said(exc))
            raise StepFailed(f"the container does not start: {_said(exc)}") from exc
        self._gate("container_started_without_errors", Stage.DEPLOY, passed=True)
        self.ledger.move(
            self.deployment_id,
            HostState.VALIDATING,
            container_started_at=self.engine.state(container_id).started_at,
            host_port=_first_host_port(entry),
        )

    def _take_name(self, container_id: str) -> None:
        self.engine.rename(container_id, self.entry.request.container_name)

    # -- stage 4 ---------------------------------------------------------------------------------

    async def check_container_status(self) -> None:
        """The container runs, and after the quiet period is still the same process."""
        gate = "container_running_without_restarts"
        self._entry_in(HostState.VALIDATING)
        async with self._step("check_container_status", Stage.VALIDATE), self._gated(gate):
            await self._check_running()
            watch = asyncio.create_task(self._note_first_answer())
            await asyncio.sleep(self.entry.request.health_check_config.quiet_period_ms / 1000)
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await self._check_running()
        self.ledger.note(self.deployment_id, container_running=True)

    async def _note_first_answer(self) -> None:
        """The end of the interruption as clients see it, in the quiet time before the health check."""
        url = await asyncio.to_thread(self._health_url)
        if url is not None:
            check = health.make_probe(self.entry.request.health_check_config, self.settings, url)
            await health.first_answer(check)
            self._note_interruption()

    async def _check_running(self) -> None:
        facts = self.entry.facts
        state = await asyncio.to_thread(self.engine.state, required(facts.container_id))
        health.check_running(state, facts.container_started_at)
        if state.image_id != facts.image_id:
            raise health.ContainerUnwell(f"the container runs {state.image_id}, not {facts.image_id}")

    async def validate_health_endpoint(self) -> None:
        """The health endpoint answers as expected; the container did not restart meanwhile."""
        gate = "health_endpoint_responding"
        config = self._entry_in(HostState.VALIDATING).request.health_check_config
        async with self._step("validate_health_endpoint", Stage.VALIDATE):
            url = await asyncio.to_thread(self._health_url)
            if url is None:
                self._gate(gate, Stage.VALIDATE, passed=True, message="not asked: no endpoint or no port")
            else:
                async with self._gated(gate):
                    await health.ask_until_healthy(
                        health.make_probe(config, self.settings, url), self._observe
                    )
                self.ledger.note(self.deployment_id, health_endpoint_accessible=True)
            await self._check_running()
            self._note_interruption()

    def _observe(self, attempt: HealthAttempt) -> None:
        self.ledger.observe(self.deployment_id, attempt)
        if attempt.status == "failed":
            self.ledger.note(self.deployment_id, health_endpoint_accessible=False)

    def _health_url(self) -> str | None:
        """Where the host reaches the service: a published port, else the container's own address."""
        entry = self.entry
        check, config = entry.request.health_check_config, entry.request.deployment_config
        if check.health_endpoint is None:
            return None
        wanted = [m for m in config.port_mappings if check.port in (None, m.container_port)]
        published = next((m for m in wanted if m.protocol == "tcp"), None)
        if published is not None:
            address = published.host_ip or "127.0.0.1"
            address = "127.0.0.1" if address in {"0.0.0.0", "::"} else address  # noqa: S104 - a wildcard is asked on loopback
            return f"http://{_bracketed(address)}:{published.host_port}{check.health_endpoint}"
        if check.port is None:
            return None
        if config.network_mode == "host":
            return f"http://127.0.0.1:{check.port}{check.health_endpoint}"
        own = self.engine.address(required(entry.facts.container_id))
        return f"http://{_bracketed(own)}:{check.port}{check.health_endpoint}" if own else None

    def _note_interruption(self) -> None:
        """Once: from when the old container was told to stop."""
        undo = self.entry.undo
        if self.entry.facts.service_interruption_ms is not None:
            return
        if undo and undo.was_running and undo.stop_began_at:
            silence = utc_now() - datetime.fromisoformat(undo.stop_began_at)
            self.ledger.note(self.deployment_id, service_interruption_ms=int(silence.total_seconds() * 1000))

    async def verify_service_registration(self) -> None:
        """Consul lists the service; asked only where it is enabled. A gate: it fails no deployment.

        One whose checks do not pass is registered, as the specification counts; the gate's message tells it.
        """
        request = self._entry_in(HostState.VALIDATING).request
        config, name = request.health_check_config, request.container_name
        if not config.consul_enabled:
            self._gate("service_registered", Stage.VALIDATE, passed=True, message="Consul is not enabled")
            return
        registered, agent = False, consul.Agent(config.consul_url, self.settings.consul_token)
        try:
            async with self._step("verify_service_registration", Stage.VALIDATE):
                message = str(await consul.wait_for_registration(agent, name))
            registered = True
        except consul.RegistrationUnproven as exc:  # may fail: the container is well
            message = str(exc)
        self.ledger.note(self.deployment_id, service_registered=registered)
        self._gate("service_registered", Stage.VALIDATE, passed=registered, message=message)

    @asynccontextmanager
    async def _gated(self, gate: str) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as exc:
            self._gate(gate, Stage.VALIDATE, passed=False, message=str(exc) or type(exc).__name__)
            raise
        self._gate(gate, Stage.VALIDATE, passed=True)

    # -- the end ---------------------------------------------------------------------------------

    async def keep(self) -> None:
        """The new container is proven: it stays."""
        if self._entry_in(self.is_proven_in, HostState.KEPT).state is not HostState.KEPT:
            await self._check_running()
            tail = await asyncio.to_thread(self.engine.log_tail, required(self.entry.facts.container_id))
            self.ledger.move(self.deployment_id, HostState.KEPT, log_tail=tail)

    async def retire(self) -> None:
        """Remove stopped containers of ours beyond `keep_versions`, and their images.

        Never the one that a rollback leads to.
        """
        await asyncio.to_thread(self._retire)

    def _retire(self) -> None:
        entry = self._entry_in(HostState.KEPT)
        pinned = {entry.facts.container_id, entry.facts.previous_container_id}
        others = [
            container
            for container in self.engine.containers_of(entry.request.container_name)
            if container.id not in pinned
            and not container.attrs["State"]["Running"]
            # A person's container of our image has the image's labels, but no deployment.
            and contract.LABEL_DEPLOYMENT in container.labels
        ]
        twins = [
            made for made in others if made.labels[contract.LABEL_DEPLOYMENT] == entry.facts.restored_from
        ]
        others = [made for made in others if made not in twins]
        pinned_previous = 1 if entry.facts.previous_container_id else 0
        kept_others = max(0, entry.request.deployment_config.keep_versions - pinned_previous)
        for container in (*twins, *others[kept_others:]):
            self.engine.remove(str(container.id))
            self.engine.remove_our_image(container.attrs["Image"])
        self.package_path().unlink(missing_ok=True)

    def fail(self, code: ErrorCode, message: str) -> None:
        """Record why the deployment failed, and the failed container's last log lines."""
        facts, tail = self.entry.facts, ""
        with contextlib.suppress(requests.exceptions.RequestException):  # the engine may be the cause
            tail = self.engine.log_tail(facts.container_id) if facts.container_id else ""
        self.ledger.move(
            self.deployment_id, HostState.FAILED, error_code=code, error_message=message, log_tail=tail
        )

    async def restore(self) -> None:
        """Take the new container away and give the old one its name, policy and process back.

        Ends in `restored` or `restore_failed`. When the engine does not answer the state stays
        `restoring`, and the guardian goes on from there.
        """
        began = time.monotonic()
        if self.entry.state is not HostState.RESTORING:
            self.ledger.move(self.deployment_id, HostState.RESTORING)
        async with self._step("restore_previous_container", RESTORE_STAGE):
            try:
                restored = await self._undo_patiently(self.entry.undo or Undo())
            except (APIError, NotFound, health.ContainerUnwell, StepFailed, ProxyFailed) as exc:
                cause = f"the previous container could not be restored: {_said(exc)}"
                self.ledger.move(
                    self.deployment_id,
                    HostState.RESTORE_FAILED,
                    error_code=ErrorCode.ROLLBACK_FAILED,
                    error_message=cause,
                    rollback_duration_ms=int((time.monotonic() - began) * 1000),
                )
                raise RestoreFailed(cause) from exc
        duration_ms = int((time.monotonic() - began) * 1000)
        # Before it is written down, so that the guardian does it again if this process dies here.
        self.package_path().unlink(missing_ok=True)
        with contextlib.suppress(APIError):
            await asyncio.to_thread(self._drop_failed_image)
        self.ledger.move(
            self.deployment_id,
            HostState.RESTORED,
            previous_container_restored=restored,
            container_running=False,
            rollback_duration_ms=duration_ms,
        )

    async def _undo_patiently(self, undo: Undo) -> bool:
        """An engine that is shutting down, or busy, answers 5xx for a moment."""
        for _ in range(_RESTORE_TRIES - 1):
            try:
                return await self._undo(undo)
            except APIError as exc:
                if not exc.is_server_error():
                    raise
            with contextlib.suppress(APIError, requests.exceptions.RequestException):
                await self._in_turn(self._give_room_back)  # the cause may be a full disk
            await asyncio.sleep(1)
        return await self._undo(undo)

    def _give_room_back(self) -> None:
        """What this deployment brought: its package, and its container once that is stopped."""
        self.package_path().unlink(missing_ok=True)
        for made in self.engine.containers_of_deployment(self.deployment_id):
            if not made.attrs["State"]["Running"]:
                self.engine.remove(str(made.id))
        self._drop_failed_image()

    def _drop_failed_image(self) -> None:
        """The failed image goes unless a container uses it; the previous one has its name back."""
        facts, name, announced = self.entry.facts, self.entry.request.container_name, self.entry.request.image
        image_id = facts.image_id or self._loaded_image_id(announced)
        waiting = self.ledger.in_states(HostState.READY, HostState.PREPARED)
        is_awaited = announced and any(entry.request.image == announced for entry in waiting)
        if image_id and image_id != facts.previous_image_id and not is_awaited:
            self.engine.remove_our_image(image_id)
        previous = self.engine.find_container(facts.previous_container_id or name)
        if previous is None or previous.labels.get(contract.LABEL_DEPLOYMENT) == self.deployment_id:
            return
        if tag := previous.labels.get(contract.LABEL_IMAGE_TAG):
            self.engine.tag_image(str(previous.attrs["Image"]), name, tag)

    def _loaded_image_id(self, announced: ImageAnnouncement | None) -> str | None:
        """The image of a process that died after it was loaded, before that was written down."""
        found = self._find_image(announced)
        return found.image_id if found else None

    async def _undo(self, undo: Undo) -> bool:
        """True when there was a previous container, which has its place again.

        The failed one is removed last: an engine that cannot remove it must not keep the old one down.
        """
        previous = undo.previous_container_id
        await self._in_turn(lambda: self._clear_the_way(previous))
        if previous is not None:
            await self._in_turn(lambda: self._bring_back(previous, undo))
            if undo.was_running:
                await self._check_previous(previous)
        await self._in_turn(self._remove_failed)
        return previous is not None

    def _clear_the_way(self, previous: str | None) -> None:
        """Stop what this deployment made so that no restart policy brings it back, and take its name."""
        self._check_way_back(previous)
        self._stop_new()

    def _stop_new(self) -> None:
        for made in self.engine.containers_of_deployment(self.deployment_id):
            if made.status not in _BEING_REMOVED:
                self._retreat(str(made.id))

    def _check_way_back(self, previous: str | None) -> None:
        name = self.entry.request.container_name
        ours = self.engine.containers_of_deployment(self.deployment_id)
        holder = self.engine.find_container(name)
        if previous and holder is not None and holder.id not in {previous, *(made.id for made in ours)}:
            raise StepFailed(
                f"the name {name} is held by container {str(holder.id)[:12]}, which this deployment neither "
                "made nor replaced; rename or remove that one, then restore again"
            )
        if previous and self.engine.find_container(previous) is None:
            raise StepFailed(
                f"container {previous[:12]} is gone from the engine; the new one was left as it is: "
                "deploy a known version"
            )

    def _retreat(self, container_id: str) -> None:
        name = self.entry.request.container_name
        self.engine.set_restart_policy(container_id, NEVER)
        self.engine.stop(container_id, FAILED_STOP_GRACE_SECONDS)
        if tail := self.engine.log_tail(container_id):
            self.ledger.note(self.deployment_id, log_tail=tail)
        self.engine.rename(container_id, aside_name(name, "failed", container_id))

    def _remove_failed(self) -> None:
        for made in self.engine.containers_of_deployment(self.deployment_id):
            self.engine.remove(str(made.id))

    def _bring_back(self, previous: str, undo: Undo) -> None:
        self.engine.rename(previous, self.entry.request.container_name)
        self.engine.set_restart_policy(previous, undo.restart_policy or {"Name": "unless-stopped"})
        if undo.was_running:
            self.engine.start(previous)
        if undo.route:
            self._route_back(Route.model_validate(undo.route), is_up=undo.was_running)

    def _route_back(self, before: Route, *, is_up: bool) -> None:
        self.proxy.set_route(before)

    async def _check_previous(self, container_id: str) -> None:
        """The restored container runs, and a moment later is still the same process."""
        first = await asyncio.to_thread(self.engine.state, container_id)
        await asyncio.sleep(RESTORED_QUIET_SECONDS)
        again = await asyncio.to_thread(self.engine.state, container_id)
        if not again.running or again.started_at != first.started_at:
            raise health.ContainerUnwell(f"the previous container is {again.status} after its start")


def _identity(image: LoadedImage, announced: ImageAnnouncement | None) -> dict[str, Any]:
    """What the ledger keeps of an image: by it a containerd image store's one is found again."""
    digest = announced.config_digest if announced else image.config_digest
    return {"image_id": image.image_id, "image_config_digest": digest}


def loaded_bytes(image: ImageAnnouncement, package: PackageAnnouncement | None) -> int:
    """Room that loading asks of the engine's disk: less than the image where layers are left out."""
    if package is None or package.unpacked_bytes is None or not package.omitted_layers:
        return image.size_bytes
    return min(package.unpacked_bytes, image.size_bytes)


def _ask_for_room(need: disk.Need, reserve_bytes: int = disk.RESERVE_BYTES) -> None:
    try:
        disk.check_room([need], reserve_bytes)
    except disk.RoomMissing as exc:
        raise StepFailed(f"{exc}; free some room on the host: docker system df, docker image prune") from exc


def _leads_to(route: Route, container: Container) -> bool:
    return route.serving is not None and route.serving.container_id == container.id


def aside_name(container_name: str, role: str, container_id: str) -> str:
    """Name of a container that is not the current one."""
    return f"{container_name}-{role}-{container_id[:8]}"


def _check_survives_its_stop(current: Container | None) -> None:
    """The engine deletes a container started with `--rm` when it stops: no way back would be left."""
    if current is not None and current.attrs["HostConfig"]["AutoRemove"]:
        raise StepFailed(
            f"container {current.name} was started with --rm and would be gone once stopped; "
            "start it without --rm, or remove it, then deploy again"
        )


def _first_host_port(entry: Entry) -> int | None:
    """Where people reach the service."""
    mappings = entry.request.deployment_config.port_mappings
    return next((mapping.host_port for mapping in mappings if mapping.protocol == "tcp"), None)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def required(value: str | None) -> str:
    """The id of the container that was created; raises `StepFailed`."""
    if value is None:
        raise StepFailed("the ledger has no container for this deployment; deploy_container did not run")
    return value


def _said(exc: Exception) -> str:
    """The engine's own words, without the HTTP wrapping."""
    return str(exc.explanation) if isinstance(exc, APIError) and exc.explanation else str(exc)
