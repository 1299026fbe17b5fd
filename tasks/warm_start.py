"""What a worker starts a flow run with: a copy of a process that has imported Prefect and the flows.

    python -m tasks.warm_start MODULE...

Importing takes longer than most of what a run does, so the first run of a worker leaves a process behind
(`tasks.warm_parent`) that imports once and forks for each further run. Where there is none, or it is not
what this run would become by itself (other environment, other folder, changed code), the run starts as
`python -m prefect.engine` does. `GANTRY_WARM_START=0` in the worker's environment forbids it.

Stays between worker and run: passes signals on, and ends as the run ends; when it is killed, so is the
run. Imports nothing that is not needed for that.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

SWITCH = "GANTRY_WARM_START"
OF_THE_RUN = "PREFECT__"  # variables that differ from run to run
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ANSWER_SECONDS = 5.0
_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")


def started_at(pid: int) -> str:
    """When a process started, in the kernel's own count; together with the pid it names one process."""
    with open(f"/proc/{pid}/stat") as stream:  # noqa: PTH123 - pathlib costs more than all the rest
        return stream.read().rpartition(")")[2].split()[19]


def address(worker: int) -> str:
    """Name of the socket of a worker's parent; in no folder, so that it goes with its process."""
    return f"\0gantry-warm-{os.getuid()}-{worker}-{started_at(worker)}"


def is_own(connection: socket.socket) -> bool:
    """True when the other side runs as this user: nobody else may read or give an environment."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(told)[1] == os.getuid())


def send(connection: socket.socket, message: object, descriptors: Sequence[int] = ()) -> None:
    """Send a message, with descriptors beside its length."""
    text = json.dumps(message).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(text))], list(descriptors))
    connection.sendall(text)


def receive(connection: socket.socket, descriptors: int = 0) -> tuple[Any, list[int]]:
    """The next message and its descriptors; raises EOFError when the other side is gone."""
    head, given, _, _ = socket.recv_fds(connection, _LENGTH.size, descriptors)
    try:
        head += _exactly(connection, _LENGTH.size - len(head))
        return json.loads(_exactly(connection, _LENGTH.unpack(head)[0])), list(given)
    except (EOFError, OSError, ValueError):
        for descriptor in given:
            os.close(descriptor)
        raise


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        block = connection.recv(size - len(found))
        if not block:
            raise EOFError
        found += block
    return found


def main(modules: Sequence[str]) -> None:
    """Become the run: warm, else cold."""
    if os.environ.get(SWITCH, "1") != "0" and "PREFECT__FLOW_RUN_ID" in os.environ:
        worker = os.getppid()
        connection = _warm(worker)
        if connection is not None:
            _stay(connection)
        _leave_parent(worker, modules)
    os.execv(sys.executable, [sys.executable, "-m", "prefect.engine"])  # noqa: S606 - the worker's own Python


def _warm(worker: int) -> socket.socket | None:
    """A connection to what runs in our place, or None."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_ANSWER_SECONDS)
        connection.connect(address(worker))
        if not is_own(connection):
            raise PermissionError
        send(connection, {"environment": dict(os.environ), "folder": os.getcwd()}, (0, 1, 2))  # noqa: PTH109
        answer, _ = receive(connection)
        if answer == "started":
            connection.settimeout(None)
            return connection
    except (OSError, EOFError, ValueError):
        pass
    connection.close()
    return None


def _stay(connection: socket.socket) -> None:
    """Until the run ends; then end as it did."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        send(connection, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    try:
        ended, _ = receive(connection)
    except (EOFError, OSError):
        ended = -signal.SIGKILL  # the parent is gone, and every run with it
    code = int(str(ended))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in {signal.SIGKILL, signal.SIGSTOP} else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _leave_parent(worker: int, modules: Sequence[str]) -> None:
    """Start the parent of further runs of this worker, in a session of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_RUN)}
    if os.fork():
        return
    try:
        os.setsid()
        if os.fork() == 0:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nowhere, descriptor)
            command = [sys.executable, "-m", "tasks.warm_parent", str(worker), *modules]
            os.execve(sys.executable, command, environment)  # noqa: S606 - as above
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
