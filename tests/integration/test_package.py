"""Stage 1 with a real Docker Engine: build, metadata, export, gates, and what the cache is worth."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, cast

import docker
import pytest
from blake3 import blake3
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from deployments.demo_image import static_busybox
from deployments.lab import Lab, missing_requirement
from receiver.archive import ArchivedImage, checked_package
from receiver.contract import LABEL_CONTAINER, PackageFormat, QualityGate, Stage
from receiver.engine import Engine, PackageRefused
from tasks import builder, early_export, exports, package, shared_package, store
from tasks.docker_archive import docker_archive
from tasks.errors import BuildFailed, StageTimeout
from tasks.exports import ExportFailed
from tasks.package import ImageMetadata, ImageRefused
from tasks.parameters import BuildOptions, DeploymentParameters
from tasks.shared_package import Package, PackageKey
from tasks.stage import StageRun
from tests.services import require_service

BASE = "base:1"
BUILDERS = ["engine", *(["buildkit"] if builder.has_buildkit() else [])]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One Docker Engine in a network namespace of its own."""
    missing = missing_requirement()
    require_service(
        missing is None, f"a lab needs root and Docker: {missing}", "deployments/install_services.sh"
    )
    with Lab(hosts=(), prefect=False, receiver=False) as lab:
        yield lab


@pytest.fixture(scope="module")
def engine(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> docker.DockerClient:
    """The engine, with a base image of one static busybox."""
    busybox = static_busybox()
    require_service(busybox is not None, "no static busybox here", "apt-get install busybox-static")
    folder = tmp_path_factory.mktemp("base")
    shutil.copy(busybox or "", folder / "busybox")
    (folder / "Dockerfile").write_text(
        'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\n'
    )
    client = lab.control.docker()
    client.images.build(path=str(folder), tag=BASE, rm=True)
    return client


@pytest.fixture(params=BUILDERS)
def built_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each builder that this machine has."""
    monkeypatch.setattr(builder, "has_buildkit", lambda: request.param == "buildkit")
    return str(request.param)


@pytest.fixture
def control(lab: Lab, engine: docker.DockerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as the control host: the lab's engine, and a home of the test's own."""
    monkeypatch.setenv("DOCKER_HOST", lab.environment["DOCKER_HOST"])
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def context(control: Path, tmp_path: Path) -> Path:
    """A context whose image tells what it was built from."""
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text(
        f"FROM {BASE}\nARG VERSION=none\nLABEL version=$VERSION\nCOPY . /app\n"
        "RUN echo building $VERSION && ls /app > /listing\n"
    )
    (folder / ".dockerignore").write_text("*\n!app.txt\n")
    (folder / "app.txt").write_text(tmp_path.name)
    (folder / "secret.txt").write_text("secret")
    return folder


def options(context: Path, **changes: Any) -> BuildOptions:
    """Build options of the context."""
    return BuildOptions.model_validate({"build_context": str(context), **changes})


def build(context: Path, name: str = "web", **changes: Any) -> tuple[str, list[str]]:
    """Build `<name>:v1`; the image's id and what the builder said."""
    said: list[str] = []
    image_id = builder.build_image(options(context, **changes), name, f"{name}:v1", said.append, 60)
    return image_id, said


def inspected(context: Path, **changes: Any) -> ImageMetadata:
    """Build `web:v1` and look at it."""
    return package._inspect(build(context, **changes)[0], "web:v1")


def export(context: Path) -> tuple[ImageMetadata, Package]:
    """Build `web:v1` and make its package."""
    metadata = inspected(context)
    return metadata, asyncio.run(packaged(metadata.image_id))


async def packaged(
    image_id: str, reference: str = "web:v1", omitted: Sequence[str] = (), **changes: Any
) -> Package:
    """The whole package of an image, made when it is not there."""
    key = PackageKey(image_id, reference, tuple(omitted), **changes)
    with shared_package.opened(
        key, lambda: exports.open_export(image_id, reference, frozenset(omitted))
    ) as shared:
        return await shared.finished()


def wait_for_exports() -> None:
    """A package can be read a moment before its export has dropped old ones."""
    for thread in threading.enumerate():
        if thread.name == "export":
            thread.join(timeout=20)


def files_of(engine: docker.DockerClient, image_id: str, folder: Path) -> set[str]:
    """Names of the files in an image."""
    container = engine.containers.create(image_id, command=["true"])
    try:
        with (folder / "root.tar").open("wb") as stream:
            stream.writelines(cast("Iterable[bytes]", container.export()))
    finally:
        container.remove()
    with tarfile.open(folder / "root.tar") as archive:
        return set(archive.getnames())


def random_layer(folder: Path, name: str, size_bytes: int) -> tuple[str, Path]:
    """A layer of one file that does not compress: its diff id, and where it lies."""
    (folder / name).write_bytes(os.urandom(size_bytes))
    with tarfile.open(folder / f"{name}.tar", "w") as archive:
        archive.add(folder / name, name)
    digest = hashlib.sha256((folder / f"{name}.tar").read_bytes()).hexdigest()
    return f"sha256:{digest}", folder / f"{name}.tar"


def load_image(
    engine: docker.DockerClient, reference: str, files: dict[str, Path], layers: Sequence[str]
) -> str:
    """Load an image of these layers (diff ids, lowest first), whose files are given; returns its id."""
    steps = [{"created_by": layer} for layer in layers]
    config = {"architecture": "amd64", "os": "linux", "config": {}, "history": steps}
    config["created"] = "2026-01-01T00:00:00Z"
    config["rootfs"] = {"type": "layers", "diff_ids": [*layers]}
    engine.images.load(b"".join(docker_archive(reference, json.dumps(config).encode(), layers, files)))
    return str(engine.images.get(reference).id)


# -- build -----------------------------------------------------------------------------------------


def test_a_build_gives_an_image_with_its_arguments_and_labels(
    context: Path, engine: docker.DockerClient, tmp_path: Path, built_by: str
) -> None:
    """The builder's lines are said, ignored files stay at home, and our label is on the image."""
    image_id, said = build(context, build_args={"VERSION": "7"}, labels={"team": "a"}, no_cache=True)
    image = engine.images.get("web:v1")
    assert image.id == image_id
    assert image.labels == {"version": "7", "team": "a", LABEL_CONTAINER: "web"}
    assert any("building 7" in line for line in said)
    assert len(said) > 4
    assert not any(line.endswith("\n") for line in said)
    names = files_of(engine, image_id, tmp_path)
    assert {"app/app.txt", "listing"} <= names
    assert "app/secret.txt" not in names


def test_a_failing_step_is_told_in_the_builders_own_words(context: Path, built_by: str) -> None:
    """With the code it ended with and the last lines before it."""
    (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN echo about to fail && exit 7\n")
    with pytest.raises(BuildFailed) as failed:
        build(context, no_cache=True)
    assert "about to fail" in str(failed.value)
    assert "code: 7" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_dockerfile_that_cannot_be_read_is_told(context: Path, built_by: str) -> None:
    """Before any step is run."""
    (context / "Dockerfile").write_text("FORM scratch\n")
    with pytest.raises(BuildFailed, match=r"(?i)unknown instruction: FORM"):
        build(context)


def test_a_build_past_its_limit_is_ended(context: Path, built_by: str) -> None:
    """A silent step does not keep the thread that waits for it."""
    (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN sleep 100\n")
    before = threading.active_count()
    began = datetime.now(UTC)
    with pytest.raises(BuildFailed):
        builder.build_image(options(context), "web", "web:v1", lambda _: None, 1.5)
    assert (datetime.now(UTC) - began).total_seconds() < 20
    assert threading.active_count() <= before + 1


def test_an_engine_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its address and the command that starts it."""
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(BuildFailed, match=r"unix:///nowhere/docker\.sock") as failed:
        builder.connect()
    assert "systemctl start docker" in failed.value.next_step


def test_the_fingerprint_knows_the_engine_and_its_base_image(
    context: Path, engine: docker.DockerClient
) -> None:
    """Another image under the base's name is another fingerprint; an unknown or odd base is none."""

    def fingerprint() -> str | None:
        parameters = {
            "container_name": "web",
            "remote_host": "host-a",
            "build_options": {"build_context": str(context)},
        }
        return package.build_fingerprint(DeploymentParameters.model_validate(parameters))

    (context / "Dockerfile").write_text("FROM own-base:1\n")
    assert fingerprint() is None
    engine.images.get(BASE).tag("own-base", "1")
    first = fingerprint()
    assert first is not None
    assert fingerprint() == first
    other, _ = build(context, name="other")
    engine.images.get(other).tag("own-base", "1")
    assert fingerprint() not in (first, None)
    for odd in ("FROM $BASE\n", "FROM Bad_Name:?\n"):
        (context / "Dockerfile").write_text(odd)
        assert fingerprint() is None


# -- export ----------------------------------------------------------------------------------------


def test_a_package_is_what_was_written(context: Path, engine: docker.DockerClient) -> None:
    """BLAKE3 and size of the file, the config digest that is the image's id on this store, and all layers."""
    metadata, exported = export(context)
    content = exported.path.read_bytes()
    assert exported.size_bytes == len(content) < exported.unpacked_bytes
    assert exported.blake3 == blake3(content).hexdigest()
    assert shared_package.find_intact(exported.key) == exported
    assert (
        metadata.config_digest == metadata.image_id == exports.read_config_digest(metadata.image_id, "web:v1")
    )
    assert metadata.layers_count == len(metadata.layers) == 4
    assert metadata.architecture == engine.info()["Architecture"].replace("x86_64", "amd64").replace(
        "aarch64", "arm64"
    )
    assert "Env" not in metadata.config
    announced = package.announce_image(metadata)
    assert (announced.config_digest, announced.layers) == (metadata.image_id, metadata.layers)


@pytest.mark.parametrize("package_format", PackageFormat)
def test_a_package_of_any_format_can_be_loaded_again(
    context: Path, control: Path, lab: Lab, engine: docker.DockerClient, package_format: PackageFormat
) -> None:
    """The same image comes back under its name, unpacked while it is loaded."""
    image_id, _ = build(context)
    metadata = package._inspect(image_id, "web:v1")
    made = asyncio.run(packaged(image_id, format=package_format))
    engine.images.remove("web:v1", force=True)
    host = Engine(lab.environment["DOCKER_HOST"])
    loaded = host.load_image(made.path, package.announce_image(metadata), made.announcement())
    host.close()
    assert (loaded.image_id, loaded.config_digest) == (image_id, image_id)
    assert engine.images.get("web:v1").id == image_id


def test_layers_that_the_engine_has_are_left_out_and_the_image_is_the_same(
    context: Path, control: Path, lab: Lab, engine: docker.DockerClient
) -> None:
    """Known is what is shared from the first layer on; without what was left out nothing is loaded."""
    image_id, _ = build(context)
    metadata = package._inspect(image_id, "web:v1")
    announced = package.announce_image(metadata)
    host = Engine(lab.environment["DOCKER_HOST"])
    assert host.known_layers(announced) == metadata.layers
    made = [asyncio.run(packaged(image_id, omitted=metadata.layers[:number])) for number in (2, 4)]
    whole = asyncio.run(packaged(image_id))
    assert made[1].unpacked_bytes < made[0].unpacked_bytes < whole.unpacked_bytes
    engine.images.remove("web:v1", force=True)
    engine.images.prune()
    known = host.known_layers(announced)
    assert known == metadata.layers[:2]  # of the base image
    shuffled = announced.model_copy(update={"layers": announced.layers[::-1]})
    assert host.known_layers(shuffled) == []
    with pytest.raises(PackageRefused, match=f"it lacks .*{metadata.layers[3]}"):
        host.load_image(made[1].path, announced, made[0].announcement())
    assert host.find_image(announced) is None
    assert host.load_image(made[0].path, announced, made[0].announcement()).image_id == image_id
    host.close()


def test_the_lowest_layers_come_first_and_the_image_is_the_same(
    control: Path, lab: Lab, engine: docker.DockerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported early, each once, also when two layers are the same; the engine keeps nothing of it."""
    monkeypatch.setattr(early_export, "MIN_IMAGE_BYTES", 1)
    sizes = {"first": 300_000, "second": 3_000_000, "third": 3_000_000, "fourth": 3_000_000}
    layers = [random_layer(tmp_path, name, size_bytes) for name, size_bytes in sizes.items()]
    layers.insert(3, layers[1])  # it is among the lowest layers and above them
    image_id = load_image(engine, "web:v1", dict(layers), [diff_id for diff_id, _ in layers])
    metadata = package._inspect(image_id, "web:v1")
    made = asyncio.run(packaged(image_id, format=PackageFormat.TAR))
    with tarfile.open(made.path) as archive:
        digests = [
            hashlib.sha256(cast("IO[bytes]", archive.extractfile(member)).read()).hexdigest()
            for member in archive
            if member.isreg() and member.name.endswith("/layer.tar")
        ]
    assert f"sha256:{digests[0]}" == metadata.layers[0]
    assert len(digests) == len(set(digests)) == 4
    assert engine.images.list(all=True, filters={"label": early_export.LABEL}) == []
    engine.images.remove("web:v1", force=True)
    engine.images.prune()
    host = Engine(lab.environment["DOCKER_HOST"])
    assert (
        host.load_image(made.path, package.announce_image(metadata), made.announcement()).image_id == image_id
    )
    host.close()


def test_what_a_killed_early_export_left_is_removed_by_a_later_one(
    context: Path, control: Path, engine: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is so old that no export can use it any more."""
    monkeypatch.setattr(early_export, "MIN_IMAGE_BYTES", 1)
    monkeypatch.setattr(early_export, "_MOST_SHARE", 1)
    image_id, _ = build(context)
    with monkeypatch.context() as killed:
        killed.setattr(early_export, "_remove", lambda _client, _image_id: None)
        asyncio.run(packaged(image_id))
    (left,) = engine.images.list(all=True, filters={"label": early_export.LABEL})
    asyncio.run(packaged(image_id, format=PackageFormat.GZIP))
    assert engine.images.list(all=True, filters={"label": early_export.LABEL}) == [left]
    monkeypatch.setattr(early_export, "_FORGOTTEN", timedelta(0))
    asyncio.run(packaged(image_id, format=PackageFormat.TAR))
    assert engine.images.list(all=True, filters={"label": early_export.LABEL}) == []


def test_only_the_newest_packages_are_kept(context: Path, control: Path) -> None:
    """Five, by their last use; one that is being read stays, and so does a package under way."""
    folder = control / "packages"
    folder.mkdir(parents=True)
    old = [folder / f"{number}.package" for number in range(store.KEPT_PACKAGES + 2)]
    for number, path in enumerate(old):
        path.write_text("x")
        os.utime(path, (number, number))
    store.touch_package(old[0])
    (folder / "abandoned.part").touch()
    os.utime(folder / "abandoned.part", (1, 1))
    (folder / "under-way.part").touch()
    with store.package_in_use(old[1]):
        _, exported = export(context)
        wait_for_exports()
    assert {path.name for path in folder.iterdir()} == {
        exported.path.name,
        *(path.name for path in (old[0], old[1], *old[-3:])),
        "under-way.part",
    }


def test_an_export_that_finds_no_room_leaves_nothing(context: Path, control: Path) -> None:
    """A full disk is a named failure that says where."""
    image_id, _ = build(context)
    folder = control / "packages"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", folder], check=True)
    try:
        with pytest.raises(
            ExportFailed, match=f"could not be exported to {control}.*No space left"
        ) as failed:
            asyncio.run(packaged(image_id))
        assert getattr(failed.value.__cause__, "errno", None) == errno.ENOSPC
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_export_into_a_folder_that_cannot_be_written_is_named(context: Path, control: Path) -> None:
    """A file stands where the folder should be."""
    image_id, _ = build(context)
    control.mkdir(exist_ok=True)
    (control / "packages").write_text("")
    with pytest.raises(ExportFailed, match="could not be exported"):
        asyncio.run(packaged(image_id))


def test_an_export_of_an_image_that_is_gone_is_named_and_leaves_nothing(context: Path, control: Path) -> None:
    """As when somebody prunes images in between."""
    with pytest.raises(ExportFailed, match="not in the engine any more"):
        asyncio.run(packaged("sha256:" + "0" * 64, "gone:v1"))
    assert list((control / "packages").iterdir()) == []


def test_an_image_whose_name_was_given_away_is_exported_all_the_same(
    context: Path, control: Path, engine: docker.DockerClient
) -> None:
    """By its id: the host runs what was built, and names it itself."""
    image_id, _ = build(context)
    engine.images.get(image_id).tag("web", "kept")
    engine.images.get(BASE).tag("web", "v1")
    made = asyncio.run(packaged(image_id))
    found: list[ArchivedImage] = []
    for _ in checked_package(made.path, None, made.announcement(), found.append):
        pass
    assert [image.config_digest for image in found] == [image_id]


# -- gates -----------------------------------------------------------------------------------------


def gates_of(
    metadata: ImageMetadata, build: BuildOptions, architecture: str | None = None
) -> list[QualityGate]:
    """The gates that did not pass."""
    return [gate for gate in package.image_gates(metadata, build, architecture) if not gate.passed]


def test_a_good_image_passes_every_gate(context: Path) -> None:
    """Also while the host's architecture is unknown."""
    metadata = inspected(context, build_args={"VERSION": "1"})
    asked = options(context, required_labels=["version", LABEL_CONTAINER])
    for architecture in (None, metadata.architecture):
        gates = package.image_gates(metadata, asked, architecture)
        assert all(gate.passed for gate in gates)
        assert [gate.name for gate in gates] == [
            *("image_built_successfully", "image_size_within_limits", "required_metadata_collected"),
            "architecture_equals_host",
        ]


def test_each_gate_fails_alone_and_says_the_fix(context: Path) -> None:
    """Size, label, architecture."""
    metadata = inspected(context)
    size = metadata.image_size_bytes
    cases = [
        (options(context, max_image_size_bytes=size), None, "image_size_within_limits", f"{size}"),
        (options(context, required_labels=["a", "b"]), None, "required_metadata_collected", "a, b"),
        (options(context), "s390x", "architecture_equals_host", "platform to linux/s390x"),
    ]
    for asked, architecture, name, said in cases:
        failed = gates_of(metadata, asked, architecture)
        assert [gate.name for gate in failed] == [name]
        assert said in failed[0].message
    assert gates_of(metadata, options(context, max_image_size_bytes=size + 1)) == []


# -- with Prefect ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    """A Prefect server and database of this module's own."""
    with prefect_test_harness():
        yield


@flow
async def stage_1(build_options: dict[str, Any]) -> tuple[str, Package, dict[str, str]]:
    """Build and package; the image's id, the package, and what the operations said of themselves."""
    asked = DeploymentParameters.model_validate(
        {"container_name": "cached", "remote_host": "host-a", "build_options": build_options}
    )
    stage = StageRun(Stage.PACKAGE, datetime.now(UTC))
    image_id = await package.build_or_reuse(stage, asked)
    metadata = await stage.run(package.gather_metadata, image_id, "cached:latest")
    exported = await packaged(metadata.image_id, "cached:latest")
    return image_id, exported, {done.name: done.message for done in stage.operations}


async def test_what_is_unchanged_is_neither_built_nor_exported_again(
    prefect_server: None, context: Path, engine: docker.DockerClient
) -> None:
    """Unless it is gone: the cache is believed only while image and package are there."""
    asked = {"build_context": str(context), "build_args": {"VERSION": context.parent.name}}
    image_id, exported, said = await stage_1(asked)
    assert said["build_docker_image"] == ""
    written = exported.path.stat()

    again_id, again, said = await stage_1(asked)
    assert (again_id, again) == (image_id, exported)
    assert said["build_docker_image"] == "cached"
    assert os.path.samestat(again.path.stat(), written)

    engine.images.remove("cached:latest", force=True)
    engine.images.prune()
    rebuilt_id, _, said = await stage_1(asked)
    assert said["build_docker_image"] == ""
    assert engine.images.get("cached:latest").id == rebuilt_id

    exported = (await stage_1(asked))[1]
    exported.path.write_bytes(bytes(exported.size_bytes))
    same_id, again, said = await stage_1(asked)
    assert (same_id, said["build_docker_image"]) == (rebuilt_id, "cached")
    assert shared_package.find_intact(again.key) == again == exported

    engine.images.get(BASE).tag("cached", "latest")  # somebody gave the name away
    assert (await stage_1(asked))[0] == rebuilt_id
    assert engine.images.get("cached:latest").id == rebuilt_id

    (context / "app.txt").write_text("changed")
    changed_id, _, said = await stage_1(asked)
    assert changed_id != rebuilt_id
    assert said["build_docker_image"] == ""


@flow
async def checked(metadata: ImageMetadata, build: BuildOptions) -> StageRun:
    """`validate_image` as the stage runs it."""
    stage = StageRun(Stage.PACKAGE, datetime.now(UTC))
    with pytest.raises(ImageRefused, match="missing labels: team"):
        await package.check_image(stage, metadata, build, None)
    return stage


async def test_an_image_that_is_refused_leaves_all_its_gates_in_the_stage(
    prefect_server: None, context: Path
) -> None:
    """The report shows what passed and what did not; the operation failed, once."""
    stage = await checked(inspected(context), options(context, required_labels=["team"]))
    assert [gate.name for gate in stage.gates if not gate.passed] == ["required_metadata_collected"]
    assert len(stage.gates) == 4
    assert [(done.name, done.success) for done in stage.operations] == [("validate_image", False)]


@flow
async def timed(build_options: dict[str, Any]) -> StageRun:
    """A build within its time."""
    asked = DeploymentParameters.model_validate(
        {"container_name": "slow", "remote_host": "host-a", "build_options": build_options}
    )
    stage = StageRun(Stage.PACKAGE, datetime.now(UTC))
    build = package.build_docker_image.with_options(timeout_seconds=1, retries=0)
    with pytest.raises(StageTimeout, match=r"build_docker_image: .*timeout of 1"):
        await stage.run(build, asked.build_options, "slow", "v1", None)
    return stage


async def test_a_build_that_takes_too_long_is_named(prefect_server: None, context: Path) -> None:
    """TIMEOUT says which operation was slow; its thread ends with the build's own limit."""
    (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN sleep 3\n")
    stage = await timed({"build_context": str(context), "timeout_ms": 1000})
    assert [(done.name, done.success) for done in stage.operations] == [("build_docker_image", False)]


# -- one packager at a time --------------------------------------------------------------------------


async def test_two_deployments_of_one_image_package_it_one_after_the_other(control: Path) -> None:
    """The second waits, says so once, and then finds the first one's image."""
    order: list[str] = []
    first_is_in, second_waits = asyncio.Event(), asyncio.Event()

    def say(line: str) -> None:
        order.append(line)
        second_waits.set()

    async def first() -> None:
        async with store.alone("web:v1", say):
            first_is_in.set()
            await second_waits.wait()
            order.append("first is done")

    async def second() -> None:
        await first_is_in.wait()
        async with store.alone("web:v1", say):
            order.append("second is in")

    async with asyncio.timeout(20):
        await asyncio.gather(first(), second())
    waiting = "another deployment is at work on web:v1: waiting for it"
    assert order == [waiting, "first is done", "second is in"]
