"""A file system of the measurement's own, made anew: with a journal, and past this machine's page cache.

An ext4 without a journal, as virtual machines may have it, takes no inode again that was freed within its
last minutes, but looks at each of them for every new file (`recently_deleted` in the kernel): an engine that
unpacks an image next to ten thousands of files that were just removed takes twice as long, whatever brought
the image. And a file that holds a file system fills the page cache with what was removed in it.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE_BYTES = 60 * 10**9
"""At most; it takes of this machine's disk what is written to it, until it is unmounted."""


@contextmanager
def fresh_disk() -> Iterator[Path]:
    """Where it is mounted. Its short path leaves room for those of Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="gantry-disk-") as told:
        folder = Path(told)
        image, mounted = folder / "image", folder / "disk"
        mounted.mkdir()
        with image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        try:
            _run("mount", device, str(mounted))
        finally:
            _run("losetup", "--detach", device)  # once it is unmounted
        image.unlink()  # its bytes go with the mount, also after a kill
        try:
            yield mounted
        finally:
            _run("umount", str(mounted))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
