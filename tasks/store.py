"""Where the control host keeps its files: `$GANTRY_HOME`, by default `~/.gantry`.

Owns the folders, the cache of packages, and the locks between deployments of this host. Imports no Prefect.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

KEPT_PACKAGES = 5
_LOCK_POLL_SECONDS = 0.05
_ABANDONED_SECONDS = 3600


def home() -> Path:
    """The folder, made when it is not there."""
    folder = Path(os.environ.get("GANTRY_HOME") or "~/.gantry").expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def artifacts_dir(workflow_id: str) -> Path:
    """The folder of one workflow's output artifacts, made when it is not there."""
    folder = home() / "artifacts" / workflow_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def packages_dir() -> Path:
    """The folder of exported packages, made when it is not there; raises `OSError`."""
    folder = home() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def touch_package(path: Path) -> None:
    """Count the package as used now; one that is gone is left so."""
    with suppress(FileNotFoundError):
        os.utime(path)


@contextmanager
def package_in_use(path: Path) -> Iterator[None]:
    """Keep the package while it is read; raises FileNotFoundError when it is gone already."""
    with path.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def drop_old_packages() -> None:
    """Drop the packages that are neither among the last ones used nor in use, and what dead exports left."""
    folder = packages_dir()
    newest_first = sorted(folder.glob("*.package"), key=_changed_at, reverse=True)
    abandoned = [part for part in folder.glob("*.part") if _is_abandoned(part)]
    # Packages as they were named before they were compressed count as dropped.
    for path in (*newest_first[KEPT_PACKAGES:], *abandoned, *folder.glob("*.tar")):
        _drop_unless_in_use(path)


def _is_abandoned(part: Path) -> bool:
    return 0 < _changed_at(part) < time.time() - _ABANDONED_SECONDS


def _changed_at(path: Path) -> float:
    """0 for a file that another deployment has just dropped."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0


def _drop_unless_in_use(path: Path) -> None:
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


@asynccontextmanager
async def alone(name: str, say: Callable[[str], None]) -> AsyncIterator[None]:
    """Hold this host's lock `name`, waiting for it; the kernel frees it when its process dies."""
    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as stream:
        told = False
        while not lock(stream.fileno()):
            if not told:
                say(f"another deployment is at work on {name}: waiting for it")
            told = True
            await asyncio.sleep(_LOCK_POLL_SECONDS)
        yield


def lock(descriptor: int) -> bool:
    """Take the file's lock; False when another one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
