"""Stage 1 with a real Docker Engine: build, metadata, export, gates, and what the cache is worth."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import docker
import pytest
from blake3 import blake3
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from deployments.demo_image import static_busybox
from deployments.lab import Lab, missing_requirement
from receiver.contract import LABEL_CONTAINER, QualityGate, Stage
from tasks import builder, package, store
from tasks.errors import BuildFailed, StageTimeout
from tasks.package import ImageMetadata, ImagePackage, ImageRefused
from tasks.parameters import BuildOptions, DeploymentParameters
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


def export(context: Path, **changes: Any) -> tuple[ImageMetadata, ImagePackage]:
    """Build and export `web:v1`."""
    image_id, _ = build(context, **changes)
    return package._inspect(image_id, "web:v1"), package._export(image_id, "web:v1")


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
    assert exported.size_bytes == len(content)
    assert exported.blake3 == blake3(content).hexdigest()
    assert exported.config_digest == metadata.image_id
    assert exported.is_intact()
    assert metadata.layers_count == len(metadata.layers) == 4
    assert metadata.architecture == engine.info()["Architecture"].replace("x86_64", "amd64").replace(
        "aarch64", "arm64"
    )
    assert "Env" not in metadata.config
    announced = package.announce_image(metadata, exported)
    assert (announced.config_digest, announced.layers) == (metadata.image_id, metadata.layers)


def test_a_package_can_be_loaded_again(context: Path, engine: docker.DockerClient) -> None:
    """The same image comes back under its name."""
    metadata, exported = export(context)
    engine.images.remove("web:v1", force=True)
    engine.images.load(exported.path.read_bytes())
    assert engine.images.get("web:v1").id == metadata.image_id


def test_only_the_newest_packages_are_kept(context: Path, control: Path) -> None:
    """Five, by their last use; one that is being read stays, and so does a package under way."""
    folder = control / "packages"
    folder.mkdir(parents=True)
    old = [folder / f"{number}.tar" for number in range(store.KEPT_PACKAGES + 2)]
    for number, path in enumerate(old):
        path.write_text("x")
        os.utime(path, (number, number))
    store.touch_package(old[0])
    (folder / "abandoned.part").touch()
    os.utime(folder / "abandoned.part", (1, 1))
    (folder / "under-way.part").touch()
    with store.package_in_use(old[1]):
        _, exported = export(context)
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
        with pytest.raises(BuildFailed, match=f"could not be exported to {control}.*No space left") as failed:
            package._export(image_id, "web:v1")
        assert getattr(failed.value.__cause__, "errno", None) == errno.ENOSPC
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_export_into_a_folder_that_cannot_be_written_is_named(context: Path, control: Path) -> None:
    """A file stands where the folder should be."""
    image_id, _ = build(context)
    control.mkdir(exist_ok=True)
    (control / "packages").write_text("")
    with pytest.raises(BuildFailed, match="could not be exported"):
        package._export(image_id, "web:v1")


def test_an_export_of_an_image_that_is_gone_is_named_and_leaves_nothing(context: Path, control: Path) -> None:
    """As when somebody prunes images in between."""
    with pytest.raises(BuildFailed, match="could not be exported"):
        package._export("sha256:" + "0" * 64, "gone:v1")
    assert list((control / "packages").iterdir()) == []


def test_a_name_that_was_given_to_another_image_is_not_exported(
    context: Path, engine: docker.DockerClient
) -> None:
    """Else the host would run what was not asked for."""
    image_id, _ = build(context)
    engine.images.get(BASE).tag("web", "v1")
    with pytest.raises(BuildFailed, match=r"names the image .* by now"):
        package._export(image_id, "web:v1")


# -- gates -----------------------------------------------------------------------------------------


def rewritten(exported: ImagePackage, keep: Callable[[tarfile.TarInfo], bool]) -> ImagePackage:
    """The package without the members that `keep` refuses."""
    path = exported.path.with_name("changed.tar")
    with tarfile.open(exported.path) as old, tarfile.open(path, "w") as new:
        for member in old:
            if keep(member):
                new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return exported.model_copy(update={"path": path})


def without_a_layer(exported: ImagePackage) -> ImagePackage:
    """The package, but one file that its manifest names."""
    with tarfile.open(exported.path) as archive:
        manifest: Any = archive.extractfile("manifest.json")
        layer = json.load(manifest)[0]["Layers"][0]
    return rewritten(exported, lambda member: member.name != layer)


def cut_off(exported: ImagePackage) -> ImagePackage:
    """The first half of the package."""
    path = exported.path.with_name("half.tar")
    path.write_bytes(exported.path.read_bytes()[: exported.size_bytes // 2])
    return exported.model_copy(update={"path": path})


def gates_of(
    metadata: ImageMetadata, exported: ImagePackage, build: BuildOptions, architecture: str | None = None
) -> list[QualityGate]:
    """The gates that did not pass."""
    return [gate for gate in package.image_gates(metadata, exported, build, architecture) if not gate.passed]


def test_a_good_image_passes_every_gate(context: Path) -> None:
    """Also while the host's architecture is unknown."""
    metadata, exported = export(context, build_args={"VERSION": "1"})
    asked = options(context, required_labels=["version", LABEL_CONTAINER])
    for architecture in (None, metadata.architecture):
        gates = package.image_gates(metadata, exported, asked, architecture)
        assert all(gate.passed for gate in gates)
        assert [gate.name for gate in gates] == [
            *("image_built_successfully", "image_size_within_limits", "required_metadata_collected"),
            *("architecture_equals_host", "package_complete"),
        ]


def test_each_gate_fails_alone_and_says_the_fix(context: Path) -> None:
    """Size, label, architecture, a missing layer, a torn archive, an archive that is gone."""
    metadata, exported = export(context)
    plain, size = options(context), metadata.image_size_bytes
    no_file = exported.model_copy(update={"path": exported.path.with_name("none.tar")})
    cases = [
        (exported, options(context, max_image_size_bytes=size), None, "image_size_within_limits", f"{size}"),
        (exported, options(context, required_labels=["a", "b"]), None, "required_metadata_collected", "a, b"),
        (exported, plain, "s390x", "architecture_equals_host", "platform to linux/s390x"),
        (without_a_layer(exported), plain, None, "package_complete", "lacks"),
        (cut_off(exported), plain, None, "package_complete", "damaged"),
        (no_file, plain, None, "package_complete", "damaged"),
    ]
    for changed, asked, architecture, name, said in cases:
        failed = gates_of(metadata, changed, asked, architecture)
        assert [gate.name for gate in failed] == [name]
        assert said in failed[0].message
    assert gates_of(metadata, exported, options(context, max_image_size_bytes=size + 1)) == []
    other = metadata.model_copy(update={"layers_count": metadata.layers_count + 1})
    assert "1 layer(s)" in gates_of(other, exported, plain)[0].message


# -- with Prefect ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    """A Prefect server and database of this module's own."""
    with prefect_test_harness():
        yield


@flow
async def stage_1(build_options: dict[str, Any]) -> tuple[str, ImagePackage, dict[str, str]]:
    """Build and export; the image's id, the package, and what the operations said of themselves."""
    asked = DeploymentParameters.model_validate(
        {"container_name": "cached", "remote_host": "host-a", "build_options": build_options}
    )
    stage = StageRun(Stage.PACKAGE, datetime.now(UTC))
    image_id = await package.build_or_reuse(stage, asked)
    metadata = await stage.run(package.gather_metadata, image_id, "cached:latest")
    exported = await package.export_or_reuse(stage, metadata)
    return image_id, exported, {done.name: done.message for done in stage.operations}


async def test_what_is_unchanged_is_neither_built_nor_exported_again(
    prefect_server: None, context: Path, engine: docker.DockerClient
) -> None:
    """Unless it is gone: the cache is believed only while image and package are there."""
    asked = {"build_context": str(context), "build_args": {"VERSION": context.parent.name}}
    image_id, exported, said = await stage_1(asked)
    assert said["build_docker_image"] == said["export_image"] == ""

    again_id, again, said = await stage_1(asked)
    assert (again_id, again) == (image_id, exported)
    assert said["build_docker_image"] == said["export_image"] == "cached"

    engine.images.remove("cached:latest", force=True)
    engine.images.prune()
    rebuilt_id, _, said = await stage_1(asked)
    assert said["build_docker_image"] == ""
    assert engine.images.get("cached:latest").id == rebuilt_id

    exported = (await stage_1(asked))[1]
    exported.path.unlink()
    same_id, again, said = await stage_1(asked)
    assert (same_id, said["build_docker_image"], said["export_image"]) == (rebuilt_id, "cached", "")
    assert again.is_intact()

    engine.images.get(BASE).tag("cached", "latest")  # somebody gave the name away
    assert (await stage_1(asked))[0] == rebuilt_id
    assert engine.images.get("cached:latest").id == rebuilt_id

    (context / "app.txt").write_text("changed")
    changed_id, _, said = await stage_1(asked)
    assert changed_id != rebuilt_id
    assert said["build_docker_image"] == said["export_image"] == ""


@flow
async def checked(metadata: ImageMetadata, exported: ImagePackage, build: BuildOptions) -> StageRun:
    """`validate_image` as the stage runs it."""
    stage = StageRun(Stage.PACKAGE, datetime.now(UTC))
    with pytest.raises(ImageRefused, match="missing labels: team"):
        await package.check_image(stage, metadata, exported, build, None)
    return stage


async def test_an_image_that_is_refused_leaves_all_its_gates_in_the_stage(
    prefect_server: None, context: Path
) -> None:
    """The report shows what passed and what did not; the operation failed, once."""
    stage = await checked(*export(context), options(context, required_labels=["team"]))
    assert [gate.name for gate in stage.gates if not gate.passed] == ["required_metadata_collected"]
    assert len(stage.gates) == 5
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
