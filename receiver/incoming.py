"""Where rsync puts packages: a folder for each deployment, with one file that is foreign until it is copied.

Owns `incoming_dir`. The SSH user may write below a deployment's folder at any moment, links and pipes
too: nothing there is followed, and nothing that was read there once is believed to stay.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from receiver.problems import Refusal

log = logging.getLogger(__name__)
FILE_NAME = "package.tar"
_COPY_BYTES = 8 * 1024 * 1024
_DEPLOYMENT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class PackageIncomplete(Refusal):
    """The package has not arrived as a whole"""

    slug, status = "package-incomplete", 409
    next_step = "Send the file by rsync to the incoming_path of the announcement, to its end; then collect."


class ForeignFile(Refusal):
    """What lies in the place of the package is no file that can be taken"""

    slug, status = "foreign-file", 422
    next_step = (
        "Put a plain file there that the receiver's user may read: no link, no pipe. When the SSH user is "
        "another one, share HOOK_RECEIVER_INCOMING_DIR with it by a group."
    )


class Incoming:
    """The incoming folder. All methods are blocking."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, deployment_id: str) -> Path:
        """Where the package of a deployment may be put."""
        return self.folder / deployment_id / FILE_NAME

    def prepare(self, deployment_id: str) -> Path:
        """Make the deployment's folder and return the path for its package; raises `OSError`.

        A group that may enter the incoming folder may write in this one.
        """
        path = self.path(deployment_id)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if self.folder.stat().st_mode & stat.S_IXGRP:
            path.parent.chmod(0o2770)
        return path

    def last_write(self, deployment_id: str) -> datetime | None:
        """When the file was written last, by a clock that its writer cannot set; None without a file."""
        try:
            return datetime.fromtimestamp(self.path(deployment_id).lstat().st_ctime, UTC)
        except OSError:
            return None

    def hand_over(self, from_id: str, to_id: str) -> None:
        """Let another deployment go on with the file; raises `OSError`."""
        self.path(from_id).rename(self.prepare(to_id))

    @contextmanager
    def opened(self, deployment_id: str) -> Iterator[int]:
        """The file for reading; raises `PackageIncomplete` or `ForeignFile`."""
        path, flags = self.path(deployment_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError as exc:
            raise PackageIncomplete("no byte of the package has arrived") from exc
        except OSError as exc:
            raise ForeignFile(f"{path} cannot be opened: {exc.strerror}") from exc
        try:
            _check_plain(descriptor, path)
            yield descriptor
        finally:
            os.close(descriptor)

    def discard(self, deployment_id: str) -> None:
        """Delete the deployment's folder; what cannot be deleted is told, and left to the next sweep."""
        try:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.folder / deployment_id)
        except OSError as exc:
            log.warning("%s cannot be deleted: %s", exc.filename, exc.strerror)

    def deployments(self) -> list[str]:
        """Ids that have a folder; what else lies here is none of ours."""
        with os.scandir(self.folder) as found:
            return [
                item.name
                for item in found
                if _DEPLOYMENT_ID.fullmatch(item.name) and item.is_dir(follow_symlinks=False)
            ]


def copy(source: int, target: int, size_bytes: int) -> None:
    """Replace the target by exactly `size_bytes` of the source, within the kernel, and sync.

    Raises `PackageIncomplete` for a source of another size, `OSError` for a full disk; the target is
    empty then.
    """
    os.ftruncate(target, 0)
    _check_size(os.fstat(source).st_size, size_bytes)
    position = 0
    try:
        while position < size_bytes:
            count = os.sendfile(target, source, position, min(size_bytes - position, _COPY_BYTES))
            if not count:
                _check_size(position, size_bytes)
            position += count
        os.fdatasync(target)
    except BaseException:
        os.ftruncate(target, 0)
        raise


def _check_size(size_bytes: int, announced_bytes: int) -> None:
    if size_bytes != announced_bytes:
        raise PackageIncomplete(f"{size_bytes} bytes have arrived, {announced_bytes} were announced")


def _check_plain(descriptor: int, path: Path) -> None:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise ForeignFile(f"{path} is no plain file with one name")
