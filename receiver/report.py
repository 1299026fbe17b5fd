"""What a host says of itself before a deployment: engine, disks, wanted ports, what is not at rest.

Owns `GET /api/host`. Changes nothing. A part that cannot be told is left out; the rest is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request, Response

from receiver import contract, locks, ports
from receiver.contract import HostDisk, HostEngine, HostProxy, HostReport, OpenDeployment
from receiver.engine import EngineInfo, EngineUnreachable, PublishedPort
from receiver.exchange import as_json
from receiver.ledger import Entry, utc_now
from receiver.problems import MalformedRequest
from receiver.proxy import Proxy, ProxyFailed
from receiver.settings import ReceiverSettings

if TYPE_CHECKING:
    from receiver.app import Service

MAX_PORTS = 64
_MOUNTS = Path("/proc/self/mountinfo")
router = APIRouter()


@router.get(contract.HOST_PATH)
async def tell_host(
    request: Request,
    port: Annotated[list[str], Query(max_length=MAX_PORTS)] = [],  # noqa: B006 - not changed
    *,
    proxy: bool = False,
) -> Response:
    """How the host is; an engine that does not answer is told as none, the proxy to those who ask for it."""
    service: Service = request.app.state.service
    wanted = [_wanted(text) for text in port]
    info = await _or_none(service)
    published = await _published(service) if info and wanted else []
    told = await asyncio.to_thread(_report, service, info, wanted, published)
    if not proxy:
        return as_json(told, without={"proxy"})
    return as_json(told.model_copy(update={"proxy": await asyncio.to_thread(_proxy, service)}))


def _wanted(text: str) -> ports.Wanted:
    try:
        return ports.parse_port(text)
    except ports.PortMalformed as exc:
        raise MalformedRequest(str(exc)) from exc


async def _or_none(service: Service) -> EngineInfo | None:
    try:
        return await service.engine.info()
    except EngineUnreachable:
        return None


async def _published(service: Service) -> list[PublishedPort]:
    with contextlib.suppress(EngineUnreachable):
        return [*_proxied(service), *await service.engine.ask(lambda engine: engine.published_ports())]
    return []


def _proxied(service: Service) -> list[PublishedPort]:
    """Public ports of rolling services, which HAProxy holds for them."""
    with contextlib.suppress(ProxyFailed):
        return [
            PublishedPort(bind.host_port, "tcp", f"{route.service} (HAProxy)", route.service)
            for route in Proxy(service.settings).routes().routes
            for bind in route.binds
        ]
    return []


def _proxy(service: Service) -> HostProxy | None:
    """HAProxy, unless its routes cannot be read; one without routes need not run."""
    proxy = Proxy(service.settings)
    with contextlib.suppress(ProxyFailed, subprocess.TimeoutExpired):
        services = [route.service for route in proxy.routes().routes]
        return HostProxy(
            version=proxy.version(),
            runs=bool(services) and proxy.answers(),
            services=services,
            left_out=proxy.left_out(),
        )
    return None


def _report(
    service: Service,
    info: EngineInfo | None,
    wanted: Iterable[ports.Wanted],
    published: Sequence[PublishedPort],
) -> HostReport:
    settings = service.settings
    folders = [settings.state_dir, *([Path(info.store.data_root)] if info else [])]
    return HostReport(
        version=_version(),
        time=utc_now(),
        engine=_engine(info) if info else None,
        disks=[disk for folder in folders for disk in disk_of(folder)],
        ports=[ports.look_at(pair, published) for pair in wanted],
        open_deployments=[_open(entry, settings) for entry in service.ledger.open_entries()],
        settings=told_settings(settings),
    )


def _engine(info: EngineInfo) -> HostEngine:
    return HostEngine(
        version=info.version,
        architecture=info.architecture,
        os=info.os,
        storage_driver=info.store.driver,
    )


def _open(entry: Entry, settings: ReceiverSettings) -> OpenDeployment:
    holder = locks.holder_of(settings.locks_dir, entry.request.container_name)
    return OpenDeployment(
        deployment_id=entry.deployment_id,
        workflow_id=entry.request.workflow_id,
        container_name=entry.request.container_name,
        image_tag=entry.request.image_tag,
        state=entry.state,
        is_held=holder is not None and holder.deployment_id == entry.deployment_id,
        updated_at=entry.updated_at,
    )


def disk_of(folder: Path) -> list[HostDisk]:
    """The disk below a folder; none when it cannot be seen from here."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        return [
            HostDisk(
                path=str(folder),
                device=_device(folder.stat().st_dev),
                free_bytes=disk.f_bavail * disk.f_frsize,
                total_bytes=disk.f_blocks * disk.f_frsize,
            )
        ]
    return []


def _device(number: int) -> str:
    """The mounted device, such as /dev/vda1; its number where the kernel does not list it."""
    name = f"{os.major(number)}:{os.minor(number)}"
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text().splitlines():
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == name:
                return source.split()[1]
    return name


def told_settings(settings: ReceiverSettings) -> dict[str, str]:
    """The settings by their variables, without keys and without what may hold one."""
    return {
        "HOOK_RECEIVER_HOST": settings.host,
        "HOOK_RECEIVER_PORT": str(settings.port),
        "HOOK_RECEIVER_STATE_DIR": str(settings.state_dir),
        "HOOK_RECEIVER_MAX_PACKAGE_BYTES": str(settings.max_package_bytes),
        "HOOK_RECEIVER_MAX_UPLOADS": str(settings.max_uploads),
        "HOOK_RECEIVER_LOAD_AHEAD_BYTES": str(settings.load_ahead_bytes),
        "HOOK_RECEIVER_RATE_LIMIT_PER_SECOND": str(settings.rate_limit_per_second),
        "IP_WHITELIST": ",".join(map(str, settings.allowed_networks)),
        "DOCKER_API_VERSION": settings.docker_api_version or "auto",
        "HEALTH_CHECK_MAX_RETRIES": str(settings.health_check_max_retries),
        "HEALTH_CHECK_RETRY_INTERVAL_MS": str(settings.health_check_retry_interval_ms),
        "HEALTH_CHECK_TIMEOUT_MS": str(settings.health_check_timeout_ms),
        "HOOK_RECEIVER_HAPROXY": settings.haproxy,
        "LOG_LEVEL": settings.log_level,
    }


def _version() -> str:
    try:
        return metadata.version("gantry-deploy")
    except metadata.PackageNotFoundError:
        return "unknown"
