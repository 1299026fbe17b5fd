"""Images between engines with the containerd image store and classic ones: what was built is what runs."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import docker
import pytest
from docker.models.containers import Container
from docker.models.images import Image

from deployments import lab_http
from deployments.demo_image import static_busybox
from deployments.lab import Lab, Node, missing_requirement
from receiver import contract
from receiver.app import create_app
from receiver.contract import (
    DeployAccepted,
    DeploymentConfig,
    DeployRequest,
    HealthCheckConfig,
    HostState,
    PackageFormat,
    RollbackRequest,
)
from receiver.engine import PortTaken
from receiver.operations import Host, Operations
from receiver.settings import from_environment
from tasks import builder, exports, package
from tasks.exports import Export
from tasks.package import ImageMetadata
from tasks.parameters import BuildOptions
from tests.contract.caller import KEY, Caller, announcement
from tests.integration.host_rig import SERVE, open_host, take_up_to
from tests.services import containerd_store, require_service

Result = TypeVar("Result")
BASE = "base:1"
WAYS = {
    "classic-to-containerd": ("control", "new"),
    "containerd-to-classic": ("new", "control"),
    "containerd-to-containerd": ("new", "other"),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The machine's engine, and two newer ones with the containerd image store; each has a base image."""
    missing, busybox = missing_requirement(), static_busybox()
    require_service(
        missing is None, f"a lab needs root and Docker: {missing}", "deployments/install_services.sh"
    )
    require_service(busybox is not None, "no static busybox here", "apt-get install busybox-static")
    folder = tmp_path_factory.mktemp("base")
    shutil.copy(busybox or "", folder / "busybox")
    (folder / "Dockerfile").write_text(
        'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\n'
        "STOPSIGNAL SIGKILL\n"
    )
    engines = dict.fromkeys(("new", "other"), containerd_store())
    with Lab(hosts=("new", "other"), prefect=False, receiver=False, engines=engines) as lab:
        for node in (lab.control, lab.hosts["new"]):
            node.docker().images.build(path=str(folder), tag=BASE, rm=True)
        yield lab


@dataclass
class Pair:
    """An engine that builds, and a host that gets the image; all of one container."""

    sender: Node
    node: Node
    host: Host
    caller: Caller
    context: Path
    name: str

    def build(self, tag: str, says: str | None = None) -> ImageMetadata:
        """`name:tag`, with the digest by which every engine knows it."""
        line = f"{self.name} {says or tag}"
        (self.context / "Dockerfile").write_text(f"FROM {BASE}\nENV SAYS='{line}'\nRUN echo $SAYS > /said\n")
        options, reference = BuildOptions(build_context=str(self.context)), f"{self.name}:{tag}"
        image_id = builder.build_image(options, self.name, reference, lambda _: None)
        metadata = package._inspect(image_id, reference)
        digest = exports.read_config_digest(image_id, reference)
        assert metadata.config_digest in (None, digest)
        return metadata.model_copy(update={"config_digest": digest})

    async def announce(self, image: ImageMetadata) -> DeployAccepted:
        """Ask the receiver to take it."""
        request = DeployRequest(
            container_name=self.name,
            image_tag=image.reference.rpartition(":")[2],
            image=package.announce_image(image),
            deployment_config=DeploymentConfig(command=SERVE, stop_timeout_seconds=1),
            health_check_config=HealthCheckConfig(health_endpoint=None, quiet_period_ms=100),
        )
        response = await self.caller.announce(request)
        assert response.status_code == 201, response.text
        return DeployAccepted.model_validate_json(response.content)

    async def send(self, accepted: DeployAccepted, image: ImageMetadata) -> int:
        """Send what the host lacks; the bytes of that."""
        _, archive = on(self.sender, lambda: exported(image, frozenset(accepted.known_layers)))
        await self.upload(accepted, archive)
        return len(archive)

    async def upload(self, accepted: DeployAccepted, archive: bytes) -> None:
        """Announce and send an archive without the layers that the host has."""
        told = {"format": PackageFormat.TAR, "omitted_layers": accepted.known_layers}
        package = announcement(archive).model_copy(update=told)
        path = contract.deploy_path(accepted.deployment_id, "package")
        response = await self.caller.call("POST", path, package.model_dump_json().encode())
        assert response.status_code == 200, response.text
        response = await self.caller.patch(accepted.deployment_id, 0, archive)
        assert response.status_code in (200, 204), response.text

    async def deploy(self, image: ImageMetadata) -> tuple[Operations, int]:
        """A deployment to its good end, and the bytes that were sent."""
        accepted, sent_bytes = await self.announce(image), 0
        if not accepted.image_present:
            sent_bytes = await self.send(accepted, image)
        operations = self.host.operations(accepted.deployment_id)
        await take_up_to(operations, "retire")
        return operations, sent_bytes

    async def roll_back(self) -> Operations:
        """Back to the previous version, to its good end."""
        path = contract.container_path(self.name, "rollback")
        response = await self.caller.call("POST", path, RollbackRequest().model_dump_json().encode())
        assert response.status_code == 201, response.text
        operations = self.host.operations(response.json()["deployment_id"])
        await take_up_to(operations, "retire")
        return operations

    def container(self) -> Container:
        """The one that has the name."""
        return self.node.docker().containers.get(self.name)

    def images(self) -> list[Image]:
        """The host's images of this container, with a name or without."""
        label = f"{contract.LABEL_CONTAINER}={self.name}"
        return self.node.docker().images.list(filters={"label": label})


@pytest.fixture(params=list(WAYS.values()), ids=list(WAYS))
def pair(
    lab: Lab, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pair]:
    """Each way, with a control host's home, and a receiver's state, of its own."""
    nodes: dict[str, Node] = {"control": lab.control, **lab.hosts}
    sender, node = (nodes[name] for name in request.param)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{sender.docker_socket}")
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(builder, "has_buildkit", lambda: False)
    host = open_host(tmp_path / "state", node.docker_socket)
    told = {"HMAC_SECRET_KEY": KEY.decode(), "HOOK_RECEIVER_STATE_DIR": str(tmp_path / "state")}
    app = create_app(from_environment(told), ledger=host.ledger, engine=host.engine)
    context = tmp_path / "context"
    context.mkdir()
    pair = Pair(sender, node, host, Caller(app), context, f"svc-{uuid4().hex[:8]}")
    yield pair
    for container in host.engine.containers_of(pair.name):
        container.remove(force=True)
    host.ledger.close()
    host.engine.close()


def on(node: Node, call: Callable[[], Result]) -> Result:
    """Call it where the node's loopback is, which its engine pushes to."""

    def inside() -> Result:
        lab_http.enter(node.namespace or "")
        return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(inside).result()


def exported(image: ImageMetadata, omitted: frozenset[str]) -> tuple[Export, bytes]:
    """How the image is exported, and the archive."""
    export = exports.open_export(image.image_id, image.reference, omitted)
    return export, b"".join(export.blocks)


def assert_is_built(pair: Pair, image: ImageMetadata, says: str | None = None) -> None:
    """The host has and runs the image of this config, with these layers, under this name."""
    client = pair.node.docker()
    assert config_digest(client, image.reference) == image.config_digest
    found = client.images.get(image.reference)
    assert found.attrs["RootFS"]["Layers"] == image.layers
    container = pair.container()
    assert container.attrs["Image"] == found.id
    assert container.status == "running"
    line = f"{pair.name} {says or image.reference.rpartition(':')[2]}\n"
    told = container.exec_run(["/bin/sh", "-c", "cat /said; echo $SAYS"]).output
    assert told == 2 * line.encode()


def config_digest(client: docker.DockerClient, reference: str) -> str:
    """Of the configuration that this engine saves."""
    content = b"".join(client.api.get_image(reference))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        (told,) = json.loads(read(archive, "manifest.json"))
        return f"sha256:{hashlib.sha256(read(archive, told['Config'])).hexdigest()}"


def read(archive: tarfile.TarFile, name: str) -> bytes:
    """A file's content."""
    member = archive.extractfile(name)
    assert member is not None
    return member.read()


async def test_two_versions_the_same_again_and_the_way_back(pair: Pair) -> None:
    """Each is on the host as it was built, under its own tag; what the host has is not sent again."""
    first, second = pair.build("v1"), pair.build("v2")
    _, first_bytes = await pair.deploy(first)
    assert_is_built(pair, first)
    operations, second_bytes = await pair.deploy(second)
    assert_is_built(pair, second)
    assert operations.entry.facts.image_config_digest == second.config_digest
    if not pair.host.engine.store().is_containerd:
        assert second_bytes < first_bytes / 10  # without the base image's layers

    again, again_bytes = await pair.deploy(second)
    assert again_bytes == 0
    assert pair.container().labels[contract.LABEL_DEPLOYMENT] == again.deployment_id
    assert again.entry.facts.image_id == operations.entry.facts.image_id

    back = await pair.roll_back()
    assert_is_built(pair, first)
    assert back.entry.facts.image_config_digest == first.config_digest
    tags = sorted(tag for image in pair.images() for tag in image.tags)
    assert tags == [first.reference, second.reference]


@pytest.mark.parametrize("pair", [way for way in WAYS.values() if way[1] != "control"], indirect=True)
async def test_under_the_same_tag_the_old_image_is_kept_for_the_way_back(pair: Pair) -> None:
    """A version that fails leaves it and takes its own away; after one that is well it is gone back to."""
    first = pair.build("latest", says="one")
    await pair.deploy(first)
    second = pair.build("latest", says="two")
    accepted = await pair.announce(second)
    await pair.send(accepted, second)
    await take_up_to(pair.host.operations(accepted.deployment_id), "start_container")
    restored = await pair.host.restore(accepted.deployment_id)
    assert (restored.state, restored.facts.previous_container_restored) == (HostState.RESTORED, True)
    assert_is_built(pair, first, says="one")
    assert len(pair.images()) == 1

    await pair.deploy(second)
    assert_is_built(pair, second, says="two")
    assert len(pair.images()) == 2
    await pair.roll_back()
    assert_is_built(pair, first, says="one")


@pytest.mark.parametrize("pair", [WAYS["classic-to-containerd"]], indirect=True)
async def test_an_image_whose_container_could_not_be_made_is_taken_away(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded by then, under an id that only the ledger tells."""

    def refuse(*_: object) -> None:
        raise PortTaken("taken")

    image = pair.build("v1")
    accepted = await pair.announce(image)
    await pair.send(accepted, image)
    monkeypatch.setattr(pair.host.engine, "check_ports_free", refuse)
    with pytest.raises(PortTaken):
        await pair.host.operations(accepted.deployment_id).deploy_container({})
    assert len(pair.images()) == 1
    await pair.host.restore(accepted.deployment_id)
    assert pair.images() == []


@pytest.mark.parametrize("pair", [WAYS["containerd-to-classic"]], indirect=True)
async def test_layers_that_a_classic_host_has_are_left_out_by_either_way_of_export(
    pair: Pair,
) -> None:
    """By the push where the engine reaches this process, else out of what it saves, though compressed."""
    first, second = pair.build("v1"), pair.build("v2")
    await pair.deploy(first)
    accepted = await pair.announce(second)
    assert accepted.known_layers == first.layers[:2]
    pushed, by_push = on(pair.sender, lambda: exported(second, frozenset(accepted.known_layers)))
    saved, by_save = exported(second, frozenset(accepted.known_layers))
    assert (pushed.way, saved.way) == ("layers", "archive")
    whole = len(exported(second, frozenset())[1])
    assert max(len(by_push), len(by_save)) < whole / 10
    await pair.upload(accepted, by_save)
    await take_up_to(pair.host.operations(accepted.deployment_id), "retire")
    assert_is_built(pair, second)
