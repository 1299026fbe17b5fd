"""Everything said to Docker on the host. Blocking: callers leave the event loop by `asyncio.to_thread`.

Containers are found by id, by exact name or by label, never by parsing names.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import docker
from docker.errors import APIError, DockerException, ImageLoadError, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.models.images import Image
from docker.types import Mount

from receiver import contract
from receiver.archive import ArchiveDamaged, ArchivedImage, checked_package
from receiver.binding import bind_error
from receiver.contract import DeploymentConfig, ImageAnnouncement, PackageAnnouncement, PortMapping
from receiver.engine_store import has_containerd_store
from receiver.engine_version import newest_api_version

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
_CALL_TIMEOUT_SECONDS = 120
_STORE_SECONDS = 10.0
_POLICY_TRIES = 10
_POLICY_PAUSE_SECONDS = 0.1
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


class EngineUnreachable(Exception):
    """The Docker Engine does not answer"""


class PackageRefused(Exception):
    """The package does not hold the announced image"""


class PortTaken(Exception):
    """A host port is already taken"""


@dataclass(frozen=True)
class ImageStore:
    """Where and how the engine keeps images; another one only after it was started anew."""

    data_root: str
    driver: str = ""
    is_containerd: bool = False


@dataclass(frozen=True)
class EngineInfo:
    """Identity of the engine."""

    version: str
    architecture: str
    os: str
    store: ImageStore


@dataclass(frozen=True)
class LoadedImage:
    """An image as this engine knows it; `image_id` differs between engines, the rest does not."""

    image_id: str
    config_digest: str | None
    layers: tuple[str, ...]
    architecture: str


@dataclass(frozen=True)
class PublishedPort:
    """A host port that a running container publishes; `container_name` is our label, None for others'."""

    port: int
    protocol: str
    name: str
    container_name: str | None


@dataclass(frozen=True)
class ContainerState:
    """What the engine says of a container at one moment."""

    status: str
    running: bool
    restart_count: int
    exit_code: int
    started_at: str
    image_id: str
    health: str | None
    error: str


@dataclass(frozen=True)
class MadeContainer:
    """A container that one of our deployments made; `name` is the engine's, `container_name` our label."""

    container_id: str
    container_name: str
    name: str
    deployment_id: str
    image_tag: str
    image_id: str
    created_at: datetime
    running: bool


def _negotiated_version(base_url: str, wanted: str | None) -> str:
    """The API version to speak: the engine's newest, or an older one that was asked for."""
    newest = newest_api_version(base_url)
    if wanted is None or wanted == "auto":
        return newest
    if _as_numbers(wanted) > _as_numbers(newest):
        log.warning("DOCKER_API_VERSION %s is newer than the engine's %s; using %s", wanted, newest, newest)
        return newest
    return wanted


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


class Engine:
    """The host's Docker Engine. Raises `EngineUnreachable` when it does not answer."""

    def __init__(self, base_url: str, api_version: str | None = None) -> None:
        self._base_url = base_url
        self._store: ImageStore | None = None
        self._store_asked_at = 0.0
        try:
            self._client = docker.DockerClient(
                base_url=base_url,
                version=_negotiated_version(base_url, api_version),
                timeout=_CALL_TIMEOUT_SECONDS,
            )
        except DockerException as exc:
            raise EngineUnreachable(
                f"no Docker Engine answers at {base_url} ({exc}); start it: systemctl start docker"
            ) from exc

    @property
    def is_local(self) -> bool:
        """True when the engine's ports are this machine's ports."""
        return self._base_url.startswith(("unix://", "http+unix://"))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def info(self) -> EngineInfo:
        """Version, platform and store of the engine, asked anew."""
        with self._answers():
            told = self._client.version()
        return EngineInfo(told["Version"], told["Arch"], told["Os"], self._ask_for_store())

    def store(self) -> ImageStore:
        """The engine's store as it was some seconds ago at most: asking takes as long as a small layer."""
        if self._store is None or time.monotonic() - self._store_asked_at > _STORE_SECONDS:
            return self._ask_for_store()
        return self._store

    def _ask_for_store(self) -> ImageStore:
        asked_at = time.monotonic()
        with self._answers():
            told = self._client.info()
        root = told.get("DockerRootDir", "/var/lib/docker")
        self._store = ImageStore(root, told.get("Driver", ""), has_containerd_store(told))
        self._store_asked_at = asked_at
        return self._store

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except (DockerException, OSError) as exc:
            raise EngineUnreachable(f"the Docker Engine at {self._base_url} does not answer: {exc}") from exc

    # -- images ----------------------------------------------------------------------------------

    def find_image(self, announced: ImageAnnouncement, had_as: Sequence[str] = ()) -> LoadedImage | None:
        """The announced image when the engine has it: under its config digest, as a classic store has it.

        A containerd store has it under another id: under one of `had_as`, which the ledger knows.
        """
        for image_id in (announced.config_digest, *had_as):
            with contextlib.suppress(ImageNotFound):
                found = self.inspect_image(image_id)
                if list(found.layers) == announced.layers:
                    return found
        return None

    def inspect_image(self, reference: str) -> LoadedImage:
        """Identity of a local image; raises docker's `ImageNotFound`."""
        attributes = self._client.images.get(reference).attrs
        return LoadedImage(
            image_id=attributes["Id"],
            config_digest=None,
            layers=tuple(attributes["RootFS"].get("Layers") or ()),
            architecture=attributes["Architecture"],
        )

    def announce_image(self, image_id: str, config_digest: str | None = None) -> ImageAnnouncement | None:
        """A local image as a sender would announce it, or None when it is gone.

        Without its config digest it is called by its id, which is the same in a classic store only.
        """
        try:
            attributes = self._client.images.get(image_id).attrs
        except ImageNotFound:
            return None
        return ImageAnnouncement(
            config_digest=config_digest or attributes["Id"],
            layers=list(attributes["RootFS"].get("Layers") or ()),
            architecture=attributes["Architecture"],
            os=attributes["Os"],
            size_bytes=attributes["Size"],
        )

    def known_layers(self, announced: ImageAnnouncement) -> list[str]:
        """Those of the announced diff ids without which this engine loads the image.

        It knows a layer together with all below it: the longest beginning that some image shares. One that
        comes again above it has to be sent. A containerd image store wants every layer.
        """
        if self.store().is_containerd:
            return []
        images = (self._layers_of(image) for image in self._client.images.list(all=True))
        shared = max((_shared_layers(layers, announced.layers) for layers in images), default=0)
        above = set(announced.layers[shared:])
        return [layer for layer in announced.layers[:shared] if layer not in above]

    def _layers_of(self, image: Image) -> list[str]:
        layers = image.attrs.get("RootFS", {}).get("Layers")
        if layers is None:
            with contextlib.suppress(NotFound):
                layers = self._client.images.get(str(image.id)).attrs["RootFS"].get("Layers")
        return list(layers or ())

    def load_image(
        self, path: Path, announced: ImageAnnouncement | None, package: PackageAnnouncement | None = None
    ) -> LoadedImage:
        """Load the docker-archive in a package while it is read, and return the image in it.

        Raises `PackageRefused` when the archive is damaged or not the announced image, with nothing loaded,
        and when the engine makes other layers of it. A containerd image store is given no name with it: it
        would drop the image that had the name, though a container uses that.
        """
        found: list[ArchivedImage] = []
        nameless = self.store().is_containerd
        archive = checked_package(path, announced, package, found.append, nameless=nameless)
        try:
            loaded = self._client.images.load(cast("bytes", archive))
        except ArchiveDamaged as exc:
            raise PackageRefused(f"the package is refused, and nothing of it was loaded: {exc}") from exc
        except ImageLoadError as exc:
            raise PackageRefused(f"the engine refuses the package: {exc}; deploy again") from exc
        finally:
            archive.close()
        if len(loaded) != 1:
            raise PackageRefused(f"the package holds {len(loaded)} images; one is expected")
        image = self.inspect_image(str(loaded[0].id))
        if announced is not None and list(image.layers) != announced.layers:
            raise PackageRefused(f"the loaded image {image.image_id} has other layers than announced")
        return replace(image, config_digest=found[0].config_digest)

    def load_nameless(self, archive: Generator[bytes]) -> None:
        """Load an image from an archive that gives it no name; what reading it raises is raised here."""
        self._client.images.load(cast("bytes", archive))

    def tag_image(self, image_id: str, repository: str, tag: str) -> None:
        """Name an image; the name moves from an older image."""
        self._client.images.get(image_id).tag(repository, tag)

    def remove_our_image(self, image_id: str) -> bool:
        """Remove an image that carries our label and no container uses; True when it is gone."""
        with contextlib.suppress(ImageNotFound):
            image = self._client.images.get(image_id)
            if contract.LABEL_CONTAINER not in (image.labels or {}) or self._is_used(str(image.id)):
                return False
            return self._remove_images(image.tags or [image_id])
        return True

    def remove_nameless_image(self, image_id: str) -> bool:
        """Remove an image that has no name and that no container uses; True when it is gone."""
        with contextlib.suppress(ImageNotFound):
            image = self._client.images.get(image_id)
            is_named = image.tags or image.attrs.get("RepoDigests")
            if is_named or self._is_used(str(image.id)):
                return False
            return self._remove_images([image_id])
        return True

    def _remove_images(self, references: Sequence[str]) -> bool:
        try:
            for reference in references:
                self._client.images.remove(reference)
        except APIError as exc:
            if exc.status_code == 409:  # in use by a container: it stays
                return False
            raise
        return True

    def _is_used(self, image_id: str) -> bool:
        """Asked first: the engine takes all names but the last from an image that a container uses."""
        return any(used["ImageID"] == image_id for used in self._client.api.containers(all=True))

    # -- containers ------------------------------------------------------------------------------

    def find_container(self, id_or_name: str) -> Container | None:
        """The container with this whole id or exact name, with fresh attributes, or None."""
        is_id = _CONTAINER_ID.fullmatch(id_or_name)
        container_id = id_or_name if is_id else self._id_of(id_or_name)
        try:
            return self._client.containers.get(container_id) if container_id else None
        except NotFound:
            return None

    def _id_of(self, name: str) -> str | None:
        """By a list, because the engine takes a name such as `db` for the beginning of an id, too."""
        listed = self._client.api.containers(all=True, filters={"name": f"^/{re.escape(name)}$"})
        return next((str(found["Id"]) for found in listed if f"/{name}" in found["Names"]), None)

    def state(self, container_id: str) -> ContainerState:
        """State of a container now; raises docker's `NotFound`."""
        attributes = self._client.containers.get(container_id).attrs
        state = attributes["State"]
        return ContainerState(
            status=state["Status"],
            running=bool(state["Running"]) and not (state["Restarting"] or state["Paused"]),
            restart_count=int(attributes["RestartCount"]),
            exit_code=int(state["ExitCode"]),
            started_at=state["StartedAt"],
            image_id=attributes["Image"],
            health=(state.get("Health") or {}).get("Status"),
            error=state.get("Error", ""),
        )

    def address(self, container_id: str) -> str | None:
        """First address of a container on its networks, as the host reaches it."""
        networks = self._client.containers.get(container_id).attrs["NetworkSettings"]["Networks"]
        addresses = (network.get("IPAddress") for network in networks.values())
        return next((str(address) for address in addresses if address), None)

    def bridge(self, container_id: str) -> str | None:
        """The interface of this machine that leads to a container; None where it has no such one."""
        mode = self._client.containers.get(container_id).attrs["HostConfig"]["NetworkMode"]
        try:
            network = self._client.networks.get("bridge" if mode == "default" else mode).attrs
        except NotFound:  # host, none, or another container's
            return None
        if network["Driver"] != "bridge" or not self.is_local:
            return None
        options = network.get("Options") or {}
        return str(options.get("com.docker.network.bridge.name") or f"br-{network['Id'][:12]}")

    def containers_of(self, container_name: str) -> list[Container]:
        """Containers that we made for this name, running or not, newest first."""
        return self._labelled(contract.LABEL_CONTAINER, container_name)

    def containers_of_deployment(self, deployment_id: str) -> list[Container]:
        """Containers that this deployment made, also one that its ledger never heard of."""
        return self._labelled(contract.LABEL_DEPLOYMENT, deployment_id)

    def made_containers(self, container_name: str | None = None) -> list[MadeContainer]:
        """Containers that deployments made, of one container name or of all, newest first.

        By both labels: an image passes the name on to whatever else is started from it.
        """
        wanted = f"={container_name}" if container_name is not None else ""
        labels = [f"{contract.LABEL_CONTAINER}{wanted}", contract.LABEL_DEPLOYMENT]
        found = self._client.containers.list(all=True, filters={"label": labels}, ignore_removed=True)
        return sorted(map(_made, found), key=lambda made: made.created_at, reverse=True)

    def _labelled(self, label: str, value: str) -> list[Container]:
        return self._client.containers.list(
            all=True, filters={"label": f"{label}={value}"}, ignore_removed=True
        )

    def create_container(
        self,
        image_id: str,
        name: str,
        config: DeploymentConfig,
        labels: Mapping[str, str],
        environment: Mapping[str, str],
    ) -> str:
        """Create, not start, the container; the engine checks the configuration. Returns its id."""
        container = self._client.containers.create(
            image_id,
            command=config.command,
            name=name,
            environment=dict(environment),
            labels={**config.labels, **labels},
            ports=cast("Any", _published(config.port_mappings)),
            mounts=[
                Mount(
                    target=mount.container_path,
                    source=mount.host_path,
                    type="bind" if mount.host_path.startswith("/") else "volume",
                    read_only=mount.read_only,
                )
                for mount in config.volumes
            ],
            network_mode=config.network_mode,
            restart_policy=cast("Any", _restart_policy(config.restart_policy)),
        )
        return str(container.id)

    def start(self, container_id: str) -> None:
        """Start a container; a running one stays as it is."""
        self._client.api.start(container_id)

    def stop(self, container_id: str, grace_seconds: int) -> None:
        """Stop by the container's stop signal, then kill; a stopped one stays as it is."""
        self._client.api.stop(container_id, timeout=grace_seconds)

    def rename(self, container_id: str, name: str) -> None:
        """Rename a container unless it has the name."""
        container = self._client.containers.get(container_id)
        if container.name != name:
            container.rename(name)

    def set_restart_policy(self, container_id: str, policy: Mapping[str, Any]) -> None:
        """Change the restart policy (`{"Name": ..., "MaximumRetryCount": ...}`).

        Asked again for a second: the engine fails when a crashing container dies during the update.
        """
        for tries_left in reversed(range(_POLICY_TRIES)):
            try:
                self._client.api.update_container(container_id, restart_policy=cast("Any", dict(policy)))
            except APIError as exc:
                if not exc.is_server_error() or not tries_left:
                    raise
                time.sleep(_POLICY_PAUSE_SECONDS)
            else:
                return

    def remove(self, container_id: str) -> None:
        """Remove a container, running or not; one that is gone is fine."""
        with contextlib.suppress(NotFound):
            self._client.api.remove_container(container_id, force=True)

    def log_tail(self, container_id: str, lines: int = 50) -> str:
        """Last lines that the container wrote to stdout and stderr; empty where its log cannot be read."""
        try:
            raw = self._client.api.logs(container_id, tail=lines, timestamps=False)
        except APIError as exc:
            if exc.status_code in {404, 501}:  # gone, or a log driver that cannot be read
                return ""
            raise
        return bytes(raw).decode("utf-8", "replace")[-16_000:]

    def published_ports(self) -> list[PublishedPort]:
        """Host ports of all running containers."""
        return [
            PublishedPort(
                port=bound["PublicPort"],
                protocol=bound["Type"],
                name=listed["Names"][0].lstrip("/"),
                container_name=(listed.get("Labels") or {}).get(contract.LABEL_CONTAINER),
            )
            for listed in self._client.api.containers()
            for bound in listed.get("Ports") or ()
            if "PublicPort" in bound
        ]

    def loopback_ports(self, container_id: str) -> dict[int, int]:
        """Host port of each TCP port that a container is to publish on loopback, running or not."""
        attributes = self._client.containers.get(container_id).attrs
        bindings = attributes["HostConfig"].get("PortBindings") or {}
        return {
            int(port.partition("/")[0]): int(binding["HostPort"])
            for port, bound in bindings.items()
            for binding in bound or ()
            if binding.get("HostIp") == LOOPBACK and binding.get("HostPort")
        }

    def promised_ports(self) -> set[int]:
        """Host ports of all containers, running or not."""
        found = self._client.containers.list(all=True, ignore_removed=True)
        return {port for container in found for port, _ in _bound_ports(container)}

    def check_ports_free(
        self,
        config: DeploymentConfig,
        current: Container | None,
        proxied: AbstractSet[tuple[int, str]] = frozenset(),
    ) -> None:
        """Raise `PortTaken` when a wanted host port is held by anything but the current container.

        Those that are `proxied` for it already count as its own.
        """
        ours = _host_ports(current) | proxied
        for mapping in config.port_mappings:
            if (mapping.host_port, mapping.protocol) not in ours and self.is_local:
                _check_port_free(mapping)


def _made(container: Container) -> MadeContainer:
    state = container.attrs["State"]
    return MadeContainer(
        container_id=str(container.id),
        container_name=container.labels[contract.LABEL_CONTAINER],
        name=str(container.name),
        deployment_id=container.labels[contract.LABEL_DEPLOYMENT],
        image_tag=container.labels.get(contract.LABEL_IMAGE_TAG, ""),
        image_id=container.attrs["Image"],
        created_at=datetime.fromisoformat(container.attrs["Created"]),
        running=bool(state["Running"]) and not (state["Restarting"] or state["Paused"]),
    )


def _shared_layers(one: Sequence[str], other: Sequence[str]) -> int:
    """How many layers both begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


def _published(mappings: list[PortMapping]) -> dict[str, list[tuple[str, int] | int]]:
    ports: dict[str, list[tuple[str, int] | int]] = {}
    for mapping in mappings:
        bound = (mapping.host_ip, mapping.host_port) if mapping.host_ip else mapping.host_port
        ports.setdefault(f"{mapping.container_port}/{mapping.protocol}", []).append(bound)
    return ports


def _restart_policy(policy: str) -> dict[str, Any]:
    name, _, limit = policy.partition(":")
    return {"Name": name, "MaximumRetryCount": int(limit or 0)}


def _host_ports(container: Container | None) -> set[tuple[int, str]]:
    if container is None or not container.attrs["State"]["Running"]:  # a stopped one holds no port
        return set()
    return _bound_ports(container)


def _bound_ports(container: Container) -> set[tuple[int, str]]:
    bindings = container.attrs["HostConfig"].get("PortBindings") or {}
    return {
        (int(binding["HostPort"]), port.partition("/")[2])
        for port, bound in bindings.items()
        for binding in bound or ()
        if binding.get("HostPort")
    }


def _check_port_free(mapping: PortMapping) -> None:
    if error := bind_error(mapping.host_port, mapping.protocol, mapping.host_ip):
        raise PortTaken(
            f"host port {mapping.host_port}/{mapping.protocol} is taken on this host ({error.strerror}); "
            "stop what holds it (ss -lnp) or choose another host_port"
        ) from error
