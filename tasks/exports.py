"""An image as the bytes of a docker-archive without the layers that a host has. Blocking; no Prefect.

`open_export` chooses the way. Each yields an archive that loads where the omitted layers are, and its end
only when it is the asked image and lacks nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import tarfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, BinaryIO, Literal, cast

import docker
from docker.errors import DockerException, ImageNotFound
from requests.exceptions import RequestException
from urllib3.exceptions import HTTPError

from receiver.archive import BLOCK_BYTES, ArchiveDamaged, ArchivedImage, blocks_of, file_member, rebuilt
from tasks import builder
from tasks.early_export import early_image
from tasks.errors import TransferFailed
from tasks.push_export import layer_index, push_export
from tasks.push_plan import PushUnsuitable

log = logging.getLogger(__name__)
Way = Literal["archive", "layers"]
_BLOBS = "blobs/sha256/"
_LEGACY_LAYER = "/layer.tar"
# What Docker up to 24 makes a layer's folder name of: the settings of a container that has none.
_NO_CONFIG = {
    "Hostname": "",
    "Domainname": "",
    "User": "",
    "AttachStdin": False,
    "AttachStdout": False,
    "AttachStderr": False,
    "Tty": False,
    "OpenStdin": False,
    "StdinOnce": False,
    "Env": None,
    "Cmd": None,
    "Image": "",
    "Volumes": None,
    "WorkingDir": "",
    "Entrypoint": None,
    "OnBuild": None,
    "Labels": None,
}


class ExportFailed(TransferFailed):
    """The image could not be exported from the control host's engine"""

    next_step = "See that the image is in the engine (docker images) and that its disk is well; deploy again."


@dataclass(frozen=True)
class Export:
    """An archive under way, and how it is made."""

    way: Way
    blocks: Generator[bytes]


def open_export(image_id: str, reference: str, omitted: frozenset[str]) -> Export:
    """The archive of an image by the quickest way that its engine allows."""
    if omitted:
        try:
            return Export("layers", _begun(push_export(image_id, reference, omitted)))
        except PushUnsuitable as exc:
            log.info("not by layers: %s", exc)
    return Export("archive", save_export(image_id, reference, omitted))


def _begun(blocks: Generator[bytes]) -> Generator[bytes]:
    """The same blocks, the first of which is there: whatever keeps it from coming is raised here."""
    first = next(blocks, b"")

    def all_blocks() -> Generator[bytes]:
        with closing(blocks):
            yield first
            yield from blocks

    return all_blocks()


def save_export(image_id: str, reference: str, omitted: frozenset[str]) -> Generator[bytes]:
    """By the engine's `save`, which reads the whole image. Raises `ExportFailed`.

    Of a whole image the lowest layers come first, while the engine gathers the others.
    """
    with _saved(image_id, reference) as saved:
        sent = frozenset[str]() if omitted else (yield from _early_layers(image_id, saved.layers))
        there = omitted | sent
        known = _KnownLayers(saved.layers, there, _known_digests(there))
        yield from rebuilt(saved.blocks, _checks(saved.layers, there), known.is_one)


def _early_layers(image_id: str, layers: Sequence[str]) -> Generator[bytes, None, frozenset[str]]:
    """Files of the lowest layers, named as in the archive of the whole image; returns which those are."""
    sent = set[str]()
    with closing(builder.connect()) as client, early_image(client, image_id) as early:
        if early is None:
            return frozenset()
        known, names = _KnownLayers(early.layers), _legacy_files(layers)
        documents: dict[str, bytes] = {}
        with closing(_get_image(client, early.image_id)) as blocks:
            archive = tarfile.open(fileobj=cast("BinaryIO", _Blocks(blocks)), mode="r|", bufsize=BLOCK_BYTES)  # noqa: SIM115
            for member in archive:
                if member.isreg() and member.name.endswith("/json"):
                    documents[member.name] = cast("IO[bytes]", archive.extractfile(member)).read()
                layer = known.layer_of(member, documents)
                if layer not in early.layers or layers.count(layer) > 1:
                    continue
                is_legacy = member.name.endswith(_LEGACY_LAYER)
                file = blocks_of(cast("IO[bytes]", archive.extractfile(member)))
                yield from file_member(names[layer] if is_legacy else member.name, member.size, file)
                sent.add(layer)
    return frozenset(sent)


def read_config_digest(image_id: str, reference: str) -> str:
    """The image's config digest, for engines whose image id is another: read from a whole export.

    Such an engine keeps layers compressed: their digests are learnt here, so that later exports can leave
    out the layers that a host has.
    """
    found: list[ArchivedImage] = []
    with _saved(image_id, reference) as saved:
        for _ in rebuilt(saved.blocks, found.append):
            pass
    blobs = [name for name in found[0].layer_files if name.startswith(_BLOBS)]
    if len(blobs) == len(saved.layers):
        with suppress(sqlite3.Error, OSError):  # it would only save time
            layer_index().learn(saved.engine_id, zip(map(_blob_digest, blobs), saved.layers, strict=True))
    return found[0].config_digest


def _blob_digest(name: str) -> str:
    return f"sha256:{name.removeprefix(_BLOBS)}"


def _known_digests(layers: frozenset[str]) -> frozenset[str]:
    """By what other digests these layers are known, as far as this control host has learnt it."""
    with suppress(sqlite3.Error, OSError):
        return layer_index().digests(layers)
    return frozenset()


@dataclass(frozen=True)
class _Saved:
    """What an engine saves of an image, and the image's diff ids."""

    engine_id: str
    blocks: _Blocks
    layers: list[str]


@contextmanager
def _saved(image_id: str, reference: str) -> Iterator[_Saved]:
    """The image as its engine saves it; errors within are `ExportFailed`.

    By the image's name, unless that was given to another one meanwhile: then nameless, and named by the host.
    """
    with _export_errors(image_id), closing(builder.connect()) as client:
        image = client.images.get(image_id)
        name = reference if reference in image.tags else image_id
        layers = list(image.attrs["RootFS"].get("Layers") or ())
        engine_id = str(client.info()["ID"])
        with _begun_apart(lambda: _get_image(client, name)) as blocks:
            yield _Saved(engine_id, _Blocks(blocks), layers)


def _get_image(client: docker.DockerClient, name: str) -> Generator[bytes]:
    """Returns when the engine gives the first byte."""
    return cast("Generator[bytes]", client.api.get_image(name, BLOCK_BYTES))


@contextmanager
def _begun_apart(export: Callable[[], Generator[bytes]]) -> Iterator[Iterator[bytes]]:
    """The blocks of an export that begins at once, in a thread; who asks for the first one waits for it."""
    begun = Future[Generator[bytes]]()

    def begin() -> None:
        try:
            begun.set_result(export())
        except BaseException as exc:  # noqa: BLE001 - told to whoever reads
            begun.set_exception(exc)

    def blocks() -> Iterator[bytes]:
        yield from begun.result()

    # A daemon: an engine that does not answer must not keep a process that was told to end.
    threading.Thread(target=begin, name="save", daemon=True).start()
    try:
        yield blocks()
    finally:
        with suppress(Exception):
            begun.result().close()


def _checks(layers: list[str], omitted: frozenset[str]) -> Callable[[ArchivedImage], None]:
    return lambda image: image.check(image.config_digest, layers, omitted)


class _Blocks:
    """Blocks as a file that is read once."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, b""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._rest = block
        given, self._rest = self._rest[:size], self._rest[size:]
        return given


class _KnownLayers:
    """Which members of an engine's export hold which layers, and which of them are left out."""

    def __init__(
        self,
        layers: Sequence[str],
        omitted: frozenset[str] = frozenset(),
        digests: frozenset[str] = frozenset(),
    ) -> None:
        self._layers, self._omitted = layers, omitted | digests
        self._folders = legacy_folders(layers[:-1])

    def is_one(self, member: tarfile.TarInfo, documents: Mapping[str, bytes]) -> bool:
        """True for a layer in `omitted`; one that is not recognised is sent."""
        return self.layer_of(member, documents) in self._omitted

    def layer_of(self, member: tarfile.TarInfo, documents: Mapping[str, bytes]) -> str | None:
        """Its diff id, or the digest of a file that may be a layer; None when it is neither."""
        name = member.name
        if name.startswith(_BLOBS):
            return _blob_digest(name)
        if not name.endswith(_LEGACY_LAYER):
            return None
        return self._layer_in(name.removesuffix(_LEGACY_LAYER), documents)

    def _layer_in(self, folder: str, documents: Mapping[str, bytes]) -> str | None:
        """By the folder's name; the top layer's depends on the whole image, and is known by its parent."""
        if folder in self._folders:
            return self._folders[folder]
        parent = json.loads(documents.get(f"{folder}/json", b"{}")).get("parent")
        below = list(self._folders)[-1] if self._folders else None
        return self._layers[-1] if parent == below else None


def _legacy_files(layers: Sequence[str]) -> dict[str, str]:
    """Names of the files of layers that are not an image's last, by diff id."""
    return {layer: f"{folder}{_LEGACY_LAYER}" for folder, layer in legacy_folders(layers[:-1]).items()}


def legacy_folders(layers: Sequence[str]) -> dict[str, str]:
    """Folder name in an export of Docker up to 24, and diff id, of layers that are not an image's last.

    The name is a digest over the layer and all below it, so that it can stand for no other one.
    """
    chain, parent, found = "", "", dict[str, str]()
    for layer in layers:
        chain = _digest(f"{chain} {layer}".encode()) if chain else layer
        config = {"container_config": _NO_CONFIG, "created": "1970-01-01T00:00:00Z", "layer_id": chain}
        document = config | ({"parent": parent} if parent else {})
        parent = _digest(json.dumps(document, separators=(",", ":")).encode())
        found[parent.removeprefix("sha256:")] = layer
    return found


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@contextmanager
def _export_errors(image_id: str) -> Iterator[None]:
    try:
        yield
    except ImageNotFound as exc:
        raise ExportFailed(
            f"image {image_id} is not in the engine any more", next_step="Deploy again: it is built anew."
        ) from exc
    except (ArchiveDamaged, tarfile.TarError, DockerException, RequestException, HTTPError, OSError) as exc:
        raise ExportFailed(f"the image could not be exported: {exc}") from exc
