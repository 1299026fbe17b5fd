"""Programs of a lab: start them where they can be found again, wait for facts, read their logs.

Imports nothing of ours. A program is started through `sh`, which enters the control group *before* the
program runs. Until then `sh` holds the guard (the pipe whose end tells the reaper that the owner is dead)
as its stdin, so no program is born unseen between the owner's death and the clean-up.
"""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LAUNCH = 'echo $$ > "$1" || exit 125; shift; exec "$@" < /dev/null'
_POLL_SECONDS = 0.03
_TAIL_LINES = 30
_SAID_CHARACTERS = 6000


class LabNotReady(Exception):
    """The lab did not come up; read the log lines below, then try again with more time or memory"""

    def __init__(self, problem: str, log_tail: str = "") -> None:
        super().__init__("\n".join(filter(None, (f"{self.__doc__}: {problem}", log_tail))))


@dataclass(frozen=True)
class Launcher:
    """Where programs start: a control group, a network namespace (None: the caller's), and the guard."""

    group: Path
    namespace: Path | None
    guard: int

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` wrapped; the program keeps the process id of the wrapper."""
        inside = ["nsenter", f"--net={self.namespace}", "--"] if self.namespace else []
        return ["sh", "-c", _LAUNCH, "gantry", str(self.group / "cgroup.procs"), *inside, *argv]

    def run(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, check: bool, timeout: float | None
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end with captured output; with `check` raise `CalledProcessError` that shows it."""
        try:
            return subprocess.run(
                self.command(argv),
                stdin=self.guard,
                capture_output=True,
                text=True,
                check=check,
                timeout=timeout,
                env=dict(env),
                cwd=cwd,
            )
        except subprocess.CalledProcessError as exc:
            exc.add_note(f"it said:\n{(exc.stdout + exc.stderr).strip()[-_SAID_CHARACTERS:]}")
            raise


@dataclass
class Service:
    """A long-lived program of a node, with its log; `started` is told each new process id."""

    name: str
    argv: Sequence[str]
    launcher: Launcher
    environment: Mapping[str, str]
    cwd: Path
    log: Path
    started: Callable[[Service], None] = lambda service: None
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the program; its output is added to the log."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.launcher.command(self.argv),
                stdin=self.launcher.guard,
                stdout=output,
                stderr=output,
                env=dict(self.environment),
                cwd=self.cwd,
                start_new_session=True,
            )
        self.started(self)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The newest process; raises `LabNotReady` before the first start."""
        if self._process is None:
            raise LabNotReady(f"{self.name} was never started")
        return self._process

    @property
    def pid(self) -> int:
        """Process id of the program (not of a wrapper)."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """True while the program runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout_seconds: float = 10) -> None:
        """SIGTERM, then SIGKILL after `timeout_seconds`; returns when it has ended."""
        self.process.terminate()
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to this one process; its children live on, as they would after a crash."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Stop it if it runs, and start it again with the same arguments."""
        if self.alive:
            self.stop()
        self.start()

    def log_text(self) -> str:
        """Everything that it wrote, over all of its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self) -> str:
        """The last lines, with the name of the service over them."""
        return "\n".join([f"--- {self.name}: {self.log}", *self.log_text().splitlines()[-_TAIL_LINES:]])


def wait_until(
    fact: Callable[[], bool], what: str, *, deadline_seconds: float, services: Iterable[Service] = ()
) -> None:
    """Return when `fact()` is true; raise `LabNotReady` at the deadline or when a service has ended.

    A fact that cannot be asked for yet (connection refused, cut answer) is not true yet.
    """
    services = list(services)
    deadline = time.monotonic() + deadline_seconds
    while not _holds(fact):
        ended = [service.name for service in services if not service.alive]
        if ended or time.monotonic() > deadline:
            why = f"{', '.join(ended)} ended" if ended else f"not within {deadline_seconds:g} s"
            raise LabNotReady(f"{what}: {why}", "\n".join(service.log_tail() for service in services))
        time.sleep(_POLL_SECONDS)


def _holds(fact: Callable[[], bool]) -> bool:
    try:
        return fact()
    except (OSError, http.client.HTTPException):
        return False
