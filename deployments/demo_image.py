"""The base image of the sample: a static busybox of this machine, else one that is pulled."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import docker
from docker.errors import APIError, DockerException, ImageNotFound

from receiver.contract import LABEL_CONTAINER

BASE_IMAGE = "gantry-demo-base:latest"
PULLED_IMAGE = "busybox:stable-musl"
_DOCKERFILE = 'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\n'


def ensure_base_image(say: Callable[[str], None]) -> None:
    """Make `gantry-demo-base:latest` when the engine has none; ends with advice when it cannot."""
    try:
        client = docker.from_env(timeout=120)
        client.ping()
    except (DockerException, OSError) as exc:
        raise SystemExit(
            f"no Docker Engine answers ({exc}); start it, or set DOCKER_HOST, or run as root"
        ) from exc
    try:
        client.images.get(BASE_IMAGE)
    except ImageNotFound:
        _make(client, say)


def _make(client: docker.DockerClient, say: Callable[[str], None]) -> None:
    busybox = static_busybox()
    if busybox is not None:
        say(f"building the sample's base image from {busybox}")
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(busybox, Path(folder) / "busybox")
            (Path(folder) / "Dockerfile").write_text(_DOCKERFILE)
            client.images.build(path=folder, tag=BASE_IMAGE, rm=True)
        return
    say(f"pulling {PULLED_IMAGE} as the sample's base image")
    try:
        repository, _, tag = PULLED_IMAGE.partition(":")
        client.images.pull(repository, tag).tag(*BASE_IMAGE.split(":"))
    except APIError as exc:
        raise SystemExit(
            f"{PULLED_IMAGE} cannot be pulled ({exc.explanation or exc}) and no static busybox is here; "
            "install one: apt-get install busybox-static"
        ) from exc


def static_busybox() -> Path | None:
    """A busybox on PATH that needs no shared library."""
    for name in ("busybox", "busybox.static"):
        found = shutil.which(name)
        if found and _is_static(Path(found)):
            return Path(found)
    return None


def _is_static(program: Path) -> bool:
    """An ELF file without an interpreter (`PT_INTERP`), and one that has the applets the sample needs."""
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=False).stdout.split()
    return {"sh", "httpd", "mkdir"} <= set(applets) and b"/ld-" not in program.read_bytes()[:4096]


def drop_images() -> None:
    """Remove the sample's images and its base from this machine's engine."""
    client = docker.from_env(timeout=60)
    ours = client.images.list(filters={"label": f"{LABEL_CONTAINER}=hello"})
    names = [tag for image in ours for tag in image.tags] + [BASE_IMAGE]
    for name in names:
        try:
            client.images.remove(name, force=True)
        except ImageNotFound:
            continue
