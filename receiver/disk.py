"""Room on the host's disks: asked before a deployment needs it, and a reserve for when it is gone anyway."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RESERVE_BYTES = 64 * 1024 * 1024
SWITCH_RESERVE_BYTES = 16 * 1024 * 1024
BALLAST_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Need:
    """Bytes that will be written below a folder, and what for."""

    folder: Path
    size_bytes: int
    purpose: str


class RoomMissing(Exception):
    """A disk of the host has no room for what is asked of it"""


def check_room(needs: Iterable[Need], reserve_bytes: int = RESERVE_BYTES) -> None:
    """Raise `RoomMissing` unless each disk has room for all that goes there, and `reserve_bytes` more.

    A folder that cannot be seen from here (the engine's, when that is elsewhere) is not asked.
    """
    by_disk: dict[int, list[Need]] = {}
    for need in needs:
        with contextlib.suppress(OSError):
            by_disk.setdefault(need.folder.stat().st_dev, []).append(need)
    for together in by_disk.values():
        _check_disk(together, reserve_bytes)


def _check_disk(needs: list[Need], reserve_bytes: int) -> None:
    disk = os.statvfs(needs[0].folder)
    free_bytes, wanted_bytes = disk.f_bavail * disk.f_frsize, sum(need.size_bytes for need in needs)
    if wanted_bytes + reserve_bytes > free_bytes:
        what = " and ".join(f"{need.size_bytes} bytes for {need.purpose}" for need in needs)
        raise RoomMissing(
            f"{needs[0].folder} has {free_bytes} bytes free; needed are {what}, "
            f"and {reserve_bytes} are kept in reserve"
        )


class Ballast:
    """A file of no use but to be deleted when the disk is full, so that a rollback can be written down."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lay(self) -> None:
        """Lay it down where there is room enough; harmless when it is there."""
        with contextlib.suppress(OSError):
            disk = os.statvfs(self._path.parent)
            if self._path.exists() or disk.f_bavail * disk.f_frsize < RESERVE_BYTES + BALLAST_BYTES:
                return
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)

    def drop(self) -> None:
        """Give its room to what is more urgent."""
        with contextlib.suppress(OSError):
            self._path.unlink()
