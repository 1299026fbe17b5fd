"""The receiver's HTTP application: endpoints, and what runs beside them while the daemon lives.

`create_app` puts the parts together. Endpoints trust what reaches them: `receiver.access` has
authenticated the bytes. Must never import Prefect.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, TypeVar

from docker.errors import DockerException
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from requests.exceptions import RequestException

from receiver import access, contract, locks, logs, problems, report, versions
from receiver.access import Access
from receiver.contract import (
    DeploymentStatus,
    DeployRequest,
    ErrorCode,
    HostState,
    ImageAnnouncement,
    PackageAnnouncement,
    Strategy,
)
from receiver.disk import Need
from receiver.engine import Engine, EngineInfo, EngineUnreachable
from receiver.exchange import accepted, as_json, idempotency_key, read
from receiver.guardian import Guardian
from receiver.ledger import Entry, Ledger, utc_now
from receiver.metrics import Metrics, count_deployments
from receiver.operations import Host, loaded_bytes
from receiver.packages import Bytes, OmittedLayersUnknown, PackageMismatch, Packages, held_bytes
from receiver.preload import Preloads
from receiver.proxy import Proxy, ProxyFailed, ProxyMissing
from receiver.proxy_keeper import ProxyKeeper
from receiver.settings import ReceiverSettings

log = logging.getLogger(__name__)
ENGINE_PATIENCE_SECONDS = 12.0
HEALTH_PATIENCE_SECONDS = 4.0
HEALTH_CACHE_SECONDS = 1.0
FACTS_SECONDS = 10.0
RECONNECT_SECONDS = 2.0
SWEEP_SECONDS = 20.0
PROXY_SECONDS = 0.5

AnswerT = TypeVar("AnswerT")


class PlatformMismatch(problems.Refusal):
    """The image is for another platform than this host"""

    slug, status, error_code = "platform-mismatch", 422, ErrorCode.DEPLOYMENT_FAILED
    next_step = "Build the image for the host's platform (docker build --platform)."


class RollingImpossible(problems.Refusal):
    """This host cannot do a rolling update"""

    slug, status, error_code = "rolling-impossible", 422, ErrorCode.DEPLOYMENT_FAILED
    next_step = "Install HAProxy on the host (apt-get install haproxy), or use strategy: recreate."


class EngineLink:
    """The way to the engine: connects when it first answers, and never lets a hung engine hang the daemon.

    Questions run in threads of their own, so that a hung engine cannot take those of the ledger and the
    packages. Raises `EngineUnreachable` when there is no answer in time.
    """

    def __init__(self, settings: ReceiverSettings, engine: Engine | None = None) -> None:
        self._settings = settings
        self._engine = engine
        self._connecting = threading.Lock()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="engine")
        self._probe: asyncio.Task[EngineInfo] | None = None
        self._probed_at = 0.0

    async def ask(
        self, question: Callable[[Engine], AnswerT], patience_seconds: float = ENGINE_PATIENCE_SECONDS
    ) -> AnswerT:
        """The engine's answer to a blocking question."""
        answer = asyncio.get_running_loop().run_in_executor(self._threads, self._answer, question)
        try:
            return await asyncio.wait_for(answer, patience_seconds)
        except TimeoutError as exc:
            raise EngineUnreachable(f"the Docker Engine did not answer in {patience_seconds:.0f} s") from exc

    async def info(self) -> EngineInfo:
        """Who the engine is: asked once a second at most, however many callers there are."""
        return await self._probed(HEALTH_CACHE_SECONDS)

    async def facts(self) -> EngineInfo:
        """What seldom changes of the engine: not asked again for each part of a deployment."""
        return await self._probed(FACTS_SECONDS)

    async def _probed(self, age_seconds: float) -> EngineInfo:
        if self._probe is None or self._is_older(self._probe, age_seconds):
            self._probe = asyncio.create_task(self.ask(lambda engine: engine.info(), HEALTH_PATIENCE_SECONDS))
            self._probed_at = time.monotonic()
        return await asyncio.shield(self._probe)

    def _is_older(self, probe: asyncio.Task[EngineInfo], age_seconds: float) -> bool:
        """An engine that gave no answer is soon asked again, whoever asks."""
        if not probe.done():
            return False
        failed = probe.cancelled() or probe.exception() is not None
        limit_seconds = HEALTH_CACHE_SECONDS if failed else age_seconds
        return time.monotonic() - self._probed_at > limit_seconds

    def _answer(self, question: Callable[[Engine], AnswerT]) -> AnswerT:
        try:
            return question(self._connected())
        except (DockerException, RequestException) as exc:
            raise EngineUnreachable(f"the Docker Engine gave no answer: {exc}") from exc

    def _connected(self) -> Engine:
        with self._connecting:
            if self._engine is None:
                self._engine = Engine(self._settings.docker_host, self._settings.docker_api_version)
            return self._engine


@dataclass(frozen=True)
class Service:
    """The parts that the endpoints use."""

    settings: ReceiverSettings
    ledger: Ledger
    packages: Packages
    preloads: Preloads
    engine: EngineLink
    metrics: Metrics

    async def check_package(
        self, entry: Entry, package: PackageAnnouncement, known_layers: list[str]
    ) -> None:
        """Raise `OmittedLayersUnknown` or `DiskFull` when the engine could not load what is announced."""
        if gone := set(package.omitted_layers) - set(known_layers):
            raise OmittedLayersUnknown(f"the engine does not have {', '.join(sorted(gone))}")
        image, is_new = entry.request.image, entry.package is None
        if image is not None and is_new and not set(image.layers) <= set(known_layers):
            root = Path((await self.engine.facts()).store.data_root)
            self.packages.check_room_for([Need(root, loaded_bytes(image, package), "the loaded image")])

    async def needs_of(self, image: ImageAnnouncement | None, known_layers: list[str]) -> list[Need]:
        """What the engine's disk is asked for, beside the package, which tells where layers are known."""
        if image is None or known_layers or not image.layers:
            return []
        return [Need(Path((await self.engine.facts()).store.data_root), image.size_bytes, "the loaded image")]

    async def look_for(self, image: ImageAnnouncement | None) -> tuple[bool, list[str]]:
        """Whether the engine has the image, and which of its layers; raises `PlatformMismatch`."""
        if image is None:
            return False, []
        self.preloads.spare(image)
        info = await self.engine.facts()
        if (image.os, image.architecture) != (info.os, info.architecture):
            raise PlatformMismatch(
                f"the image is for {image.os}/{image.architecture}, "
                f"this host's engine runs {info.os}/{info.architecture}"
            )
        had_as = await asyncio.to_thread(self.ledger.image_ids, image.config_digest)
        if await self.engine.ask(lambda engine: engine.find_image(image, had_as)) is not None:
            return True, list(image.layers)
        return False, await self.engine.ask(lambda engine: engine.known_layers(image))

    def check_strategy(self, wanted: DeployRequest) -> None:
        """Raise `RollingImpossible`, before a byte is sent, where the proxy is missing."""
        if wanted.deployment_config.way is Strategy.ROLLING:
            try:
                Proxy(self.settings).program()
            except ProxyMissing as exc:
                raise RollingImpossible(str(exc)) from exc

    def take(
        self, wanted: DeployRequest, key: str | None, needs: list[Need], *, present: bool
    ) -> tuple[Entry, bool]:
        """Enter the request into the ledger; a repeated one needs no room of its own. Blocking."""
        waiting = self.ledger.in_states(HostState.RECEIVING, HostState.READY)
        is_known = key is not None and any(entry.idempotency_key == key for entry in waiting)
        if not present and not is_known:
            if wanted.package is None:
                self.packages.check_room_for(needs)
            else:
                self.packages.check_room(wanted.package, *needs, transport=wanted.transport)
        return self.ledger.create(wanted, HostState.READY if present else HostState.RECEIVING, key)

    async def without_upload(self, entry: Entry, *, present: bool) -> Entry:
        """READY at once, when the image came by another deployment meanwhile."""
        if not present or entry.state is not HostState.RECEIVING:
            return entry
        return await asyncio.to_thread(self.ledger.move, entry.deployment_id, HostState.READY)

    def status(self, deployment_id: str) -> DeploymentStatus:
        """What the ledger says, and whether a process works on the deployment now."""
        status = self.ledger.status(deployment_id)
        holder = locks.holder_of(self.settings.locks_dir, status.container_name)
        is_held = holder is not None and holder.deployment_id == deployment_id
        return status.model_copy(update={"is_held": is_held})

    async def operate(self, work: Callable[[Host], Awaitable[DeploymentStatus]]) -> DeploymentStatus:
        """Run an operation of the host."""
        try:
            return await work(await self.host())
        except RequestException as exc:
            raise EngineUnreachable(f"the Docker Engine gave no answer: {exc}") from exc

    async def host(self) -> Host:
        """The host's operations, once its engine answers."""
        return Host(self.settings, self.ledger, await self.engine.ask(lambda engine: engine))

    async def guard(self) -> None:
        """Run the guardian, once the engine answers."""
        await Guardian(await self.host(), tell=self.metrics.count_guardian_action).run()

    async def load_ahead(self, deployment_id: str, held_bytes: int) -> None:
        """Give the engine a package that arrives, where that is worth it."""
        if not self.preloads.is_due(deployment_id, held_bytes):
            return
        part = self.packages.part(deployment_id)
        try:
            await self.engine.ask(
                lambda engine: self.preloads.begin(deployment_id, part, engine), HEALTH_PATIENCE_SECONDS
            )
        except Exception as exc:  # noqa: BLE001 - the chunk was taken; the deployment loads its package itself
            log.info("not loaded ahead: %s", exc, extra={"deployment_id": deployment_id})

    async def sweep(self) -> None:
        """Clear up packages, and what the engine was given ahead for a deployment that never used it."""
        await self.packages.sweep()
        if left := await asyncio.to_thread(self.preloads.left):
            await self.engine.ask(lambda engine: self.preloads.clear(left, engine))

    async def keep_proxy(self) -> None:
        """Start HAProxy when a service needs it and it does not run; it outlives this daemon."""
        if await asyncio.to_thread(ProxyKeeper(self.settings).keep_running):
            log.warning("HAProxy was started")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
router = APIRouter()


@router.get(contract.HEALTH_PATH)
async def tell_health(service: TheService) -> Response:
    """200 when the engine answers, else 503 with the same fields."""
    try:
        info = await service.engine.info()
    except EngineUnreachable:
        info = None
    health = contract.HostHealth(
        status="healthy" if info else "degraded",
        docker_connected=info is not None,
        version=_version(),
        architecture=info.architecture if info else None,
        engine_version=info.version if info else None,
        time=utc_now(),
    )
    return as_json(health, 200 if info else 503)


@router.get(contract.METRICS_PATH)
async def tell_metrics(service: TheService) -> Response:
    """Counters in Prometheus' text format."""
    deployments = await asyncio.to_thread(count_deployments, service.settings.ledger_path)
    text = service.metrics.render(_version(), deployments)
    return Response(text, media_type="text/plain; version=0.0.4")


@router.post(contract.DEPLOY_PATH)
async def announce_deployment(request: Request, service: TheService) -> Response:
    """Take a deployment: 201, or 200 when the same request was taken before."""
    wanted = _correlated(await read(request, DeployRequest), request)
    service.check_strategy(wanted)
    key = idempotency_key(request, service.settings)
    present, known_layers = await service.look_for(wanted.image)
    needs = await service.needs_of(wanted.image, known_layers)
    entry, is_new = await asyncio.to_thread(service.take, wanted, key, needs, present=present)
    entry = await service.without_upload(entry, present=present)
    entry = await service.packages.adopt(entry) if is_new else entry
    incoming = await service.packages.open_incoming(entry)
    answer = accepted(entry, known_layers, present=present, incoming=incoming)
    return as_json(answer, 201 if is_new else 200)


@router.post(contract.deploy_path("{deployment_id}", "package"))
async def announce_package(deployment_id: str, request: Request, service: TheService) -> Response:
    """Take the announcement of a package that was not known when the deployment was announced."""
    package = await read(request, PackageAnnouncement)
    entry = await asyncio.to_thread(service.ledger.get, deployment_id)
    present, known_layers = await service.look_for(entry.request.image)
    await service.check_package(entry, package, known_layers)
    try:
        entry = await service.packages.announce(deployment_id, package)
    except PackageMismatch:
        service.metrics.count_package("rejected")
        raise
    if entry.state is HostState.READY:
        service.metrics.count_package("ready")
    entry = await service.without_upload(entry, present=present)
    incoming = await service.packages.open_incoming(entry)
    return as_json(accepted(entry, known_layers, present=present, incoming=incoming))


@router.head(contract.deploy_path("{deployment_id}", "package"))
async def tell_upload_offset(deployment_id: str, service: TheService) -> Response:
    """Where the upload goes on."""
    entry = await asyncio.to_thread(service.ledger.get, deployment_id)
    headers = {contract.UPLOAD_OFFSET_HEADER: str(held_bytes(entry)), "Cache-Control": "no-store"}
    if entry.package is not None:
        headers[contract.UPLOAD_LENGTH_HEADER] = str(entry.package.size_bytes)
    if digest := await service.packages.held_digest(deployment_id):
        headers[contract.UPLOAD_DIGEST_HEADER] = digest
    return Response(headers=headers)


@router.delete(contract.deploy_path("{deployment_id}", "package"))
async def drop_package(deployment_id: str, service: TheService) -> Response:
    """Forget what came: a sender whose bytes are others begins anew."""
    await service.packages.drop(deployment_id)
    return Response(status_code=204, headers={contract.UPLOAD_OFFSET_HEADER: "0"})


@router.patch(contract.deploy_path("{deployment_id}", "package"))
async def take_chunk(deployment_id: str, request: Request, service: TheService) -> Response:
    """Take one chunk of the package; the last one has it verified."""
    offset, chunk = _offset(request), await _chunk(request)
    try:
        new_offset = await service.packages.append(deployment_id, offset, chunk)
    except PackageMismatch:
        service.metrics.count_upload(offset, 0)
        service.metrics.count_package("rejected")
        raise
    service.metrics.count_upload(offset, len(chunk))
    await service.load_ahead(deployment_id, new_offset)
    entry = await asyncio.to_thread(service.ledger.get, deployment_id)
    if entry.state is not HostState.RECEIVING:
        service.metrics.count_package("ready")
    return Response(status_code=204, headers={contract.UPLOAD_OFFSET_HEADER: str(new_offset)})


@router.post(contract.deploy_path("{deployment_id}", "collect"))
async def collect_package(deployment_id: str, service: TheService) -> Response:
    """Take over the package that rsync brought, and verify it; a package that was taken stays so."""
    try:
        taken_bytes = await service.packages.collect(deployment_id)
    except PackageMismatch:
        service.metrics.count_package("rejected")
        raise
    if taken_bytes:
        service.metrics.count_upload(0, taken_bytes)
        service.metrics.count_package("ready")
    return as_json(await asyncio.to_thread(service.status, deployment_id))


@router.get(contract.deploy_path("{deployment_id}", "status"))
async def tell_status(deployment_id: str, service: TheService) -> Response:
    """Everything the control host may know of a deployment."""
    return as_json(await asyncio.to_thread(service.status, deployment_id))


@router.get(contract.workflow_path("{workflow_id}"))
async def tell_status_of_workflow(workflow_id: str, service: TheService) -> Response:
    """The same for the deployment that a workflow announced, for when its id was lost with its sender."""
    entry = await asyncio.to_thread(service.ledger.of_workflow, workflow_id)
    return as_json(await asyncio.to_thread(service.status, entry.deployment_id))


@router.post(contract.deploy_path("{deployment_id}", "restore"))
async def restore(deployment_id: str, service: TheService) -> Response:
    """Bring the previous container back, without the host's worker."""
    return as_json(await service.operate(lambda host: host.restore(deployment_id)))


@router.post(contract.deploy_path("{deployment_id}", "abort"))
async def abort(deployment_id: str, service: TheService) -> Response:
    """End the deployment; what it changed is undone, what it sent is deleted."""
    status = await service.operate(lambda host: host.abort(deployment_id))
    if status.state.settled:
        await asyncio.to_thread(service.packages.discard, deployment_id)
    return as_json(status)


def create_app(
    settings: ReceiverSettings, *, ledger: Ledger | None = None, engine: Engine | None = None
) -> FastAPI:
    """The application; makes the state folders, needs no engine to start.

    A ledger or an engine that is given is used and not closed.
    """
    settings.make_folders()
    book = ledger or Ledger(settings.ledger_path)
    metrics = Metrics(access.REASONS)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=_lifespan)
    preloads = Preloads(settings.packages_dir, book, settings.load_ahead_bytes)
    link = EngineLink(settings, engine)
    app.state.service = Service(settings, book, Packages(settings, book), preloads, link, metrics)
    app.include_router(router)
    app.include_router(versions.router)
    app.include_router(report.router)
    problems.install(app)
    app.add_middleware(
        Access,
        keys=settings.hmac_keys,
        ledger=book,
        allowed_networks=settings.allowed_networks,
        signature_header=settings.signature_header,
        tolerance_seconds=settings.timestamp_tolerance_seconds,
        rate_limit_per_second=settings.rate_limit_per_second,
        max_uploads=settings.max_uploads,
        on_refusal=metrics.count_refusal,
    )
    app.add_middleware(logs.RequestLog, metrics=metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    # A chunk holds a thread while it is written; the ledger's short calls must not wait for one.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(service.settings.max_uploads + 8))
    beside = [
        asyncio.create_task(_keep_going("guardian", service.guard, RECONNECT_SECONDS)),
        asyncio.create_task(_keep_going("sweep", service.sweep, SWEEP_SECONDS)),
        asyncio.create_task(_keep_going("proxy", service.keep_proxy, PROXY_SECONDS)),
    ]
    try:
        yield
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)


async def _keep_going(name: str, work: Callable[[], Awaitable[None]], pause_seconds: float) -> None:
    """Do the work again and again: nothing that goes wrong once may leave the host without it."""
    told = ""
    while True:
        try:
            await work()
            told = ""
        except (EngineUnreachable, ProxyFailed) as exc:
            if str(exc) != told:
                log.warning("%s waits: %s", name, exc)
            told = str(exc)
        except Exception:
            log.exception("%s failed; it starts again in %.0f s", name, pause_seconds)
        await asyncio.sleep(pause_seconds)


async def _chunk(request: Request) -> Bytes:
    """The body in the one piece that `receiver.access` read, without a copy."""
    async for piece in request.stream():
        return piece
    return b""


def _offset(request: Request) -> int:
    text = request.headers.get(contract.UPLOAD_OFFSET_HEADER, "")
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise problems.MalformedRequest(
            f"{contract.UPLOAD_OFFSET_HEADER}: give the chunk's first byte, from 0"
        )
    return int(text)


def _correlated(wanted: DeployRequest, request: Request) -> DeployRequest:
    """The specification's own client names its workflow in a header only."""
    given = request.headers.get(contract.CORRELATION_HEADER, "")
    if wanted.workflow_id is None and logs.CORRELATION.fullmatch(given):
        return wanted.model_copy(update={"workflow_id": given})
    return wanted


def _version() -> str:
    try:
        return metadata.version("gantry-deploy")
    except metadata.PackageNotFoundError:
        return "unknown"
