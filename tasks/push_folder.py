"""Where one push keeps what it receives: a folder below `$GANTRY_HOME/pushes`, gone when the push ends.

A process that was killed leaves its folder, and a name in the engine; the next push takes both away.
Imports no Prefect and no Docker.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks import store

_LOCK, _NAME = "lock", "name"


@contextmanager
def push_folder(remove_name: Callable[[str], None]) -> Iterator[Path]:
    """An empty folder of this push's own; `remove_name` takes names away that dead pushes left."""
    parent = store.home() / "pushes"
    parent.mkdir(mode=0o700, exist_ok=True)
    with _alone(parent):
        for left in (each for each in parent.iterdir() if each.is_dir()):
            _sweep(left, remove_name)
        folder = Path(tempfile.mkdtemp(dir=parent))
        lock = (folder / _LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def note_name(folder: Path, name: str) -> None:
    """Write down a name before it is given to the image, so that it can be taken away."""
    (folder / _NAME).write_text(name)


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    with (parent / _LOCK).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path, remove_name: Callable[[str], None]) -> None:
    """Remove what a dead push left; its lock is free."""
    with suppress(FileNotFoundError, BlockingIOError), (folder / _LOCK).open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            remove_name((folder / _NAME).read_text())
        shutil.rmtree(folder, ignore_errors=True)
