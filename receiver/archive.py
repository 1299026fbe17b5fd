"""A docker-archive as a stream: taken apart, checked against what was announced, put together again.

The package's format is part of the wire, so both sides read it here. Whoever reads what these functions
give gets the archive's end only after it was checked; an engine has loaded nothing before that. Holds one
block in memory, whatever the archive's size.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from zstandard import ZstdDecompressor, ZstdError

from receiver.contract import ImageAnnouncement, PackageAnnouncement, PackageFormat

MANIFEST = "manifest.json"
_NAMES = "repositories"  # what Docker before 1.10 reads instead
_INDEX = "index.json"  # what a containerd image store reads instead
BLOCK_BYTES = 1024 * 1024
_MAX_WINDOW_BYTES = 8 * 1024 * 1024  # what zstd may ask to keep in memory
_MAX_DOCUMENT_BYTES = 4 * 1024 * 1024
_SLACK_BYTES = 1024**3
_SLACK_FACTOR = 4  # of an engine that counts its images compressed
_MAGIC = {b"\x28\xb5\x2f\xfd": PackageFormat.ZSTD, b"\x1f\x8b": PackageFormat.GZIP}


class ArchiveDamaged(Exception):
    """The package is no complete docker-archive of one image"""


# What a torn or foreign file makes of tarfile, gzip, zstd, json and of the look into the manifest.
_DAMAGE = (
    *(tarfile.TarError, zlib.error, ZstdError, OSError, EOFError),
    *(ValueError, LookupError, TypeError, AttributeError),
)


class Readable(Protocol):
    """A stream that is read to its end once."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""


class Rewindable(Readable, Protocol):
    """One that can begin anew."""

    def seek(self, offset: int, /) -> object:
        """Go on from there."""


@dataclass
class ArchiveContents:
    """What went by: digests of the small files, and the files that a layer may be."""

    digests: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    manifest: bytes | None = None

    def has(self, name: str) -> bool:
        """True for a file, and for a link that leads to one."""
        return name in self.names and (name not in self.links or self.links[name] in self.names)


@dataclass(frozen=True)
class ArchivedImage:
    """The single image of an archive; a layer that is missing is known by its place."""

    config_digest: str
    layer_files: tuple[str, ...]
    missing: frozenset[int]

    @property
    def layers_count(self) -> int:
        """How many layers it names, also those that are missing."""
        return len(self.layer_files)

    def check(self, config_digest: str, layers: list[str], omitted: Collection[str]) -> None:
        """Raise `ArchiveDamaged` unless this is that image, and lacks no layer but the omitted ones."""
        if self.config_digest != config_digest:
            raise ArchiveDamaged(f"it holds image {self.config_digest}, not {config_digest}")
        if self.layers_count != len(layers):
            raise ArchiveDamaged(f"it names {self.layers_count} layers, the image has {len(layers)}")
        lacking = sorted({layers[place] for place in self.missing} - set(omitted))
        if lacking:
            raise ArchiveDamaged(f"it lacks {', '.join(lacking)}")


def image_in(contents: ArchiveContents) -> ArchivedImage:
    """The image that an archive holds; raises `ArchiveDamaged`."""
    with _as_damage():
        if contents.manifest is None:
            raise ArchiveDamaged(f"it has no {MANIFEST}")
        images = json.loads(contents.manifest)
        if len(images) != 1:
            raise ArchiveDamaged(f"it holds {len(images)} images; one is expected")
        config, layers = images[0]["Config"], images[0]["Layers"] or []
        if config not in contents.digests:
            raise ArchiveDamaged(f"it lacks {config}")
        missing = frozenset(place for place, name in enumerate(layers) if not contents.has(name))
        return ArchivedImage(f"sha256:{contents.digests[config]}", tuple(layers), missing)


def rebuilt(
    stream: Readable,
    check: Callable[[ArchivedImage], None],
    is_dropped: Callable[[tarfile.TarInfo, Mapping[str, bytes]], bool] = lambda _member, _documents: False,
    *,
    nameless: bool = False,
) -> Iterator[bytes]:
    """The archive again, without the members that are dropped; its end comes only once `check` has passed.

    `is_dropped` sees each member before its bytes, and the JSON documents that went by. A `nameless` archive
    gives the image no name. Raises `ArchiveDamaged`, and what `check` raises.
    """
    contents = ArchiveContents()
    documents: dict[str, bytes] = {}
    with _as_damage():
        archive = tarfile.open(fileobj=cast("BinaryIO", stream), mode="r|", bufsize=BLOCK_BYTES)  # noqa: SIM115
        for member in archive:
            if not (member.isreg() or member.isdir() or member.issym()):
                raise ArchiveDamaged(f"{member.name} is neither file, folder nor link")
            if is_dropped(member, documents) or (nameless and member.name == _NAMES):
                continue
            if nameless and member.name in {MANIFEST, _INDEX}:
                yield from _nameless_member(archive, member, contents)
                continue
            yield member.tobuf(tarfile.GNU_FORMAT)
            yield from _content(archive, member, contents, documents)
        for _ in blocks_of(stream):  # to the end, where compression keeps its checksum
            pass
    check(image_in(contents))
    yield bytes(2 * tarfile.BLOCKSIZE)


def _content(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    contents: ArchiveContents,
    documents: dict[str, bytes],
) -> Iterator[bytes]:
    """The member's bytes as they go by, filled up to whole blocks; what is small is looked at."""
    contents.names.add(member.name)
    if member.issym():
        contents.links[member.name] = posixpath.normpath(
            posixpath.join(posixpath.dirname(member.name), member.linkname)
        )
    if not member.isreg():
        return
    is_small, digest, kept = member.size <= _MAX_DOCUMENT_BYTES, hashlib.sha256(), bytearray()
    for block in _blocks(archive, member):
        if is_small:
            digest.update(block)
            kept += block
        yield block
    yield bytes(-member.size % tarfile.BLOCKSIZE)
    if is_small:
        contents.digests[member.name] = digest.hexdigest()
    if is_small and posixpath.basename(member.name) in {"json", MANIFEST}:
        documents[member.name] = bytes(kept)
        contents.manifest = bytes(kept) if member.name == MANIFEST else contents.manifest


def _nameless_member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, contents: ArchiveContents
) -> Iterator[bytes]:
    if member.size > _MAX_DOCUMENT_BYTES:
        raise ArchiveDamaged(f"its {member.name} has {member.size} bytes")
    told = json.loads(b"".join(_blocks(archive, member)))
    if member.name == MANIFEST:
        document = json.dumps([{**image, "RepoTags": None} for image in told]).encode()
        contents.manifest = document
    else:
        images = [{**image, "annotations": None} for image in told["manifests"]]
        document = json.dumps({**told, "manifests": images}).encode()
    yield from file_member(member.name, len(document), [document])


def file_member(name: str, size_bytes: int, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """A file of an archive, filled up to whole records; `blocks` are its `size_bytes` bytes."""
    header = tarfile.TarInfo(name)
    header.size = size_bytes
    yield header.tobuf(tarfile.GNU_FORMAT)
    yield from blocks
    yield bytes(-size_bytes % tarfile.BLOCKSIZE)


def blocks_of(file: Readable) -> Iterator[bytes]:
    """What is left of a file."""
    while block := file.read(BLOCK_BYTES):
        yield block


def _blocks(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    stream = archive.extractfile(member)
    if stream is not None:
        yield from blocks_of(stream)


class PackageReader:
    """A package as the uncompressed archive; refuses one that grows beyond `limit_bytes`."""

    def __init__(self, file: Rewindable, announced: PackageFormat | None, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.read_bytes = 0
        with _as_damage():
            self._stream = _opened(file, announced)

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; raises `ArchiveDamaged`."""
        with _as_damage():
            block = self._stream.read(size)
        self.read_bytes += len(block)
        if self.read_bytes > self._limit_bytes:
            raise ArchiveDamaged(
                f"it holds more than {self._limit_bytes} bytes, which is more than its image can have"
            )
        return block


def package_limit_bytes(image: ImageAnnouncement | None, package_bytes: int) -> int:
    """How large the archive in a package may be: by its image, or by its own size where that is not known."""
    known_bytes = image.size_bytes if image else 32 * package_bytes
    return _SLACK_FACTOR * known_bytes + _SLACK_BYTES


def checked_package(
    path: Path,
    image: ImageAnnouncement | None,
    package: PackageAnnouncement | None,
    found: Callable[[ArchivedImage], None],
    *,
    nameless: bool = False,
) -> Generator[bytes]:
    """The archive in a package for an engine, its end only when it is the announced image.

    `found` is told what it is, before the end. `nameless` as for `rebuilt`. Raises `ArchiveDamaged`.
    """

    def check(archived: ArchivedImage) -> None:
        if image is not None:
            archived.check(image.config_digest, image.layers, package.omitted_layers if package else ())
        elif archived.missing:
            raise ArchiveDamaged(f"it lacks {len(archived.missing)} of its layers")
        found(archived)

    with _as_damage():
        file = path.open("rb")
    with file:
        limit_bytes = package_limit_bytes(image, path.stat().st_size)
        reader = PackageReader(file, package.format if package else None, limit_bytes)
        yield from rebuilt(reader, check, nameless=nameless)


def format_of(beginning: bytes) -> PackageFormat:
    """The format that a file's first bytes tell."""
    found = (told for magic, told in _MAGIC.items() if beginning.startswith(magic))
    return next(found, PackageFormat.TAR)


def _opened(file: Rewindable, announced: PackageFormat | None) -> Readable:
    found = format_of(file.read(4))
    if announced not in {None, found}:
        raise ArchiveDamaged(f"it was announced as {announced}, and it is {found}")
    file.seek(0)
    source = cast("BinaryIO", file)
    if found is PackageFormat.GZIP:
        return cast("Readable", gzip.GzipFile(fileobj=source))
    if found is PackageFormat.ZSTD:
        stream: Any = ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(source)
        return cast("Readable", stream)
    return file


@contextmanager
def _as_damage() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as exc:
        raise ArchiveDamaged(str(exc) or type(exc).__name__) from exc
