"""What a push asks of the engine: facts of the image, a name for it, the push itself. Blocking.

Imports no Prefect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from threading import Timer
from typing import Any, cast

import docker
from docker.errors import APIError, DockerException, ImageNotFound
from requests import RequestException
from urllib3.exceptions import HTTPError

from tasks import builder
from tasks.engine_address import engine_address, is_local
from tasks.push_folder import note_name
from tasks.push_gateway import Gateway
from tasks.push_plan import PushUnsuitable, layer_sizes

_SILENT_SECONDS = 60
_SLOWEST_BYTES_PER_SECOND = 5_000_000
_TAG = "push"


@dataclass(frozen=True)
class EngineImage:
    """An image, and the engine that has it; `sizes` are bytes by diff id, at most."""

    image_id: str
    engine_id: str
    layers: tuple[str, ...]
    sizes: Mapping[str, int]


@contextmanager
def connected() -> Iterator[docker.DockerClient]:
    """The engine that builds, on this machine; raises `PushUnsuitable` for one that is elsewhere."""
    address = engine_address()
    if not is_local(address):
        raise PushUnsuitable(f"the engine at {address} is not on this machine: it cannot push to loopback")
    with closing(builder.connect()) as client:
        client.api.timeout = _SILENT_SECONDS
        yield client


def inspect_image(client: docker.DockerClient, image_id: str) -> EngineImage:
    """Raises `PushUnsuitable` when the image is gone."""
    try:
        layers = client.images.get(image_id).attrs["RootFS"].get("Layers") or []
        steps: list[dict[str, Any]] = client.api.history(image_id)  # type: ignore[no-untyped-call]  # a stub
        history = [int(step["Size"]) for step in steps]
        engine_id = str(client.info()["ID"])
    except ImageNotFound as exc:
        raise PushUnsuitable(f"the engine has no image {image_id}") from exc
    return EngineImage(image_id, engine_id, tuple(layers), layer_sizes(layers, history[::-1]))


def push(
    client: docker.DockerClient, image_id: str, gateway: Gateway, folder: Path, limit_bytes: int
) -> None:
    """Let the engine push the image into the gateway, under a name that is taken away again.

    Raises `PushUnsuitable` with what the engine or the gateway says.
    """
    seconds = _SILENT_SECONDS + limit_bytes / _SLOWEST_BYTES_PER_SECOND
    timer = Timer(seconds, gateway.refuse, (f"the push took longer than {seconds:.0f} s",))
    timer.start()
    note_name(folder, f"{gateway.name}:{_TAG}")
    try:
        client.api.tag(image_id, gateway.name, _TAG)
        _follow(client, gateway)
    except (DockerException, RequestException, HTTPError, OSError) as exc:
        raise PushUnsuitable(gateway.refusal or f"the engine's push broke off: {exc}") from exc
    finally:
        timer.cancel()
        remove_name(client, f"{gateway.name}:{_TAG}")


def _follow(client: docker.DockerClient, gateway: Gateway) -> None:
    answers = client.api.push(gateway.name, _TAG, stream=True, decode=True, auth_config={})
    with closing(cast("Any", answers)) as told:  # the engine ends a push that nobody listens to
        for answer in told:
            if gateway.refusal:
                raise PushUnsuitable(gateway.refusal)
            if "error" in answer:
                raise PushUnsuitable(gateway.refusal or _explain(str(answer["error"]), gateway))


def _explain(error: str, gateway: Gateway) -> str:
    if gateway.was_reached:
        return f"the engine's push failed: {error}"
    return f"the engine does not reach the loopback address of this process: {error}"


def remove_name(client: docker.DockerClient, name: str) -> None:
    """Take the name of a push away, with the digest that the engine noted under it; it may be gone.

    Never by force. It stays where it is all that names the image of a container.
    """
    try:
        client.api.remove_image(name, noprune=True)
    except APIError as exc:
        if exc.status_code not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
            raise PushUnsuitable(f"{name} could not be taken away; run: docker rmi {name} ({exc})") from exc
