"""Control groups of a lab: every program is started in one, so that all of its descendants are known.

Works with cgroup v1, v2 and both at once. A name is relative to the top of each hierarchy.
Imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_SECONDS = 0.02


class GroupNotEmpty(OSError):
    """A control group of the lab keeps processes; look at its cgroup.procs and end them"""


def create(name: str) -> Path:
    """Make group `name` for our own programs and return its folder (v2 where it is mounted)."""
    mounts = _mounts()
    folder = (mounts["cgroup2"] or mounts["cgroup"])[0] / name
    folder.mkdir(exist_ok=True)
    return folder


def folders(name: str) -> list[Path]:
    """Folders of group `name` in every hierarchy that has it."""
    mounts = _mounts()
    return [mount / name for mount in mounts["cgroup2"] + mounts["cgroup"] if (mount / name).is_dir()]


def kill(name: str, *, deadline_seconds: float = 10) -> None:
    """SIGKILL group `name` and all groups below it until they are empty; raise `GroupNotEmpty`."""
    deadline = time.monotonic() + deadline_seconds
    while found := _members(name):
        if time.monotonic() > deadline:
            raise GroupNotEmpty(f"{GroupNotEmpty.__doc__}: {name} has {sorted(found)}")
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def remove(name: str, *, deadline_seconds: float = 5) -> None:
    """Remove the empty group `name` from every hierarchy, deepest folder first."""
    deadline = time.monotonic() + deadline_seconds
    for folder in folders(name):
        for path in [*_below(folder), folder]:
            _remove_folder(path, deadline)


def _remove_folder(path: Path, deadline: float) -> None:
    """A group stays busy for a moment after its last process has gone."""
    while path.is_dir():
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


def _members(name: str) -> set[int]:
    return {pid for top in folders(name) for folder in (top, *_below(top)) for pid in _pids(folder)}


def _pids(folder: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):  # the group may go away while we look
        yield from map(int, (folder / "cgroup.procs").read_text().split())


def _below(folder: Path) -> list[Path]:
    return sorted((Path(at) for at, _, _ in os.walk(folder) if Path(at) != folder), reverse=True)


def _mounts() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {"cgroup": [], "cgroup2": []}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split(" ")
        if kind in found:
            found[kind].append(Path(path))
    return found
