"""Gives a package to the engine while it arrives: it has unpacked most of it when the last byte is verified.

The engine keeps nothing of an archive without its end, and it gets the end only once the deployment is READY
and the bytes that went to the engine have the announced BLAKE3. The image gets no name; the deployment's own
step names it, or loads the package where this did not succeed. `<deployment_id>.ahead` in the package folder
is locked while the engine is fed, and tells afterwards that an image may have been left.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import suppress
from pathlib import Path

from blake3 import blake3
from docker.errors import APIError

from receiver import disk
from receiver.archive import ArchivedImage, PackageReader, format_of, package_limit_bytes, rebuilt
from receiver.contract import HostState, ImageAnnouncement, Transport
from receiver.engine import Engine
from receiver.ledger import DeploymentUnknown, Entry, Ledger

log = logging.getLogger(__name__)
AT_ONCE = 2
STALL_SECONDS = 60.0
SPARED_SECONDS = 60.0
WAIT_SECONDS = 60.0
_WAIT_BYTES_PER_SECOND = 50_000_000
_POLL_SECONDS = 0.05
_DRAIN_BYTES = 1024 * 1024


class PreloadEnded(Exception):
    """The package goes to the engine no more"""


class Preloads:
    """Those of one daemon, each in a thread of its own. Nothing that goes wrong here fails a deployment."""

    def __init__(self, folder: Path, ledger: Ledger, from_bytes: int) -> None:
        self._folder = folder
        self._ledger = ledger
        self._from_bytes = from_bytes
        self._places = threading.BoundedSemaphore(AT_ONCE)
        self._seen: set[str] = set()
        self._spared: dict[str, float] = {}

    def spare(self, image: ImageAnnouncement) -> None:
        """Let nothing of an image be removed for a while: a deployment is told now what of it is here."""
        self._spared.update(dict.fromkeys(image.layers, time.monotonic()))

    def is_due(self, deployment_id: str, held_bytes: int) -> bool:
        """True once for a package that is large enough, with 0 for none. Reads nothing."""
        if deployment_id in self._seen or not 0 < self._from_bytes <= held_bytes:
            return False
        self._seen.add(deployment_id)
        return True

    def begin(self, deployment_id: str, part: Path, engine: Engine) -> threading.Thread | None:
        """Feed the engine with what arrives, from now on; None where that is not possible. Blocking."""
        entry = self._ledger.get(deployment_id)
        comes_by_http = entry.state is HostState.RECEIVING and entry.request.transport is Transport.HTTP
        if not comes_by_http or entry.request.image is None or engine.store().is_containerd:
            return None
        if not _has_room(entry.request.image, engine) or not self._places.acquire(blocking=False):
            return None
        try:
            return self._started(entry, part, engine)
        except BaseException:
            self._places.release()
            raise

    def _started(self, entry: Entry, part: Path, engine: Engine) -> threading.Thread:
        descriptor = _locked(_marker(self._folder, entry.deployment_id))
        work = threading.Thread(
            target=self._feed, args=(entry, part, engine, descriptor), name="preload", daemon=True
        )
        try:
            work.start()
        except BaseException:
            os.close(descriptor)
            raise
        return work

    def _feed(self, entry: Entry, part: Path, engine: Engine, descriptor: int) -> None:
        began, is_whole = time.monotonic(), threading.Event()
        try:
            archive = _archive(entry, part, self._ledger, is_whole)
            try:
                engine.load_nameless(archive)
            finally:
                archive.close()
        except Exception as exc:  # noqa: BLE001 - the deployment's own step loads it then, or tells why not
            log.info("not loaded ahead: %s", exc, extra={"deployment_id": entry.deployment_id})
            if not is_whole.is_set():  # else the engine may have kept it all the same
                _marker(self._folder, entry.deployment_id).unlink(missing_ok=True)
        else:
            seconds = time.monotonic() - began
            log.info("loaded ahead in %.1f s", seconds, extra={"deployment_id": entry.deployment_id})
        finally:
            self._places.release()
            os.close(descriptor)

    def left(self) -> dict[str, ImageAnnouncement | None]:
        """Deployments that may have left an image, and which; those that died with a daemon, too."""
        self._seen.difference_update([seen for seen in list(self._seen) if _is_past(self._entry(seen))])
        since = time.monotonic() - SPARED_SECONDS
        for layer in [layer for layer, at in list(self._spared.items()) if at <= since]:
            self._spared.pop(layer, None)
        found: dict[str, ImageAnnouncement | None] = {}
        for marker in self._folder.glob("*.ahead"):
            entry = self._entry(marker.stem)
            if _is_past(entry) and not _is_locked(marker):
                found[marker.stem] = entry.request.image if entry else None
        return found

    def clear(self, left: Mapping[str, ImageAnnouncement | None], engine: Engine) -> None:
        """Remove the images that no deployment has named, nor counts on. Blocking."""
        for deployment_id, image in left.items():
            if image is not None and self._is_awaited(image):
                continue
            try:
                if image is not None:
                    engine.remove_nameless_image(image.config_digest)
            except APIError as exc:
                log.warning(
                    "an image that nobody needs stays: %s", exc, extra={"deployment_id": deployment_id}
                )
            else:
                _marker(self._folder, deployment_id).unlink(missing_ok=True)

    def _is_awaited(self, image: ImageAnnouncement) -> bool:
        """Whether another deployment was told that layers of it are here."""
        spared = set(self._spared)
        waiting = self._ledger.in_states(HostState.RECEIVING, HostState.READY, HostState.PREPARED)
        for entry in waiting:
            spared |= set(entry.request.image.layers if entry.request.image else ())
        return not spared.isdisjoint(image.layers)

    def _entry(self, deployment_id: str) -> Entry | None:
        with suppress(DeploymentUnknown):
            return self._ledger.get(deployment_id)
        return None


def wait_until_fed(folder: Path, entry: Entry) -> None:
    """Return when the engine is not given this package any more, or at once where it never was.

    Not for ever: a daemon that stands still must not hold up the deployment.
    """
    size_bytes = entry.request.image.size_bytes if entry.request.image else 0
    deadline = time.monotonic() + WAIT_SECONDS + size_bytes / _WAIT_BYTES_PER_SECOND
    while _is_locked(_marker(folder, entry.deployment_id)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _is_past(entry: Entry | None) -> bool:
    """True once a deployment has named the image, or will not."""
    return entry is None or entry.state not in {HostState.RECEIVING, HostState.READY}


def _has_room(image: ImageAnnouncement, engine: Engine) -> bool:
    """Asked here, too: a package is fed before its announcement has been compared with the engine's disk."""
    try:
        disk.check_room([disk.Need(Path(engine.store().data_root), image.size_bytes, "the loaded image")])
    except disk.RoomMissing as exc:
        log.info("not loaded ahead: %s", exc)
        return False
    return True


def _marker(folder: Path, deployment_id: str) -> Path:
    return folder / f"{deployment_id}.ahead"


def _locked(marker: Path) -> int:
    descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_locked(marker: Path) -> bool:
    try:
        with marker.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _archive(entry: Entry, part: Path, ledger: Ledger, is_whole: threading.Event) -> Generator[bytes]:
    """The archive in a package that arrives; its end only when it is the verified one, which is told then."""
    image = entry.request.image
    if image is None:
        raise PreloadEnded("its image was not announced")

    def check(archived: ArchivedImage) -> None:
        arriving.drain()
        now = ledger.get(entry.deployment_id)
        if now.package is None or now.package.blake3 != arriving.hexdigest():
            raise PreloadEnded("what the engine got is not the verified package")
        if now.package.format not in {None, format_of(os.pread(file.fileno(), 4, 0))}:
            raise PreloadEnded(f"it was announced as {now.package.format}")
        archived.check(image.config_digest, image.layers, now.package.omitted_layers)
        is_whole.set()

    with part.open("rb") as file:
        arriving = _Arriving(file.fileno(), entry, ledger)
        reader = PackageReader(arriving, None, package_limit_bytes(image, 0))
        yield from rebuilt(reader, check, nameless=True)


class _Arriving:
    """The file of a package as its bytes come: `read` waits for more, and ends with the verified whole."""

    def __init__(self, descriptor: int, entry: Entry, ledger: Ledger) -> None:
        self._descriptor = descriptor
        self._deployment_id = entry.deployment_id
        self._ledger = ledger
        # What is here already is not asked for: bytes dropped before the first read would not be missed.
        self._readable_bytes = entry.upload_offset
        self._position = self._hashed_bytes = 0
        self._hasher = blake3()

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end; raises `PreloadEnded`."""
        if self._position >= self._readable_bytes and not self._has_more():
            return b""
        wanted = min(size, self._readable_bytes - self._position)
        block = os.pread(self._descriptor, wanted, self._position)
        if not block:
            raise PreloadEnded("its bytes are gone")
        fresh = block[self._hashed_bytes - self._position :]  # its beginning is read twice
        self._hasher.update(fresh)
        self._hashed_bytes += len(fresh)
        self._position += len(block)
        return block

    def seek(self, offset: int, /) -> None:
        """Go on from there."""
        self._position = offset

    def drain(self) -> None:
        """Read what follows the archive."""
        while self.read(_DRAIN_BYTES):
            pass

    def hexdigest(self) -> str:
        """BLAKE3 of what was read."""
        return str(self._hasher.hexdigest())

    def _has_more(self) -> bool:
        deadline = time.monotonic() + STALL_SECONDS
        while time.monotonic() < deadline:
            entry = self._ledger.get(self._deployment_id)
            is_whole = entry.state is HostState.READY and entry.package is not None
            if not is_whole and entry.state is not HostState.RECEIVING:
                raise PreloadEnded(f"the deployment is {entry.state}")
            held = entry.package.size_bytes if is_whole and entry.package else entry.upload_offset
            if held < self._position:
                raise PreloadEnded("its bytes were dropped")
            self._readable_bytes = held
            if held > self._position or is_whole:
                return held > self._position
            time.sleep(_POLL_SECONDS)
        raise PreloadEnded(f"nothing came for {STALL_SECONDS:.0f} s")
