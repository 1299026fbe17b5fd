"""The process that has imported what flow runs import, and forks for each run of one worker.

    python -m tasks.warm_parent WORKER_PID MODULE...

Ends with its worker, after the last run; when its code has changed on disk; and after `IDLE_SECONDS`
without a run. Its runs end with it, and each run with whoever asked for it (`tasks.warm_start`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import runpy
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.warm_prepare import prepare, stamp
from tasks.warm_start import OF_THE_RUN, address, is_own, receive, send

IDLE_SECONDS = 1800.0
_READ_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Asked:
    """A run as its starter asked for it."""

    environment: dict[str, str]
    folder: str
    descriptors: list[int]


@dataclass
class Run:
    """A run under way: its process, and the connection of who waits for it."""

    pid: int
    process: int
    starter: socket.socket


def lasting(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that two runs of a worker have in common."""
    return {name: value for name, value in environment.items() if not name.startswith(OF_THE_RUN)}


def watched_files() -> list[Path]:
    """The code of this process that a person may change, and where packages are installed."""
    found = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and "site-packages" not in file and not file.startswith(sys.base_prefix):
            found.append(Path(file))
    home = os.environ.get("PREFECT_HOME") or Path.home() / ".prefect"
    return [*found, Path(os.environ.get("PREFECT_PROFILES_PATH") or Path(home) / "profiles.toml")]


def stamps(paths: Iterable[Path]) -> dict[Path, tuple[int, int] | None]:
    """Time of the last change and size of each; None for what is not there."""
    return {path: stamp(path) for path in paths}


@dataclass
class Parent:
    """Forks for those who ask at `listener`, while the worker lives and the code is as it was."""

    worker: int
    listener: socket.socket
    environment: dict[str, str]
    folder: str
    known: dict[Path, tuple[int, int] | None]
    runs: dict[int, Run] = field(default_factory=dict)
    is_closing: bool = False
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def serve(self) -> Asked | None:
        """Until there is nothing more to do: None. In each forked process: the run that it is to become."""
        self._selector.register(self.listener, selectors.EVENT_READ)
        self._selector.register(self.worker, selectors.EVENT_READ)
        while self.runs or not self.is_closing:
            events = self._selector.select(IDLE_SECONDS if not self.runs else None)
            if not events:
                self._close()
            for key, _ in events:
                asked = self._take(key.fileobj)
                if asked is not None:
                    return asked
        return None

    def _take(self, ready: Any) -> Asked | None:
        """What is ready may be gone by something else that was ready with it."""
        if ready is self.listener:
            return None if self.is_closing else self._answer()
        if ready == self.worker:
            self._close()
        elif isinstance(ready, int):
            self._reap(self.runs.pop(ready))
        elif run := next((run for run in self.runs.values() if run.starter is ready), None):
            self._hear(run)
        return None

    def _close(self) -> None:
        """Take no further run."""
        if not self.is_closing:
            self.is_closing = True
            self._selector.unregister(self.listener)
            self._selector.unregister(self.worker)
            self.listener.close()

    def _answer(self) -> Asked | None:
        starter, _ = self.listener.accept()
        starter.settimeout(_READ_SECONDS)
        try:
            asked = self._read(starter)
            if asked is None:
                send(starter, "not here")
            else:
                return self._fork(asked, starter)
        except (OSError, EOFError, ValueError):
            pass
        starter.close()
        return None

    def _read(self, starter: socket.socket) -> Asked | None:
        """What is asked for, when a copy of this process would be the same as a new one."""
        if not is_own(starter):
            return None
        told, descriptors = receive(starter, 3)
        with contextlib.ExitStack() as unwanted:
            for descriptor in descriptors:
                unwanted.callback(os.close, descriptor)
            asked = Asked(told["environment"], told["folder"], descriptors)
            if stamps(self.known) != self.known:
                self._close()
            if self.is_closing or len(descriptors) != 3 or not self._would_be_the_same(asked):
                return None
            unwanted.pop_all()
            return asked

    def _would_be_the_same(self, asked: Asked) -> bool:
        """Another folder is fine where it holds no code: workers make an empty one for each run."""
        alike = asked.folder == self.folder or not (
            any(Path(asked.folder).iterdir()) or self.folder in _origins()
        )
        return alike and lasting(asked.environment) == self.environment and _is_single_threaded()

    def _fork(self, asked: Asked, starter: socket.socket) -> Asked | None:
        send(starter, "started")  # before it is: whoever has given up meanwhile gets no run
        pid = os.fork()
        if not pid:
            self._forget_all(starter)
            return asked
        for descriptor in asked.descriptors:
            os.close(descriptor)
        run = Run(pid, os.pidfd_open(pid), starter)
        self.runs[run.process] = run
        self._selector.register(run.process, selectors.EVENT_READ)
        self._selector.register(starter, selectors.EVENT_READ)
        return None

    def _forget_all(self, starter: socket.socket) -> None:
        """In the forked process: nothing of the others."""
        self._selector.close()
        for each in (self.listener, starter, *(run.starter for run in self.runs.values())):
            each.close()
        for descriptor in (self.worker, *self.runs):
            os.close(descriptor)

    def _hear(self, run: Run) -> None:
        """A signal to pass on; a starter that is gone takes its run with it."""
        try:
            number = signal.Signals(int(str(receive(run.starter)[0])))
        except (OSError, EOFError, ValueError):
            number = signal.SIGKILL
            self._selector.unregister(run.starter)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(run.process, number)

    def _reap(self, run: Run) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(run.pid, 0)[1])
        self._selector.unregister(run.process)
        with contextlib.suppress(KeyError):
            self._selector.unregister(run.starter)
        with contextlib.suppress(OSError):
            send(run.starter, code)
        run.starter.close()
        os.close(run.process)


def _origins() -> set[str]:
    """Folders on the path that some module of this process came from."""
    files = (getattr(module, "__file__", None) or "" for module in list(sys.modules.values()))
    return {entry for entry in sys.path for file in files if entry and file.startswith(f"{entry}/")}


def _is_single_threaded() -> bool:
    return sum(1 for _ in Path("/proc/self/task").iterdir()) == 1


def become(asked: Asked, parent: int) -> None:
    """Be the run that was asked for, as if `python -m prefect.engine` had been started."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number, descriptor in enumerate(asked.descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(asked.folder)
    sys.path[0] = asked.folder
    os.environ.clear()
    os.environ.update(asked.environment)
    sys.argv = ["prefect.engine"]
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def _listen(worker: int) -> tuple[int, socket.socket] | None:
    """The worker's process and our socket; None when it is gone, or has a parent already."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        process = os.pidfd_open(worker)
        listener.bind(address(worker))
    except OSError:
        return None
    return process, listener


def main(arguments: Sequence[str]) -> None:
    """Import, listen, fork."""
    worker, modules = int(arguments[0]), arguments[1:]
    began = _listen(worker)
    if began is None:
        return
    process, listener = began
    before = time.time_ns()
    prepare(modules)
    known = stamps(watched_files())
    gc.collect()
    gc.freeze()  # copies share what is there now
    listener.listen()
    own = Parent(process, listener, lasting(os.environ), os.getcwd(), known)  # noqa: PTH109 - as the starter
    pid = os.getpid()
    if any(told and told[0] > before for told in known.values()):
        return  # changed while it was imported
    asked = own.serve()
    if asked is not None:
        become(asked, pid)


if __name__ == "__main__":
    main(sys.argv[1:])
