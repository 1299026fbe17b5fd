"""Exports an image by the engine's own push: only layers that the host lacks are read. Blocking.

The engine pushes into a gateway in this process; what it sent becomes a docker-archive. Imports no Prefect.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException
from urllib3.exceptions import HTTPError

from tasks import push_engine, store
from tasks.docker_archive import docker_archive
from tasks.layer_index import LayerIndex
from tasks.push_blobs import Blob
from tasks.push_engine import EngineImage
from tasks.push_folder import push_folder
from tasks.push_gateway import Gateway
from tasks.push_plan import PushPlan, PushUnsuitable

__all__ = ["PushUnsuitable", "layer_index", "push_export"]

_ATTEMPTS = 2


@dataclass(frozen=True)
class Pushed:
    """An image as the gateway has it: its configuration, its layers, and files of those that were sent."""

    config: bytes
    layers: tuple[str, ...]
    files: dict[str, Path]


def layer_index() -> LayerIndex:
    """What this control host knows of its engines' layers."""
    return LayerIndex(store.home() / "layers.sqlite3")


def push_export(image_id: str, reference: str, omitted: frozenset[str]) -> Generator[bytes]:
    """The bytes of an uncompressed docker-archive of the image, without the layers in `omitted` (diff ids).

    All of the push happens before the first byte, and so does every failure: `PushUnsuitable` means that
    the image is better exported another way. Closing the generator leaves nothing behind.
    """
    with ExitStack() as in_use:
        try:
            pushed = _pushed(in_use, image_id, omitted)
        except (
            DockerException,
            HTTPError,
            sqlite3.Error,
            OSError,
            LookupError,
            TypeError,
            ValueError,
        ) as exc:
            raise PushUnsuitable(f"the push could not be prepared or read: {exc}") from exc
        yield from docker_archive(reference, pushed.config, pushed.layers, pushed.files)


def _pushed(in_use: ExitStack, image_id: str, omitted: frozenset[str]) -> Pushed:
    client = in_use.enter_context(push_engine.connected())
    folder = in_use.enter_context(push_folder(partial(push_engine.remove_name, client)))
    return _push(client, push_engine.inspect_image(client, image_id), omitted, folder)


def _push(client: docker.DockerClient, image: EngineImage, omitted: frozenset[str], folder: Path) -> Pushed:
    index, known = layer_index(), omitted & {*image.layers}
    plan = PushPlan.of(image.sizes, known, index.remembered(image.engine_id, known))
    plan.check(shutil.disk_usage(folder).free)
    wanted = {*index.digests({*image.layers} - known), image.image_id}
    # A digest that nobody here has heard of is taken for one of a known layer: the manifest tells.
    with Gateway(lambda digest: digest not in wanted, folder=folder, limit_bytes=plan.limit_bytes) as gateway:
        for _ in range(_ATTEMPTS):
            try:
                push_engine.push(client, image.image_id, gateway, folder, plan.limit_bytes)
            except PushUnsuitable:
                if gateway.is_overspent:
                    index.forget(image.engine_id, known)
                raise
            manifest = manifest_of(gateway, len(image.layers))
            digests = [str(layer["digest"]) for layer in manifest["layers"]]
            index.learn(image.engine_id, zip(digests, image.layers, strict=True))
            lacking = _needed(manifest, image, known) - gateway.blobs.keys()
            if not lacking:
                return _verified(gateway.blobs, manifest, image, known)
            wanted |= lacking
    raise PushUnsuitable(f"the engine did not send {', '.join(sorted(lacking))}")


def manifest_of(gateway: Gateway, layers_count: int) -> dict[str, Any]:
    """The manifest that was pushed, among those of an index; raises `PushUnsuitable`."""
    for content in reversed(gateway.manifests.values()):
        manifest: dict[str, Any] = json.loads(content)
        layers = manifest.get("layers") or ()
        attests = any("in-toto" in layer.get("mediaType", "") for layer in layers)
        if "config" in manifest and len(layers) == layers_count and not attests:
            return manifest
    raise PushUnsuitable("the engine pushed no manifest of an image with as many layers")


def _needed(manifest: dict[str, Any], image: EngineImage, known: frozenset[str]) -> set[str]:
    """Digests of the blobs that the archive takes."""
    layers = zip(manifest["layers"], image.layers, strict=True)
    return {
        manifest["config"]["digest"],
        *(each["digest"] for each, diff_id in layers if diff_id not in known),
    }


def _verified(
    blobs: dict[str, Blob], manifest: dict[str, Any], image: EngineImage, known: frozenset[str]
) -> Pushed:
    """The blobs by the layers' own names; raises `PushUnsuitable` when one is not what it should be."""
    config = blobs[manifest["config"]["digest"]].path.read_bytes()
    if json.loads(config)["rootfs"].get("diff_ids") != [*image.layers]:
        raise PushUnsuitable(f"the engine pushed another image than {image.image_id}")
    received = {blob.diff_id: blob.path for blob in blobs.values()}
    files = {diff_id: path for diff_id, path in received.items() if diff_id not in known}
    if wrong := {*image.layers} - known - files.keys():
        raise PushUnsuitable(f"what the engine sent is not the layer {', '.join(sorted(wrong))}")
    return Pushed(config, image.layers, files)
