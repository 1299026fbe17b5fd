"""Keeps the services of a host running where there is no systemd.

    python -m deployments.supervisor start|stop|restart|status <folder>

`<folder>/services.json` says what runs, where, and with which files of settings:
`{"services": {name: [program, argument ...]}, "directory": folder, "environment": [file ...]}`. What dies is
started again, after a second, and later after up to half a minute. Each command may be given twice. Run by
the services' own user; outlives the session that starts it. The standard library alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

STOP_SECONDS = 45.0
START_SECONDS = 20.0
STEADY_SECONDS = 60.0
MAX_PAUSE_SECONDS = 30.0
MAX_LOG_BYTES = 10_000_000
_LOOK_SECONDS = 5.0
_POLL_SECONDS = 0.05
_NOT_RUNNING = 3
_PR_SET_PDEATHSIG = 1
_SIGNALS = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT})


@dataclass(frozen=True)
class Site:
    """The folder of one supervisor."""

    folder: Path

    @property
    def lock(self) -> Path:
        """Held while the supervisor lives; names its process."""
        return self.folder / "run" / "supervisor.lock"

    @property
    def state(self) -> Path:
        """Process id, start and number of starts of each service."""
        return self.folder / "run" / "services.json"

    def log(self, name: str) -> Path:
        """What a service writes."""
        return self.folder / "log" / f"{name}.log"

    def configuration(self) -> dict[str, Any]:
        """What runs here."""
        configuration: dict[str, Any] = json.loads((self.folder / "services.json").read_text())
        return configuration

    def environment(self) -> dict[str, str]:
        """This process's environment, with the files that the configuration names; the last one wins."""
        environment = dict(os.environ)
        for name in self.configuration()["environment"]:
            with suppress(FileNotFoundError):
                environment |= read_environment(Path(name).read_text())
        return environment


def read_environment(text: str) -> dict[str, str]:
    """`NAME=value` lines as systemd reads them; values may stand in quotes."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition("=") for line in lines if line and line[0] not in "#;")
    return {name.strip(): "".join(shlex.split(value)[:1]) for name, _, value in pairs}


@dataclass
class Service:
    """One program that is kept running."""

    name: str
    argv: list[str]
    log: Path
    directory: str
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    starts: int = 0
    pause_seconds: float = 1.0
    due_at: float = 0.0

    @property
    def alive(self) -> bool:
        """True while the program runs."""
        return self.process is not None and self.process.poll() is None

    def look(self, now: float, environment: Callable[[], Mapping[str, str]]) -> None:
        """Start the program when it does not run and its pause is over; keep its log small."""
        if self.alive:
            _shorten(self.log)
        elif self.process is not None:
            self._note_end(now)
        elif now >= self.due_at:
            self._start(now, environment())

    def _note_end(self, now: float) -> None:
        steady = now - self.started_at > STEADY_SECONDS
        self.pause_seconds = 1.0 if steady else min(self.pause_seconds * 2, MAX_PAUSE_SECONDS)
        self.due_at = now + (1.0 if steady else self.pause_seconds / 2)
        self.process = None

    def _start(self, now: float, environment: Mapping[str, str]) -> None:
        self.started_at, self.starts = now, self.starts + 1
        with self.log.open("ab") as output:
            try:
                self.process = subprocess.Popen(
                    self.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=dict(environment),
                    cwd=self.directory,
                    start_new_session=True,
                    preexec_fn=_as_child,
                )
            except OSError as exc:  # the program is not there, or half of it: as if it had died
                output.write(f"supervisor: {self.argv[0]} does not start: {exc}\n".encode())
                self._note_end(now)

    def facts(self) -> dict[str, Any]:
        """What `status` shows."""
        pid = self.process.pid if self.process is not None and self.alive else None
        return {"pid": pid, "started_at": int(self.started_at), "starts": self.starts}

    def stop(self, deadline: float) -> None:
        """SIGTERM to the program and what it started, SIGKILL at the deadline."""
        if self.process is None:
            return
        _signal_group(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        _signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _as_child() -> None:
    """In the child: signals come through again, and the supervisor's end is its own."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _shorten(log: Path) -> None:
    """Programs append, so that a log can be moved away under them."""
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        shutil.copyfile(log, log.with_suffix(".log.1"))
        os.truncate(log, 0)


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold the lock and name this process in it; raises `SystemExit` when another does."""
    with lock.open("a+") as handle:
        _wait(lambda: _locked(handle, fcntl.LOCK_EX), START_SECONDS / 10)
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _locked(handle: IO[str], kind: int) -> bool:
    """Take the lock now; whoever asks for a supervisor holds it for a moment, too."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def supervise(site: Site) -> int:
    """Run the services until SIGTERM; returns the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    told = site.configuration()
    services = [Service(n, argv, site.log(n), told["directory"]) for n, argv in told["services"].items()]
    with _only_one(site.lock):
        while True:
            for service in services:
                service.look(time.time(), site.environment)
            _write(site.state, {service.name: service.facts() for service in services})
            heard = signal.sigtimedwait(_SIGNALS, min(_LOOK_SECONDS, _next_start(services)))
            if heard is not None and heard.si_signo != signal.SIGCHLD:
                break
        deadline = time.monotonic() + STOP_SECONDS
        for service in reversed(services):
            service.stop(deadline)
        site.state.unlink(missing_ok=True)
    return 0


def _next_start(services: list[Service]) -> float:
    """Seconds until a service is due; those that run are not."""
    waiting = [service.due_at - time.time() for service in services if service.process is None]
    return max(0.01, min(waiting, default=_LOOK_SECONDS))


def _write(path: Path, content: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


def supervisor_pid(site: Site) -> int | None:
    """Process id of the supervisor that holds the lock; None when there is none."""
    try:
        with site.lock.open("r") as handle:
            is_free = _locked(handle, fcntl.LOCK_SH)
            return None if is_free else int(handle.read() or 0) or None
    except FileNotFoundError:
        return None


def status(site: Site) -> dict[str, Any]:
    """Facts of each service, as the supervisor wrote them last; empty when there is no supervisor."""
    if supervisor_pid(site) is None or not site.state.exists():
        return {}
    facts: dict[str, Any] = json.loads(site.state.read_text())
    return facts


def start(site: Site) -> None:
    """Start the supervisor unless it runs; returns when every service has been started."""
    if supervisor_pid(site) is None:
        site.state.unlink(missing_ok=True)  # of one that was killed
        for folder in (site.lock.parent, site.log("any").parent):
            folder.mkdir(exist_ok=True)
        with site.log("supervisor").open("ab") as output:
            subprocess.Popen(
                [sys.executable, "-m", "deployments.supervisor", "run", str(site.folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    wanted = set(site.configuration()["services"])
    _wait(lambda: wanted <= {name for name, facts in status(site).items() if facts["starts"]}, START_SECONDS)


def stop(site: Site) -> None:
    """End the services and the supervisor; returns when they have ended."""
    if (pid := supervisor_pid(site)) is not None:
        os.kill(pid, signal.SIGTERM)
        _wait(lambda: supervisor_pid(site) is None, STOP_SECONDS + START_SECONDS)


def _wait(fact: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:.0f} s; read the logs in the folder log")
        time.sleep(_POLL_SECONDS)


def main(arguments: list[str]) -> int:
    """Do one command; returns the exit code (3: not all services run)."""
    match arguments:
        case ["run", folder]:
            return supervise(Site(Path(folder)))
        case [("start" | "stop" | "restart" | "status") as command, folder]:
            site = Site(Path(folder).resolve())
        case _:
            sys.stderr.write("usage: python -m deployments.supervisor start|stop|restart|status <folder>\n")
            return 2
    if command in {"stop", "restart"}:
        stop(site)
    if command in {"start", "restart"}:
        start(site)
    found = status(site)
    sys.stdout.write(f"{json.dumps(found)}\n")
    all_run = bool(found) and all(facts["pid"] for facts in found.values())
    return 0 if all_run or command == "stop" else _NOT_RUNNING


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
