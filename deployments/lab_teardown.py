"""What a lab has made, and taking all of it away again: the journal, the tear-down, the reaper.

The journal (`resources.jsonl` in the state folder) names each resource before it is made. The tear-down
needs nothing else, so it works for a lab whose owner is dead, and again for one that is half removed.
Must not import Docker's client or Prefect: the reaper has to be there at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deployments import lab_cgroups, lab_http

JOURNAL = "resources.jsonl"
WORK, ENGINE = ".work", ".engine"
_MNT_DETACH = 2
_ENGINE_SECONDS = 20
DONE = b"done"
_libc = ctypes.CDLL(None, use_errno=True)


class LabNotRemoved(ExceptionGroup[Exception]):
    """Parts of the lab are left; run `python -m deployments.lab down <state folder>` again"""


@dataclass(frozen=True)
class Journal:
    """Append-only record of a lab's resources; each is written down before it is made."""

    state_dir: Path

    def add(self, kind: str, **facts: object) -> None:
        """Note one resource."""
        line = json.dumps({"kind": kind, **facts}) + "\n"
        handle = os.open(
            self.state_dir / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def add_process(self, node: str, role: str, pid: int) -> None:
        """Note a process by id and start time, so that a later process with its id is not taken for it."""
        self.add("process", node=node, role=role, pid=pid, started=start_time(pid))

    def records(self, kind: str) -> list[dict[str, Any]]:
        """All records of one kind, oldest first; none when the lab is gone."""
        path = self.state_dir / JOURNAL
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]


def start_time(pid: int) -> str | None:
    """Kernel start time of a live process in clock ticks since boot; None when it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in {"Z", "X"} else fields[18]


def tear_down(state_dir: Path) -> None:
    """Take away everything that the journal names, and the journal last; does nothing when there is none.

    All steps are tried; raises `LabNotRemoved` with what went wrong.
    """
    journal = Journal(state_dir)
    if not (state_dir / JOURNAL).exists():
        return
    groups: list[str] = [record["name"] for record in journal.records("cgroup")]
    steps: list[Callable[[], None]] = [
        *(partial(lab_cgroups.kill, group) for group in groups if group.endswith(WORK)),
        partial(_end_engines, journal),
        *(partial(lab_cgroups.kill, group) for group in groups),
        partial(unmount_below, state_dir),
        *(partial(lab_cgroups.remove, group) for group in groups),
        *(partial(_remove_link, record["name"]) for record in journal.records("link")),
        *(partial(_remove_namespace, record["name"]) for record in journal.records("namespace")),
        partial(_remove_shim_sockets, state_dir),
    ]
    failures = list(_failures(steps))
    if failures:
        raise LabNotRemoved(str(LabNotRemoved.__doc__), failures)
    _remove_files(state_dir)


def _failures(steps: list[Callable[[], None]]) -> Iterator[Exception]:
    for step in steps:
        try:
            step()
        except (OSError, subprocess.SubprocessError) as exc:
            yield exc


def _end_engines(journal: Journal) -> None:
    """Containers by the engine's API, then the engine by SIGTERM: it unmounts and cleans up by itself."""
    engines = {
        engine["socket"]: engine for engine in journal.records("engine")
    }.values()  # started twice: one
    processes = journal.records("process")
    mine = [[p for p in processes if p["node"] == engine["node"]] for engine in engines]
    with ThreadPoolExecutor(max_workers=max(1, len(engines))) as threads:
        list(threads.map(_end_engine, (Path(engine["socket"]) for engine in engines), mine))


def _end_engine(docker_socket: Path, processes: list[dict[str, Any]]) -> None:
    _remove_containers(docker_socket)
    for role in ("dockerd", "containerd"):
        for process in processes:
            if process["role"] == role:
                end_process(process["pid"], process["started"], deadline_seconds=_ENGINE_SECONDS)


def end_process(pid: int, started: str | None, *, deadline_seconds: float) -> None:
    """SIGTERM a recorded process, SIGKILL at the deadline; a later process with its id is left alone."""
    if started is None or start_time(pid) != started:
        return
    deadline = time.monotonic() + deadline_seconds
    os.kill(pid, signal.SIGTERM)
    while start_time(pid) == started:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _remove_containers(docker_socket: Path) -> None:
    """Ask the engine to remove all containers; those of a dead engine end with their control group."""
    try:
        containers = json.loads(_ask_engine(docker_socket, "GET", "/containers/json?all=1"))
    except OSError:
        return
    paths = [f"/containers/{container['Id']}?force=1&v=1" for container in containers]
    with ThreadPoolExecutor(max_workers=8) as threads:
        list(threads.map(partial(_ask_engine, docker_socket, "DELETE"), paths))


def _ask_engine(docker_socket: Path, method: str, path: str) -> bytes:
    connection = http.client.HTTPConnection("engine")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(_ENGINE_SECONDS)
    connection.sock.connect(str(docker_socket))
    return lab_http.exchange(connection, method, path).body


def unmount_below(folder: Path, *, keep: Path | None = None) -> None:
    """Detach every mount below `folder`, deepest first, but not the one at `keep`."""
    paths = [_plain(line.split(" ")[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found = {path for path in paths if Path(path).is_relative_to(folder)} - {str(keep)}
    for path in sorted(found, reverse=True):
        if _libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def _plain(text: str) -> str:
    """The kernel writes blanks in paths as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _remove_link(name: str) -> None:
    if Path("/sys/class/net", name).exists():
        subprocess.run(["ip", "link", "del", name], check=True, capture_output=True)


def _remove_namespace(name: str) -> None:
    if (lab_http.NAMESPACES / name).exists():
        subprocess.run(["ip", "netns", "del", name], check=True, capture_output=True)


def _remove_shim_sockets(state_dir: Path) -> None:
    """A killed shim leaves its socket in /run/containerd/s; the state of containerd says which is ours."""
    for address in state_dir.glob("*/run/io.containerd.runtime.v2.task/*/*/address"):
        Path(address.read_text().removeprefix("unix://")).unlink(missing_ok=True)


def _remove_files(state_dir: Path) -> None:
    for path in state_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()
    (state_dir / JOURNAL).unlink()
    state_dir.rmdir()


def reap(state_dir: Path) -> None:
    """Wait for the end of stdin, which the owner holds; tear down unless the owner said that it has."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read() == DONE:
        return
    try:
        tear_down(state_dir)
    except LabNotRemoved as failure:
        (state_dir / "reaper.log").write_text("".join(traceback.format_exception(failure)))
        raise
    with contextlib.suppress(OSError):  # the owner died between making the folder and its first record
        state_dir.rmdir()
