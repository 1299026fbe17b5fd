"""Exports by the push of a real engine, loaded by the engine of another host."""

from __future__ import annotations

import asyncio
import io
import random
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

import docker
import pytest
from docker.errors import ImageLoadError, ImageNotFound
from docker.models.images import Image

from deployments import lab_http
from deployments.lab import Lab
from tasks import learning, push_plan
from tasks.docker_archive import layer_name
from tasks.layer_index import LayerIndex
from tasks.package import ImageMetadata
from tasks.push_export import PushUnsuitable, layer_index, push_export
from tasks.push_folder import note_name
from tests.e2e.deploying import wait_for

Result = TypeVar("Result")
_REQUEST = """
import asyncio, json, sys
from prefect import flow
from tasks import learning
from tasks.package import ImageMetadata

@flow
async def ask():
    await learning.request(ImageMetadata.model_validate(json.loads(sys.argv[1])))

asyncio.run(ask())
"""


@pytest.fixture
def control(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> docker.DockerClient:
    """The control side's engine; this test's calls are those of a control host with a home of its own."""
    monkeypatch.setenv("DOCKER_HOST", lab.environment["DOCKER_HOST"])
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path / "home"))
    return lab.control.docker()


@pytest.fixture
def images(
    lab: Lab, control: docker.DockerClient, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Image, Image]]:
    """Two versions of an image of three layers that differ in the last one, which is small."""
    folder, seed = tmp_path / "context", random.Random(request.node.name)  # noqa: S311 - content of a file
    folder.mkdir()
    (folder / "Dockerfile").write_text('FROM scratch\nCOPY base /\nWORKDIR /app\nCOPY app /app/\nCMD ["x"]\n')
    (folder / "base").write_bytes(seed.randbytes(3_000_000))
    built = []
    for tag in ("push-test:v1", "push-test:v2"):
        (folder / "app").write_bytes(seed.randbytes(150_000))
        built.append(control.images.build(path=str(folder), tag=tag, rm=True)[0])
    yield built[0], built[1]
    for engine in (control, lab.hosts["host-a"].docker()):
        for tag in ("push-test:v1", "push-test:v2"):
            remove_if_there(engine, tag)
    shutil.rmtree(folder)


def remove_if_there(engine: docker.DockerClient, tag: str) -> None:
    """Remove an image that may be gone."""
    try:
        engine.images.remove(tag, force=True)
    except ImageNotFound:
        return


def on_control(lab: Lab, call: Callable[[], Result]) -> Result:
    """Call it where the control side's loopback is."""

    def inside() -> Result:
        if lab.control.namespace is not None:
            lab_http.enter(lab.control.namespace)
        return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(inside).result()


def layers_of(image: Image) -> list[str]:
    """Its diff ids."""
    return [str(diff_id) for diff_id in image.attrs["RootFS"]["Layers"]]


def metadata_of(image: Image) -> ImageMetadata:
    """What a deployment knows of it."""
    return ImageMetadata(
        image_id=str(image.id),
        reference=image.tags[0],
        image_size_bytes=image.attrs["Size"],
        creation_time=image.attrs["Created"],
        layers_count=len(layers_of(image)),
        layers=layers_of(image),
        architecture=image.attrs["Architecture"],
        os=image.attrs["Os"],
        labels={},
        config={},
    )


def export(lab: Lab, image: Image, omitted: Iterable[str]) -> bytes:
    """The whole archive."""
    reference, left_out = image.tags[0], frozenset(omitted)
    return on_control(lab, lambda: b"".join(push_export(str(image.id), reference, left_out)))


def members(archive: bytes) -> list[str]:
    """Names of what is in it."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return opened.getnames()


def assert_nothing_is_left(engine: docker.DockerClient, home: Path) -> None:
    """No name and no digest of a push in the engine, no file of it in the home."""
    names = [name for image in engine.images.list(all=True) for name in image.tags]
    digests = [name for image in engine.images.list(all=True) for name in image.attrs["RepoDigests"] or ()]
    assert not [name for name in (*names, *digests) if name.startswith("127.0.0.1")]
    assert [path for path in (home / "pushes").rglob("*") if path.name != "lock"] == []


def test_only_the_changed_layer_is_exported_and_the_host_gets_the_same_image(
    lab: Lab,
    control: docker.DockerClient,
    images: tuple[Image, Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once the layers were learnt; a host that has none of them refuses the archive and keeps nothing."""
    old, new = images
    with pytest.raises(PushUnsuitable, match="compress"):
        export(lab, new, layers_of(old))
    monkeypatch.setattr(learning, "WORTH_BYTES", 1_000_000)
    assert asyncio.run(learning.wanted(metadata_of(old)))
    assert on_control(lab, lambda: learning.learn_layers(str(old.id))) == 3
    assert on_control(lab, lambda: learning.learn_layers(str(old.id))) == 0
    assert not asyncio.run(learning.wanted(metadata_of(new)))
    archive = export(lab, new, layers_of(old))
    assert members(archive)[2:] == [layer_name(layers_of(new)[-1])]
    assert_nothing_is_left(control, tmp_path / "home")

    host = lab.hosts["host-a"].docker()
    with pytest.raises(ImageLoadError, match="no such file"):
        host.images.load(archive)
    assert not host.images.list("push-test", all=True)
    host.images.load(b"".join(cast("Iterator[bytes]", old.save(named=True))))
    (loaded,) = host.images.load(archive)
    assert (loaded.id, loaded.tags, layers_of(loaded)) == (new.id, ["push-test:v2"], layers_of(new))


def test_a_layer_that_the_engine_remembers_and_we_do_not_is_sent_when_it_is_wanted(
    lab: Lab, control: docker.DockerClient, images: tuple[Image, Image], tmp_path: Path
) -> None:
    """It is taken for one that the host has, until the manifest tells; then the engine is asked again."""
    old, new = images
    engine_id = str(control.info()["ID"])
    for image in images:
        on_control(lab, lambda image=image: learning.learn_layers(str(image.id)))  # type: ignore[misc]
    pairs = [(*layer_index().digests([layer]), layer) for layer in layers_of(old)]
    (tmp_path / "home" / "layers.sqlite3").unlink()
    layer_index().learn(engine_id, pairs)  # type: ignore[arg-type]  # each layer has one digest
    assert members(export(lab, new, layers_of(old)))[2:] == [layer_name(layers_of(new)[-1])]
    assert layer_index().remembered(engine_id, layers_of(new)) == {*layers_of(new)}
    assert_nothing_is_left(control, tmp_path / "home")


def test_an_index_that_promises_too_much_costs_one_push_and_leaves_nothing(
    lab: Lab,
    control: docker.DockerClient,
    images: tuple[Image, Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine sends a layer that it was thought to know: the push is stopped, and the layer forgotten."""
    old, new = images
    engine_id = str(control.info()["ID"])
    layer_index().learn(engine_id, [(f"sha256:{n:064x}", layer) for n, layer in enumerate(layers_of(old))])
    monkeypatch.setattr(push_plan, "_LEEWAY_BYTES", 100_000)
    with pytest.raises(PushUnsuitable, match="thought to know"):
        export(lab, new, layers_of(old))
    assert layer_index().remembered(engine_id, layers_of(new)) == frozenset()
    assert_nothing_is_left(control, tmp_path / "home")


def test_an_export_that_is_given_up_or_out_of_reach_leaves_nothing(
    lab: Lab, control: docker.DockerClient, images: tuple[Image, Image], tmp_path: Path
) -> None:
    """Closed in the middle; or by a process whose loopback is not the engine's, which is told so."""
    old, new = images
    on_control(lab, lambda: learning.learn_layers(str(old.id)))

    def give_up() -> None:
        stream = push_export(str(new.id), "push-test:v2", frozenset(layers_of(old)))
        next(stream)
        stream.close()

    on_control(lab, give_up)
    assert_nothing_is_left(control, tmp_path / "home")
    with pytest.raises(PushUnsuitable, match="does not reach the loopback"):
        b"".join(push_export(str(new.id), "push-test:v2", frozenset(layers_of(old))))
    assert_nothing_is_left(control, tmp_path / "home")


def test_what_a_killed_push_left_is_taken_away_by_the_next(
    lab: Lab, control: docker.DockerClient, images: tuple[Image, Image], tmp_path: Path
) -> None:
    """The name that it gave to the image, and its folder with what had come."""
    old, new = images
    name = "127.0.0.1:1/secret/image:push"
    folder = tmp_path / "home" / "pushes" / "dead"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "blob").write_bytes(b"half a layer")
    note_name(folder, name)
    new.tag(name)
    on_control(lab, lambda: learning.learn_layers(str(old.id)))
    assert_nothing_is_left(control, tmp_path / "home")
    assert control.images.get("push-test:v2").id == new.id


def test_a_run_of_its_own_learns_the_layers_after_a_deployment(
    furnished: Lab, control: docker.DockerClient, images: tuple[Image, Image]
) -> None:
    """As `deploy-container` asks for it, by the control side's worker."""
    image, lab = images[0], furnished
    metadata, environment = metadata_of(image).model_dump_json(), {"PYTHONPATH": str(Path.cwd())}
    lab.control.run(lab.python, "-c", _REQUEST, metadata, env=environment)
    index = LayerIndex(Path(lab.environment["GANTRY_HOME"]) / "layers.sqlite3")
    engine_id = str(control.info()["ID"])
    wait_for(lambda: index.remembered(engine_id, layers_of(image)) or None, "the layers' digests")
    assert index.remembered(engine_id, layers_of(image)) == {*layers_of(image)}
