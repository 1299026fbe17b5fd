"""The lowest layers of an image, exported while the engine still gathers the whole. Blocking; no Prefect.

An engine of the classic store writes all of an image to its own disk before `save` gives the first byte: 9 s
for 1.5 GB. Fewer layers are there sooner. So an image of the lowest ones alone is made for the time of their
export; it takes no room, as the engine has its layers.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import docker
from docker.errors import DockerException, ImageNotFound
from requests.exceptions import RequestException

from receiver.engine_store import has_containerd_store
from tasks.docker_archive import docker_archive
from tasks.engine_address import engine_address, is_local
from tasks.push_engine import inspect_image
from tasks.push_plan import PushUnsuitable

log = logging.getLogger(__name__)
LABEL = "gantry.export"
MIN_IMAGE_BYTES = 200_000_000
# What they are worth: enough to travel until the whole is there, far less than the whole.
_LEAST_SHARE, _MOST_SHARE = 1 / 6, 1 / 2
_FORGOTTEN = timedelta(hours=1)


def lowest_layers(layers: Sequence[str], sizes: Mapping[str, int]) -> int:
    """How many of an image's layers (diff ids, lowest first) are exported early; 0 where it does not pay.

    `sizes` are bytes by diff id.
    """
    whole_bytes = sum(sizes[layer] for layer in layers)
    if whole_bytes < MIN_IMAGE_BYTES:
        return 0
    early_bytes = 0
    for count, layer in enumerate(layers[:-1], 1):
        early_bytes += sizes[layer]
        if early_bytes >= whole_bytes * _LEAST_SHARE:
            return count if early_bytes <= whole_bytes * _MOST_SHARE else 0
    return 0


@dataclass(frozen=True)
class EarlyImage:
    """An image of another one's lowest layers (diff ids)."""

    image_id: str
    layers: tuple[str, ...]


@contextmanager
def early_image(client: docker.DockerClient, image_id: str) -> Iterator[EarlyImage | None]:
    """The image of the lowest layers for the block; None where it does not pay or cannot be had."""
    early = None
    try:
        early = _made(client, image_id)
    except (PushUnsuitable, DockerException, RequestException, OSError) as exc:
        log.info("no layers are exported early: %s", exc)
    try:
        yield early
    finally:
        if early is not None:
            _remove(client, early.image_id)


def _made(client: docker.DockerClient, image_id: str) -> EarlyImage | None:
    if not is_local(engine_address()) or has_containerd_store(client.info()):
        return None  # they would travel twice; it gives its first byte at once
    told = inspect_image(client, image_id)
    count = lowest_layers(told.layers, told.sizes)
    if not count:
        return None
    _remove_forgotten(client)
    layers = told.layers[:count]
    config = json.dumps(_config(client.images.get(image_id).attrs, layers)).encode()
    client.images.load(b"".join(docker_archive(None, config, layers, {})))  # the engine has its layers
    return EarlyImage(f"sha256:{hashlib.sha256(config).hexdigest()}", layers)


def _config(attrs: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    return {
        "architecture": attrs["Architecture"],
        "os": attrs["Os"],
        "created": datetime.now(UTC).isoformat(),  # no two of them are the same image
        "config": {"Labels": {LABEL: attrs["Id"]}},
        "rootfs": {"type": "layers", "diff_ids": layers},
    }


def _remove(client: docker.DockerClient, image_id: str) -> None:
    try:
        client.images.remove(image_id, force=True)
    except ImageNotFound:
        pass
    except (DockerException, RequestException, OSError) as exc:
        log.warning("an image that nobody needs stays (docker image prune): %s", exc)


def _remove_forgotten(client: docker.DockerClient) -> None:
    """Those of exports that were killed."""
    since = (datetime.now(UTC) - _FORGOTTEN).timestamp()
    for image in client.api.images(all=True, filters={"label": LABEL}):
        if image["Created"] <= since:
            _remove(client, image["Id"])
