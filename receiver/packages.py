"""Packages on disk: take them in chunks, resume, verify the whole, hand them to the operations, clear up.

Owns the files in `packages_dir`: `<deployment_id>.part` while it arrives, `<deployment_id>.tar` once its
BLAKE3 matched. It is hashed while it arrives, also before it is announced; only after a restart of the
daemon what is held is read again. The ledger's offset never runs ahead of the disk. What rsync brought is
copied out of `receiver.incoming`, and only the copy, which nobody else can write, is verified. Imports no
Docker client and knows no request: its errors are the refusals that the application tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from blake3 import blake3

from receiver import disk, incoming
from receiver.contract import UPLOAD_OFFSET_HEADER, ErrorCode, HostState, PackageAnnouncement, Transport
from receiver.incoming import Incoming
from receiver.ledger import DeploymentUnknown, Entry, Ledger, StateConflict, utc_now
from receiver.problems import Refusal
from receiver.settings import ReceiverSettings

log = logging.getLogger(__name__)
IDLE_LIMIT = timedelta(hours=24)
ORPHANED_AFTER = timedelta(seconds=5)
_READ_BYTES = 1024 * 1024
_ENDED_WITHOUT_PACKAGE = frozenset({HostState.ABORTED, HostState.REJECTED})

Bytes = bytes | bytearray
TURN_SECONDS = 10.0
"""How long a chunk waits while the one before it is written."""
ARRIVAL_SECONDS = 0.5
"""How long it waits for that one to be taken: a short one may be here sooner than the one before."""


class OffsetRefused(Refusal):
    """The chunk does not begin where the package ends"""

    slug, status = "wrong-offset", 409
    next_step = "Go on from the Upload-Offset that this answer gives."

    def __init__(self, right_offset: int, detail: str | None = None) -> None:
        super().__init__(
            detail or f"the host holds {right_offset} bytes of the package; send on from there",
            headers={UPLOAD_OFFSET_HEADER: str(right_offset)},
            upload_offset=right_offset,
        )
        self.right_offset = right_offset


class UploadBusy(OffsetRefused):
    """Another chunk of this package is being written"""

    slug = "upload-busy"
    next_step = "Send one chunk after another; ask for the offset by HEAD, then go on."


class BeingCollected(Refusal):
    """The package is being taken over"""

    slug, status = "being-collected", 503
    next_step = "Send the same request again in a moment."


class NotReceiving(Refusal):
    """The deployment takes no package now"""

    slug, status = "not-receiving", 409
    next_step = "Ask for the deployment's status; announce a new deployment when this one has ended."


class PackageUnannounced(NotReceiving):
    """The package was not announced"""

    slug = "package-not-announced"
    next_step = "Announce its size and BLAKE3 by POST to the path of the package."


class OmittedLayersUnknown(Refusal):
    """The package leaves out layers that this host's engine does not have"""

    slug, status = "omitted-layers-unknown", 409
    next_step = "Deploy again: the package is made with the layers that are missing."


class AnnouncementConflict(Refusal):
    """Another package was announced for this deployment"""

    slug, status = "announcement-conflict", 409
    next_step = "Upload the package that was announced, or announce a new deployment."


class PackageTooLarge(Refusal):
    """The package is larger than this host takes"""

    slug, status = "package-too-large", 413
    next_step = "Make the image smaller, or raise HOOK_RECEIVER_MAX_PACKAGE_BYTES on the host."


class BeyondTheEnd(Refusal):
    """The chunk reaches past the announced size"""

    slug, status = "beyond-announced-size", 413
    next_step = "Announce the package that you send: it is larger than announced."


class PackageMismatch(Refusal):
    """The package is not the announced one"""

    slug, status = "package-digest-mismatch", 422
    next_step = "The bytes are gone from the host; announce a new deployment and upload again."


class DiskFull(Refusal):
    """The host has no room for the package"""

    slug, status = "insufficient-storage", 507
    next_step = "Free disk space on the host (docker image prune), then send the request again."


class Packages:
    """The package store. Methods that wait leave the event loop by themselves; the rest is blocking."""

    def __init__(self, settings: ReceiverSettings, ledger: Ledger) -> None:
        self._folder = settings.packages_dir
        self._incoming = Incoming(settings.incoming_dir)
        self._max_bytes = settings.max_package_bytes
        self._ledger = ledger
        self._turn = threading.Condition()
        self._writing: set[str] = set()
        self._hashers: dict[str, _Hashed] = {}

    def path(self, deployment_id: str) -> Path:
        """Where the verified package lies, or will lie."""
        return self._folder / f"{deployment_id}.tar"

    def part(self, deployment_id: str) -> Path:
        """Where it lies while it arrives."""
        return self._folder / f"{deployment_id}.part"

    def discard(self, deployment_id: str) -> None:
        """Delete whatever there is of a package."""
        self._hashers.pop(deployment_id, None)
        self.part(deployment_id).unlink(missing_ok=True)
        self.path(deployment_id).unlink(missing_ok=True)
        self._incoming.discard(deployment_id)

    def check_room(
        self, package: PackageAnnouncement, *also: disk.Need, transport: Transport = Transport.HTTP
    ) -> None:
        """Raise `PackageTooLarge` or `DiskFull` when the host cannot take the package, and what follows."""
        self._check_size(package)
        needs = [disk.Need(self._folder, package.size_bytes, "the package"), *also]
        if transport is Transport.RSYNC:
            needs.append(
                disk.Need(self._incoming.folder, package.size_bytes, "the package as rsync brings it")
            )
        _ask_for_room(needs)

    def _check_size(self, package: PackageAnnouncement) -> None:
        if package.size_bytes > self._max_bytes:
            raise PackageTooLarge(f"{package.size_bytes} bytes announced, {self._max_bytes} are allowed")

    def check_room_for(self, needs: list[disk.Need]) -> None:
        """Raise `DiskFull` when the host has no room for what follows a package."""
        _ask_for_room(needs)

    async def open_incoming(self, entry: Entry) -> Path | None:
        """Where rsync may put the package; None when it is not to come that way. Raises `DiskFull`."""
        if entry.request.transport is not Transport.RSYNC or entry.state is not HostState.RECEIVING:
            return None
        with _disk_errors():
            return await asyncio.to_thread(self._incoming.prepare, entry.deployment_id)

    async def collect(self, deployment_id: str) -> int:
        """Copy what rsync brought, verify the copy, and return its bytes; 0 when that was done before.

        The deployment becomes READY, or REJECTED and `PackageMismatch` is raised. Raises
        `BeingCollected`, `PackageIncomplete`, `ForeignFile`, `NotReceiving`, `PackageUnannounced` and
        `DiskFull`; each leaves what has arrived as it was.
        """
        return await asyncio.to_thread(self._collect, deployment_id)

    async def announce(self, deployment_id: str, package: PackageAnnouncement) -> Entry:
        """Take a late announcement; the same one again changes nothing.

        A package that has arrived as a whole is verified: the deployment becomes READY, or REJECTED and
        `PackageMismatch` is raised.
        """
        return await asyncio.to_thread(self._announce, deployment_id, package)

    async def held_digest(self, deployment_id: str) -> str | None:
        """BLAKE3 of the bytes that the host holds, by which a sender knows them for its own.

        None while more of them are being written.
        """
        return await asyncio.to_thread(self._held_digest, deployment_id)

    async def drop(self, deployment_id: str) -> None:
        """Forget the bytes that came, so that the upload begins anew; refused once the package is taken."""
        await asyncio.to_thread(self._drop, deployment_id)

    async def adopt(self, entry: Entry) -> Entry:
        """Let a new deployment go on with what a dead sender left, or drop that if it is of no use."""
        return await asyncio.to_thread(self._adopt, entry)

    async def append(self, deployment_id: str, offset: int, chunk: Bytes) -> int:
        """Write a chunk at `offset` and return the new offset, once both are safe on disk.

        The chunk that completes the package has it verified: the deployment becomes READY, or REJECTED
        and `PackageMismatch` is raised. Raises `OffsetRefused`, `UploadBusy`, `NotReceiving`,
        `PackageUnannounced`, `BeyondTheEnd` and `DiskFull`; each leaves the offset as it was.
        """
        return await asyncio.to_thread(self._append, deployment_id, offset, chunk)

    async def sweep(self, now: datetime | None = None) -> int:
        """End uploads that nobody goes on with, delete files that nobody needs; return their number."""
        return await asyncio.to_thread(self._sweep, now or utc_now())

    # -- one package -----------------------------------------------------------------------------

    def _announce(self, deployment_id: str, package: PackageAnnouncement) -> Entry:
        with self._only_writer(deployment_id):
            entry = self._ledger.get(deployment_id)
            if entry.package == package:
                return entry
            if entry.package is not None:
                raise AnnouncementConflict(
                    f"{entry.package.size_bytes} bytes with BLAKE3 {entry.package.blake3} are announced"
                )
            if entry.state is not HostState.RECEIVING:
                raise NotReceiving(f"deployment {deployment_id} is {entry.state}")
            self._check_size(package)
            rest = package.model_copy(update={"size_bytes": max(package.size_bytes - entry.upload_offset, 0)})
            self.check_room(rest, transport=entry.request.transport)
            entry = self._ledger.set_package(deployment_id, package)
            if entry.upload_offset >= package.size_bytes:
                with self._opened(entry) as descriptor:
                    self._complete(entry, package, descriptor)
        return self._take_up(self._ledger.get(deployment_id))

    def _held_digest(self, deployment_id: str) -> str | None:
        with contextlib.suppress(UploadBusy), self._only_writer(deployment_id):
            entry = self._ledger.get(deployment_id)
            if entry.state is not HostState.RECEIVING:
                return announced(entry).blake3
            if not entry.upload_offset:
                return _Hashed().hexdigest()
            with self._opened(entry) as descriptor:
                return self._hashed(entry, descriptor).hexdigest()
        return None

    def _drop(self, deployment_id: str) -> None:
        with self._only_writer(deployment_id):
            entry = self._ledger.get(deployment_id)
            if entry.state is not HostState.RECEIVING:
                raise NotReceiving(f"deployment {deployment_id} is {entry.state}")
            self._ledger.set_upload_offset(deployment_id, 0)
            self.discard(deployment_id)

    def _adopt(self, entry: Entry) -> Entry:
        adopted = self._take_up(entry)
        for other in self._ledger.in_states(HostState.RECEIVING):
            is_earlier = other.deployment_id != entry.deployment_id and other.created_at < entry.created_at
            if is_earlier and other.request.container_name == entry.request.container_name:
                self._supersede(other)
        return adopted

    def _supersede(self, other: Entry) -> None:
        """Give up what a dead sender left of this container: its room is not held for a day.

        Bytes of the same image that were never announced are not lost: the new sender has them proven.
        """
        if not self._is_silent(other):
            return
        with contextlib.suppress(StateConflict, UploadBusy), self._only_writer(other.deployment_id):
            if self._ledger.get(other.deployment_id).state is not HostState.RECEIVING:
                return
            self._ledger.move(other.deployment_id, HostState.ABORTED, error_message="superseded")
            self.discard(other.deployment_id)

    def _take_up(self, entry: Entry) -> Entry:
        if entry.state is not HostState.RECEIVING or entry.upload_offset:
            return entry
        others = self._ledger.in_states(HostState.RECEIVING)
        alike = [other for other in others if _is_alike(other, entry) and self._is_silent(other)]
        if entry.request.transport is Transport.RSYNC:
            self._take_incoming(alike, entry.deployment_id)
            return entry
        orphans = [other for other in alike if other.upload_offset]
        for orphan in sorted(orphans, key=lambda other: other.upload_offset, reverse=True)[:1]:
            with contextlib.suppress(UploadBusy, FileNotFoundError):
                self._take_over(orphan, entry.deployment_id)
        return self._ledger.get(entry.deployment_id)

    def _take_over(self, orphan: Entry, deployment_id: str) -> None:
        """The file first: an offset without its file is put right by the next chunk, not the reverse."""
        with self._only_writer(orphan.deployment_id), self._only_writer(deployment_id):
            self._hashers.pop(orphan.deployment_id, None)
            self.part(orphan.deployment_id).rename(self.part(deployment_id))
            self._ledger.set_upload_offset(deployment_id, orphan.upload_offset)
            self._ledger.set_upload_offset(orphan.deployment_id, 0)

    def _take_incoming(self, orphans: list[Entry], deployment_id: str) -> None:
        """Of several files the one that was written last."""
        written = {
            other.deployment_id: self._incoming.last_write(other.deployment_id)
            for other in orphans
            if other.deployment_id != deployment_id
        }
        last = max(((at, orphan) for orphan, at in written.items() if at), default=None)
        if last:
            with (
                contextlib.suppress(UploadBusy, FileNotFoundError),
                self._only_writer(last[1]),
                _disk_errors(),
            ):
                self._incoming.hand_over(last[1], deployment_id)

    def _is_silent(self, entry: Entry) -> bool:
        """No byte came for a while, on either way."""
        return utc_now() - self._last_heard(entry) >= ORPHANED_AFTER

    def _last_heard(self, entry: Entry) -> datetime:
        return max(entry.updated_at, self._incoming.last_write(entry.deployment_id) or entry.updated_at)

    def _collect(self, deployment_id: str) -> int:
        try:
            with self._only_writer(deployment_id):
                return self._take_copy(self._ledger.get(deployment_id))
        except UploadBusy as exc:
            raise BeingCollected(headers={"Retry-After": "5"}) from exc

    def _take_copy(self, entry: Entry) -> int:
        package, deployment_id = announced(entry), entry.deployment_id
        if entry.state is not HostState.RECEIVING:
            return 0
        with self._incoming.opened(deployment_id) as theirs:
            _ask_for_room([disk.Need(self._folder, package.size_bytes, "the package")])
            if entry.upload_offset:
                self._ledger.set_upload_offset(deployment_id, 0)
            with self._opened(entry) as own:
                with _disk_errors():
                    incoming.copy(theirs, own, package.size_bytes)
                self._hashers.pop(deployment_id, None)
                self._complete(entry, package, own)
        self._ledger.set_upload_offset(deployment_id, package.size_bytes)
        self._incoming.discard(deployment_id)
        return package.size_bytes

    def _append(self, deployment_id: str, offset: int, chunk: Bytes) -> int:
        with self._only_writer(deployment_id, offset):
            entry, end = self._ledger.get(deployment_id), offset + len(chunk)
            held = held_bytes(entry)
            if entry.state is not HostState.RECEIVING:
                raise OffsetRefused(held)
            with self._opened(entry) as descriptor:
                self._check_offset(entry, offset, os.fstat(descriptor).st_size)
                self._check_end(entry, end, len(chunk))
                hashed = self._hashed(entry, descriptor)
                _write(descriptor, offset, chunk)
                hashed.update(chunk)
                if entry.package is not None and end == entry.package.size_bytes:
                    self._complete(entry, entry.package, descriptor)
            # Last, so that a process that died before has its last chunk sent again, which completes it.
            self._ledger.set_upload_offset(deployment_id, end)
            return end

    @contextmanager
    def _only_writer(self, deployment_id: str, offset: int = 0) -> Iterator[None]:
        """One writer per deployment; one daemon per state folder is `__main__`'s care.

        A chunk further on may be the next one, sent before this one is written: it waits for its turn.
        """
        with self._turn:
            if offset > self._held_bytes(deployment_id):
                self._turn.wait_for(lambda: self._has_begun(deployment_id, offset), ARRIVAL_SECONDS)
                self._turn.wait_for(lambda: deployment_id not in self._writing, TURN_SECONDS)
            if deployment_id in self._writing:
                raise UploadBusy(self._held_bytes(deployment_id))
            self._writing.add(deployment_id)
            self._turn.notify_all()
        try:
            yield
        finally:
            with self._turn:
                self._writing.discard(deployment_id)
                self._turn.notify_all()

    def _has_begun(self, deployment_id: str, offset: int) -> bool:
        """Whether the bytes before `offset` are written, or are being written."""
        return deployment_id in self._writing or offset <= self._held_bytes(deployment_id)

    def _held_bytes(self, deployment_id: str) -> int:
        return self._ledger.get(deployment_id).upload_offset

    @contextmanager
    def _opened(self, entry: Entry) -> Iterator[int]:
        part, whole = self.part(entry.deployment_id), self.path(entry.deployment_id)
        with _disk_errors():
            if whole.exists():  # died between renaming and READY
                whole.rename(part)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if entry.upload_offset == 0:
                    _sync_folder(self._folder)
                yield descriptor
            finally:
                os.close(descriptor)

    def _check_offset(self, entry: Entry, offset: int, size_bytes: int) -> None:
        """The ledger's offset is the right one, unless the file lost bytes (deleted, or a torn disk)."""
        if size_bytes < entry.upload_offset:
            self._ledger.set_upload_offset(entry.deployment_id, size_bytes)
        right_offset = min(size_bytes, entry.upload_offset)
        if offset != right_offset:
            raise OffsetRefused(right_offset)

    def _check_end(self, entry: Entry, end: int, chunk_bytes: int) -> None:
        """Not past what was announced; before that, not past what the host takes and its disk has."""
        if entry.package is not None:
            announced_bytes = entry.package.size_bytes
            if end > announced_bytes:
                raise BeyondTheEnd(f"the chunk ends at {end}, {announced_bytes} bytes were announced")
        elif end > self._max_bytes:
            raise PackageTooLarge(f"the chunk ends at {end}, {self._max_bytes} bytes are allowed")
        else:
            _ask_for_room([disk.Need(self._folder, chunk_bytes, "the next part of the package")])

    def _hashed(self, entry: Entry, descriptor: int) -> _Hashed:
        """What came so far as a running hash; read from the file where this process does not know it."""
        hashed = self._hashers.get(entry.deployment_id)
        held = min(os.fstat(descriptor).st_size, entry.upload_offset)
        if hashed is None or hashed.size_bytes != held:
            hashed = self._hashers[entry.deployment_id] = _hash(descriptor, held)
        return hashed

    def _complete(self, entry: Entry, package: PackageAnnouncement, descriptor: int) -> None:
        """Verify the whole; the deployment is READY only when it is the announced one."""
        deployment_id, hashed = entry.deployment_id, self._hashers.get(entry.deployment_id)
        size_bytes = os.fstat(descriptor).st_size
        if hashed is None or hashed.size_bytes != size_bytes:
            hashed = _hash(descriptor, size_bytes)
        digest = hashed.hexdigest()
        self._hashers.pop(deployment_id, None)
        if digest != package.blake3:
            self.discard(deployment_id)
            mismatch = PackageMismatch(f"the package's BLAKE3 is {digest}, announced was {package.blake3}")
            self._ledger.move(
                deployment_id,
                HostState.REJECTED,
                error_code=ErrorCode.TRANSFER_FAILED,
                error_message=str(mismatch),
            )
            raise mismatch
        try:
            self.part(deployment_id).rename(self.path(deployment_id))
        except FileNotFoundError as exc:
            raise NotReceiving(f"deployment {deployment_id} was ended while its package arrived") from exc
        _sync_folder(self._folder)
        self._ledger.move(deployment_id, HostState.READY)

    # -- clearing up -----------------------------------------------------------------------------

    def _sweep(self, now: datetime) -> int:
        for entry in self._ledger.in_states(HostState.RECEIVING, HostState.READY):
            if now - self._last_heard(entry) > IDLE_LIMIT:
                self._give_up(entry)
        unneeded = [file for file in self._folder.iterdir() if self._is_unneeded(file)]
        for file in unneeded:
            file.unlink(missing_ok=True)
        for deployment_id in [known for known in list(self._hashers) if not self._is_awaited(known)]:
            self._hashers.pop(deployment_id, None)
        left = [found for found in self._incoming.deployments() if not self._is_awaited(found)]
        for deployment_id in left:
            self._incoming.discard(deployment_id)
        return len(unneeded) + len(left)

    def _give_up(self, entry: Entry) -> None:
        text = f"nothing happened for {IDLE_LIMIT.total_seconds() / 3600:.0f} h"
        with contextlib.suppress(StateConflict):  # somebody goes on with it after all
            self._ledger.move(
                entry.deployment_id, HostState.ABORTED, error_code=ErrorCode.TIMEOUT, error_message=text
            )
            log.warning("aborted: %s", text, extra={"deployment_id": entry.deployment_id})

    def _is_unneeded(self, file: Path) -> bool:
        if file.suffix not in {".part", ".tar"}:
            return False
        return not self._is_awaited(file.stem, HostState.READY)

    def _is_awaited(self, deployment_id: str, *also: HostState) -> bool:
        try:
            return self._ledger.get(deployment_id).state in {HostState.RECEIVING, *also}
        except DeploymentUnknown:
            return False


class _Hashed:
    """BLAKE3 of the first `size_bytes` of a package."""

    def __init__(self) -> None:
        self._hasher, self.size_bytes = blake3(), 0

    def update(self, chunk: Bytes | memoryview) -> None:
        """Add what follows."""
        self._hasher.update(chunk)
        self.size_bytes += len(chunk)

    def hexdigest(self) -> str:
        """The digest so far."""
        return str(self._hasher.hexdigest())


def announced(entry: Entry) -> PackageAnnouncement:
    """The announced package; raises `NotReceiving` when the deployment was ended, or `PackageUnannounced`."""
    _check_not_ended(entry)
    if entry.package is None:
        raise PackageUnannounced
    return entry.package


def held_bytes(entry: Entry) -> int:
    """Bytes that need not be sent: those that came, or all of them when nothing is to come any more."""
    _check_not_ended(entry)
    return entry.upload_offset if entry.state is HostState.RECEIVING else announced(entry).size_bytes


def _check_not_ended(entry: Entry) -> None:
    if entry.state in _ENDED_WITHOUT_PACKAGE:
        raise NotReceiving(f"deployment {entry.deployment_id} is {entry.state}")


def _is_alike(other: Entry, entry: Entry) -> bool:
    """What is held of the other is of the same package; before that is known, it may be by its image.

    Then the sender has it proven by the digest, or drops it.
    """
    if other.deployment_id == entry.deployment_id:
        return False
    if entry.package is not None:
        return other.package == entry.package
    one, two = entry.request, other.request
    return one.image is not None and (one.image, one.transport) == (two.image, two.transport)


def _write(descriptor: int, offset: int, chunk: Bytes) -> None:
    """Write and sync; what a dead process left behind the offset goes first, and so does a half write."""
    with _disk_errors():
        try:
            os.ftruncate(descriptor, offset)
            rest, position = memoryview(chunk), offset
            while rest:
                written = os.pwrite(descriptor, rest, position)
                rest, position = rest[written:], position + written
            os.fdatasync(descriptor)
        except OSError:
            os.ftruncate(descriptor, offset)
            raise


def _ask_for_room(needs: list[disk.Need]) -> None:
    try:
        disk.check_room(needs)
    except disk.RoomMissing as exc:
        raise DiskFull(str(exc)) from exc


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise DiskFull(f"the host could not keep the package: {exc.strerror or exc}") from exc


def _hash(descriptor: int, size_bytes: int) -> _Hashed:
    """BLAKE3 of the file's beginning, read in pieces: a memory map would count as resident memory."""
    hashed, buffer = _Hashed(), bytearray(_READ_BYTES)
    while count := os.preadv(descriptor, [buffer], hashed.size_bytes):
        hashed.update(memoryview(buffer)[: min(count, size_bytes - hashed.size_bytes)])
        if hashed.size_bytes == size_bytes:
            break
    return hashed


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
