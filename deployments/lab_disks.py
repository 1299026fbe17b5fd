"""Disks of a bounded size for the nodes of a lab, which can be filled to the last byte.

A tmpfs, which knows how full it is and outlives the node's power. Imports nothing of ours but the lab's
errors.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

from deployments.lab_processes import LabNotReady

_FILLER = "filler"
_STEP_BYTES = 4096


def mount(folder: Path, size_bytes: int) -> None:
    """Make `folder` a disk of `size_bytes`; raises `LabNotReady` where that cannot be."""
    folder.mkdir(mode=0o711)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=711", "gantry-disk", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabNotReady(" ".join(command), done.stderr.strip())


def fill(folder: Path) -> None:
    """Take every free byte of the disk at `folder`, and leave every other disk alone."""
    if not folder.is_mount():
        raise LabNotReady(f"{folder} is no disk of its own; give the lab disk_bytes")
    handle = os.open(folder / _FILLER, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while (free_bytes := _free_bytes(folder)) >= _STEP_BYTES:
            _extend(handle, free_bytes)
    finally:
        os.close(handle)


def free(folder: Path) -> None:
    """Give back what `fill` took; nothing happens when it took nothing."""
    (folder / _FILLER).unlink(missing_ok=True)


def used_bytes(folder: Path) -> int:
    """Bytes in use on the disk that holds `folder`."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _extend(handle: int, by_bytes: int) -> None:
    """Others take space meanwhile: then half as much is tried, down to nothing."""
    while by_bytes >= _STEP_BYTES:
        try:
            os.posix_fallocate(handle, os.fstat(handle).st_size, by_bytes)
            return
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
        by_bytes //= 2
