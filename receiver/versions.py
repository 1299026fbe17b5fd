"""What a host keeps of each container, and the way back to one of it by hand.

Owns which containers count as versions, and which one is the previous. The way back is a deployment like
any other, of the kept version's own request: `receiver.operations` prepares, switches, proves or restores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from receiver import contract
from receiver.contract import (
    ContainerVersion,
    ContainerVersions,
    DeploymentConfig,
    DeployRequest,
    ErrorCode,
    HostContainers,
    HostState,
    ImageAnnouncement,
    RollbackRequest,
    RollbackTarget,
    Strategy,
)
from receiver.engine import MadeContainer
from receiver.exchange import accepted, as_json, idempotency_key, read
from receiver.ledger import DeploymentUnknown, Entry, IdempotencyConflict, Ledger
from receiver.problems import Refusal

if TYPE_CHECKING:
    from receiver.app import Service


_WAY = ("strategy", "hostname", "https_certificate_file", "drain_timeout_seconds")


class ContainerUnknown(Refusal):
    """This host has no version of such a container"""

    slug, status, error_code = "container-unknown", 404, ErrorCode.DEPLOYMENT_FAILED
    next_step = "See what the host has: prefect deployment run list-versions/default --watch."


class NothingKept(Refusal):
    """This host keeps no version to go back to"""

    slug, status, error_code = "nothing-kept", 409, ErrorCode.DEPLOYMENT_FAILED
    next_step = "Deploy the version that you want."


class VersionUnknown(Refusal):
    """This host keeps no such version"""

    slug, status, error_code = "version-unknown", 404, ErrorCode.DEPLOYMENT_FAILED
    next_step = "Name one of those kept, by deployment id or image tag, or deploy the version that you want."


class VersionRuns(Refusal):
    """The version asked for is the one that the container has now"""

    slug, status, error_code = "version-runs", 409, ErrorCode.DEPLOYMENT_FAILED
    next_step = "Name another version; of several with the same tag, name one by its deployment id."


class VersionLost(Refusal):
    """The host has the version's container, but not what it takes to start another like it"""

    slug, status, error_code = "version-lost", 409, ErrorCode.DEPLOYMENT_FAILED
    next_step = "Name another version, or deploy the one that you want."


@dataclass(frozen=True)
class Version:
    """A container of ours with the ledger's entry that made it; None when the ledger knows nothing of it."""

    container: MadeContainer
    entry: Entry | None

    @property
    def deployment_id(self) -> str:
        """What names the version on this host."""
        return self.container.deployment_id

    @property
    def config_digest(self) -> str | None:
        """What every engine knows the image by; None when the ledger does not know it."""
        return self.entry.facts.image_config_digest if self.entry else None

    @property
    def is_current(self) -> bool:
        """True for the one that has the container's name."""
        return self.container.name == self.container.container_name

    @property
    def is_kept(self) -> bool:
        """True for one that served before; one that is being deployed, or has failed, never did."""
        was_proven = self.entry is None or self.entry.state is HostState.KEPT
        return was_proven and not self.is_current

    def is_like(self, other: Version) -> bool:
        """True when going from one to the other would change nothing."""
        if self.container.image_id != other.container.image_id or self.entry is None or other.entry is None:
            return False
        return _essence(self.entry.request) == _essence(other.entry.request)

    def told(self) -> ContainerVersion:
        """As the wire has it."""
        made = self.container
        return ContainerVersion(
            deployment_id=made.deployment_id,
            image_tag=made.image_tag,
            image_id=made.image_id,
            created_at=made.created_at,
            running=made.running,
            role="running" if self.is_current else "kept",
            can_be_restored=self.entry is not None,
        )

    def __str__(self) -> str:
        return f"{self.container.image_tag} ({self.deployment_id})"


def _essence(request: DeployRequest) -> DeployRequest:
    """What of a request makes the container; the image is compared apart, by the engine's id."""
    plain = {name: DeploymentConfig.model_fields[name].default for name in _WAY}
    config = request.deployment_config.model_copy(update=plain)
    return request.model_copy(
        update={
            "workflow_id": None,
            "image": None,
            "package": None,
            "rollback_on_failure": True,
            "deployment_config": config,
        }
    )


@dataclass(frozen=True)
class Shelf:
    """The versions of one container, newest first: the current one and those kept."""

    container_name: str
    versions: tuple[Version, ...]

    @property
    def current(self) -> Version | None:
        """The one that has the name; None when another container has it, or none."""
        return next((version for version in self.versions if version.is_current), None)

    @property
    def previous(self) -> Version | None:
        """The newest kept one that is another version than the current one."""
        current = self.current
        kept = (version for version in self.versions if version.is_kept)
        return next((version for version in kept if not (current and version.is_like(current))), None)

    def choose(self, to: str | None) -> Version:
        """The version that `to` names, by deployment id or tag, or the previous one; raises a `Refusal`."""
        if not self.versions:
            raise ContainerUnknown(f"no version of {self.container_name!r} is on this host")
        chosen = self._named(to) if to is not None else self.previous
        if chosen is None:
            raise NothingKept(f"of {self.container_name} nothing is kept but what runs: {self.current}")
        return chosen

    def _named(self, to: str) -> Version:
        named = [found for found in self.versions if to in (found.deployment_id, found.container.image_tag)]
        if any(version.is_current for version in named):
            raise VersionRuns(f"{to} is the current version of {self.container_name}")
        if not named:
            kept = [str(version) for version in self.versions if version.is_kept]
            raise VersionUnknown(
                f"no version {to!r} of {self.container_name} is kept; kept: {', '.join(kept) or 'none'}"
            )
        return named[0]

    def told(self) -> ContainerVersions:
        """As the wire has it."""
        return ContainerVersions(
            container_name=self.container_name,
            versions=[version.told() for version in self.versions],
            previous=self.previous.deployment_id if self.previous else None,
        )


def shelve(ledger: Ledger, containers: Sequence[MadeContainer]) -> list[Shelf]:
    """Containers of ours, newest first, as shelves by name, without what never served. Blocking."""
    shelves: dict[str, list[Version]] = {}
    for made in containers:
        version = Version(made, _find(ledger, made.deployment_id))
        if version.is_current or version.is_kept:
            shelves.setdefault(made.container_name, []).append(version)
    return [Shelf(name, tuple(versions)) for name, versions in sorted(shelves.items())]


def _find(ledger: Ledger, deployment_id: str) -> Entry | None:
    try:
        return ledger.get(deployment_id)
    except DeploymentUnknown:
        return None


def request_of(
    version: Version, image: ImageAnnouncement, workflow_id: str | None, current: Version | None = None
) -> DeployRequest:
    """The request that brings a kept version back: its own, but what ran before returns if it is unwell.

    It goes the way of the current version, where the kept one can; without a current one, its own.
    """
    if version.entry is None:
        raise VersionLost(f"the ledger of this host does not know how {version} was started")
    return version.entry.request.model_copy(
        update={
            "image": image,
            "package": None,
            "workflow_id": workflow_id,
            "rollback_on_failure": True,
            "deployment_config": _by_way_of(current, version.entry.request.deployment_config),
        }
    )


def _by_way_of(current: Version | None, config: DeploymentConfig) -> DeploymentConfig:
    if current is None or current.entry is None:
        return config
    now = current.entry.request.deployment_config
    if now.way is config.way or (now.way is Strategy.ROLLING and config.cannot_roll):
        return config
    way = {name: getattr(now, name) for name in _WAY}
    if now.way is Strategy.RECREATE:  # perhaps as a fallback, with names that only the proxy heeds
        way |= {"strategy": now.way, "hostname": None, "https_certificate_file": None}
    return config.model_copy(update=way)


# -- endpoints -----------------------------------------------------------------------------------

router = APIRouter()


@router.get(contract.CONTAINERS_PATH)
async def tell_containers(request: Request) -> Response:
    """What the host keeps of every container."""
    shelves = await _shelves(request.app.state.service, None)
    return as_json(HostContainers(containers=[shelf.told() for shelf in shelves]))


@router.get(contract.container_path("{container_name}"))
async def tell_versions(container_name: str, request: Request) -> Response:
    """What the host keeps of one container."""
    shelf = await _shelf(request.app.state.service, container_name)
    if not shelf.versions:
        raise ContainerUnknown(f"no version of {container_name!r} is on this host")
    return as_json(shelf.told())


@router.get(contract.container_path("{container_name}", "rollback"))
async def tell_target(container_name: str, request: Request, to: str | None = None) -> Response:
    """Where a rollback would go back to; refused as that would be."""
    version, image, _ = await _target(request.app.state.service, container_name, to)
    health_check = request_of(version, image, None).health_check_config
    return as_json(RollbackTarget(version=version.told(), image=image, health_check_config=health_check))


@router.post(contract.container_path("{container_name}", "rollback"))
async def roll_back(container_name: str, request: Request) -> Response:
    """Take a deployment of a kept version: 201, or 200 when the same request was taken before."""
    service: Service = request.app.state.service
    wanted = await read(request, RollbackRequest)
    key = idempotency_key(request, service.settings)
    if known := await asyncio.to_thread(_taken_before, service.ledger, key, container_name, wanted):
        return as_json(accepted(known, _layers(known), present=True))
    version, image, current = await _target(service, container_name, wanted.to)
    entry, is_new = await asyncio.to_thread(
        service.ledger.create,
        request_of(version, image, wanted.workflow_id, current),
        HostState.READY,
        key,
        restored_from=version.deployment_id,
    )
    return as_json(accepted(entry, _layers(entry), present=True), 201 if is_new else 200)


def _taken_before(ledger: Ledger, key: str | None, name: str, wanted: RollbackRequest) -> Entry | None:
    """The entry of the same request; asked by its key, for by now the previous version is another one."""
    entry = ledger.of_key(key) if key else None
    if entry is None:
        return None
    taken, source = entry.request, entry.facts.restored_from
    is_same = (name, wanted.workflow_id) == (taken.container_name, taken.workflow_id)
    if not is_same or source is None or wanted.to not in (None, source, taken.image_tag):
        raise IdempotencyConflict(f"idempotency key {key!r} names another request")
    return entry


def _layers(entry: Entry) -> list[str]:
    return list(entry.request.image.layers) if entry.request.image else []


async def _shelves(service: Service, container_name: str | None) -> list[Shelf]:
    containers = await service.engine.ask(lambda engine: engine.made_containers(container_name))
    return await asyncio.to_thread(shelve, service.ledger, containers)


async def _shelf(service: Service, container_name: str) -> Shelf:
    found = await _shelves(service, container_name)
    return found[0] if found else Shelf(container_name, ())


async def _target(
    service: Service, container_name: str, to: str | None
) -> tuple[Version, ImageAnnouncement, Version | None]:
    """The version to go back to, its image as this engine has it, and the current version.

    The container pins the image.
    """
    shelf = await _shelf(service, container_name)
    version = shelf.choose(to)
    image_id, digest = version.container.image_id, version.config_digest
    image = await service.engine.ask(lambda engine: engine.announce_image(image_id, digest))
    if image is None:
        raise VersionLost(f"the image of {version} was removed from this host's engine")
    return version, image, shelf.current
