"""One operating process per container name, by `flock`: the kernel lets go when the process dies.

The holder notes in the lock file who it is and until when its present step may take, so that others can say
who holds the container, and the guardian can end a holder that hangs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

FIRST_STEP_SECONDS = 60.0
GRACE_SECONDS = 15.0


class Holder(BaseModel):
    """Who holds a lock; `deadline_seconds` is on the clock that counts from the machine's start."""

    pid: int
    process_started: str
    deployment_id: str | None
    since: datetime
    deadline_seconds: float | None

    @property
    def is_overdue(self) -> bool:
        """True when the present step has taken longer than it may, with some grace."""
        return self.deadline_seconds is not None and time.monotonic() > self.deadline_seconds + GRACE_SECONDS

    def __str__(self) -> str:
        since = self.since.isoformat(timespec="seconds")
        return f"deployment {self.deployment_id} (process {self.pid}) since {since}"


@dataclass
class Hold:
    """One held lock; a task that outlives the holder inherited it and must see that it is over."""

    path: Path
    descriptor: int
    holder: Holder
    is_over: bool = field(default=False)

    def within(self, seconds: float) -> None:
        """The step that begins now ends within `seconds`; if not, the guardian ends this process."""
        self.note(self.holder.model_copy(update={"deadline_seconds": time.monotonic() + seconds}))

    def note(self, holder: Holder) -> None:
        """Write down who holds the lock."""
        self.holder = holder
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its note
            _write_note(self.descriptor, holder.model_dump_json())


_held: ContextVar[tuple[Hold, ...]] = ContextVar("held_container_locks", default=())


class LockHeld(Exception):
    """Another process is operating on this container"""


@contextmanager
def container_lock(
    locks_dir: Path, container_name: str, deployment_id: str | None = None, *, ends_itself: bool = False
) -> Iterator[Hold]:
    """Hold the container's lock; raise `LockHeld` at once when another holds it, naming it.

    Re-entrant within one flow of control (a subflow called with the lock held), not between tasks. With
    `ends_itself` the holder is never overdue: the daemon does not end itself.
    """
    path = _path(locks_dir, container_name)
    for hold in _held.get():
        if hold.path == path and not hold.is_over:
            yield hold
            return
    locks_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock_now(descriptor, locks_dir, container_name)
        hold = Hold(path, descriptor, _myself(deployment_id))
        if ends_itself:
            hold.note(hold.holder)
        else:
            hold.within(FIRST_STEP_SECONDS)
        token = _held.set((*_held.get(), hold))
        try:
            yield hold
        finally:
            hold.is_over = True
            _held.reset(token)
            _write_note(descriptor, "")
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough while a child has it, too
    finally:
        os.close(descriptor)


def holder_of(locks_dir: Path, container_name: str) -> Holder | None:
    """Who holds the container's lock now, as it noted itself; None when that process is gone."""
    try:
        holder = Holder.model_validate_json(_path(locks_dir, container_name).read_bytes())
    except (OSError, ValidationError):
        return None
    return holder if _started(holder.pid) == holder.process_started else None


def end_overdue(locks_dir: Path, container_name: str) -> Holder | None:
    """SIGKILL the holder when its step is overdue; returns it, or None when nothing was to be done.

    Raises `PermissionError` when the process belongs to another user.
    """
    holder = holder_of(locks_dir, container_name)
    if holder is None or not holder.is_overdue or holder.pid == os.getpid():
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGKILL)
    return holder


def _path(locks_dir: Path, container_name: str) -> Path:
    return locks_dir / f"{container_name}.lock"


def _lock_now(descriptor: int, locks_dir: Path, container_name: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = holder_of(locks_dir, container_name)
        raise LockHeld(
            f"{container_name} is being worked on by {holder or 'another process'} on this host; "
            "wait until it ends"
        ) from exc


def _write_note(descriptor: int, text: str) -> None:
    """Readers take a note that is cut off, or overwritten in part, for none."""
    note = text.encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, note, 0)


def _myself(deployment_id: str | None) -> Holder:
    return Holder(
        pid=os.getpid(),
        process_started=_started(os.getpid()),
        deployment_id=deployment_id,
        since=datetime.now(UTC),
        deadline_seconds=None,
    )


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did: with its id it names one process for ever."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
