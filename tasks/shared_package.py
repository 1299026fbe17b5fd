"""One package for every deployment of this control host that needs it, made once, read while it grows.

Whoever comes first holds the growing file's lock and writes it; the others, in their own processes, read what
is there. A writer that dies lets go of its lock: the next reader makes the package anew. Imports no Prefect.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from blake3 import blake3

from blocks.package_stream import Replaced
from receiver.contract import PackageAnnouncement, PackageFormat
from tasks import store
from tasks.exports import Export, ExportFailed, Way
from tasks.packing import pack

POLL_SECONDS = 0.02
_READ_BYTES = 2 * 1024 * 1024


class PackageReplaced(Replaced):
    """The package is made anew, because its writer died; what was read of it may be of another one"""


@dataclass(frozen=True)
class PackageKey:
    """What makes two packages the same."""

    image_id: str
    reference: str
    omitted: tuple[str, ...] = ()
    format: PackageFormat = PackageFormat.ZSTD

    @property
    def name(self) -> str:
        """The beginning of the names of its files."""
        told = json.dumps([self.image_id, self.reference, sorted(self.omitted), self.format])
        return hashlib.sha256(told.encode()).hexdigest()[:40]

    @property
    def part(self) -> Path:
        """The file while it grows."""
        return store.packages_dir() / f"{self.name}.part"


@dataclass(frozen=True)
class Package:
    """A finished package on the control host's disk; its file's name says what it is."""

    key: PackageKey
    path: Path
    size_bytes: int
    blake3: str
    unpacked_bytes: int
    way: Way

    def announcement(self) -> PackageAnnouncement:
        """What the host is told of the package."""
        return PackageAnnouncement(
            size_bytes=self.size_bytes,
            blake3=self.blake3,
            format=self.key.format,
            omitted_layers=list(self.key.omitted),
            unpacked_bytes=self.unpacked_bytes,
        )


def find(key: PackageKey) -> Package | None:
    """The finished package, when it is here; not whether it is whole."""
    for path in store.packages_dir().glob(f"{key.name}.*.package"):
        with suppress(FileNotFoundError):
            _, digest, unpacked, way, _ = path.name.split(".")
            return Package(key, path, path.stat().st_size, digest, int(unpacked), cast("Way", way))
    return None


def find_intact(key: PackageKey) -> Package | None:
    """The finished package with every byte it had; one that changed is removed. Reads the whole file."""
    package = find(key)
    if package is None:
        return None
    with suppress(FileNotFoundError), package.path.open("rb") as stream:
        if prefix_digest(stream.fileno(), package.size_bytes) == package.blake3:
            store.touch_package(package.path)
            return package
        package.path.unlink()
    return None


def prefix_digest(descriptor: int, size_bytes: int) -> str:
    """BLAKE3 of the file's first bytes."""
    digest, position = blake3(), 0
    while position < size_bytes:
        block = os.pread(descriptor, min(_READ_BYTES, size_bytes - position), position)
        if not block:
            break
        digest.update(block)
        position += len(block)
    return str(digest.hexdigest())


@dataclass
class SharedPackage:
    """A package to read from, finished or growing; made here when nobody else makes it."""

    key: PackageKey
    export: Callable[[], Export]
    package: Package | None = None
    was_made_here: bool = False
    _descriptor: int = -1
    _made: Future[None] | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)

    async def read(self, offset: int, size_bytes: int) -> bytes:
        """That many bytes at `offset`, fewer at the end only; waits while they are still to come.

        Raises `PackageReplaced` when it was begun anew, and what the export raises.
        """
        await self._wait_for(offset + size_bytes)
        return await asyncio.to_thread(os.pread, self._descriptor, size_bytes, offset)

    async def digest(self, size_bytes: int) -> str | None:
        """BLAKE3 of the first bytes; None when it has fewer. Waits and raises as `read`."""
        if await self._wait_for(size_bytes) < size_bytes:
            return None
        return await asyncio.to_thread(prefix_digest, self._descriptor, size_bytes)

    async def finished(self) -> Package:
        """The package once it is whole. Raises what the export raises."""
        while self.package is None:
            with suppress(PackageReplaced):
                await self.look()
            if self.package is None:
                await asyncio.sleep(POLL_SECONDS)
        return self.package

    def announcement(self) -> PackageAnnouncement | None:
        """What the host is told once the package is whole."""
        return self.package.announcement() if self.package is not None else None

    async def _wait_for(self, size_bytes: int) -> int:
        """The bytes that are there: `size_bytes` or more, or all of them."""
        while True:
            await self.look()
            here = self._size_bytes()
            if self.package is not None or (here >= size_bytes and self._descriptor >= 0):
                return here
            await asyncio.sleep(POLL_SECONDS)

    def _size_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size if self._descriptor >= 0 else 0

    async def look(self) -> None:
        """See whether it is whole by now, and have it made when nobody does. Raises as `read`."""
        if self.package is not None:
            return
        if self._made is not None and self._made.done():
            made, self._made = self._made, None
            made.result()
        try:
            was_replaced = await asyncio.to_thread(self._follow)
        except OSError as exc:
            raise _named(exc) from exc
        if was_replaced:
            raise PackageReplaced

    def _follow(self) -> bool:
        """Take the finished package, or see that somebody makes it; True when another file is read now."""
        before = self._descriptor
        package = find(self.key) if before >= 0 else find_intact(self.key)
        if package is not None:
            with suppress(FileNotFoundError):  # dropped for newer ones in this very moment
                was_replaced = self._open(package.path) and before >= 0
                self.package = package
                return was_replaced
        if self._made is not None:
            return False
        claimed = claim(self.key)
        if claimed is not None:
            self._make(claimed)
        with suppress(FileNotFoundError):
            return self._open(self.key.part) and before >= 0
        return False

    def _open(self, path: Path) -> bool:
        """Read from the file of this name; False when that is done already."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if self._descriptor >= 0 and os.path.samestat(os.fstat(descriptor), os.fstat(self._descriptor)):
            os.close(descriptor)
            return False
        self._close()
        self._descriptor = descriptor
        return True

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _make(self, claimed: int) -> None:
        self.was_made_here, self._made = True, Future()
        threading.Thread(target=self._write, args=(claimed, self._made), name="export", daemon=True).start()

    def _write(self, claimed: int, made: Future[None]) -> None:
        """The claimed file to its end, or away with it; its lock goes last."""
        try:
            export = self.export()
            with closing(export.blocks) as blocks:
                packed = pack(blocks, self.key.format, claimed, self._stopped)
            name = f"{self.key.name}.{packed.blake3}.{packed.unpacked_bytes}.{export.way}.package"
            self.key.part.rename(self.key.part.with_name(name))
            store.drop_old_packages()
        except BaseException as exc:  # noqa: BLE001 - told to whoever waits
            self.key.part.unlink(missing_ok=True)
            made.set_exception(_named(exc))
        else:
            made.set_result(None)
        finally:
            os.close(claimed)

    def close(self) -> None:
        """Nobody waits here any more: an export that is under way ends by itself."""
        self._stopped.set()
        self._close()


def _named(error: BaseException) -> BaseException:
    if not isinstance(error, OSError):
        return error
    named = ExportFailed(
        f"the image could not be exported to {store.home()}: {error}",
        next_step="See on the control host that GANTRY_HOME can be written (df -h); then deploy again.",
    )
    named.__cause__ = error
    return named


def claim(key: PackageKey) -> int | None:
    """The empty file to write as its descriptor, with its lock; None while another one has it."""
    descriptor = os.open(key.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if store.lock(descriptor) and _is_named(descriptor, key.part):
        if os.fstat(descriptor).st_size == 0 and find(key) is None:
            return descriptor
        key.part.unlink()  # a dead writer's, or one too many: finished a moment ago
    os.close(descriptor)
    return None


def _is_named(descriptor: int, path: Path) -> bool:
    """False when the file was finished, or thrown away, before its lock was ours."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def opened(key: PackageKey, export: Callable[[], Export]) -> Iterator[SharedPackage]:
    """The package for the block; `export` is called in a thread, should it have to be made."""
    shared = SharedPackage(key, export)
    try:
        yield shared
    finally:
        shared.close()
