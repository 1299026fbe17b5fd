"""HAProxy's two sockets: the running worker's (servers and sessions) and the master's (reload, old workers).

Knows the words of HAProxy 2.6 and no routes. Blocking; each call takes milliseconds.
"""

from __future__ import annotations

import csv
import re
import socket
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 3.0
_PIECE_BYTES = 65536


class ProxyFailed(Exception):
    """HAProxy did not do what it was told"""


class ProxySilent(ProxyFailed):
    """HAProxy does not answer on its socket"""


@dataclass(frozen=True)
class Master:
    """What the master process says of itself and of its workers."""

    reloads: int
    failed: int
    leaving: tuple[int, ...]


@dataclass(frozen=True)
class ServerState:
    """A server as HAProxy uses it now."""

    port: int
    takes_requests: bool


def ask(path: Path, command: str) -> str:
    """The answer to one command, or to several with `;` between; raises `ProxySilent`."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(_SECONDS)
            line.connect(str(path))
            line.sendall(f"{command}\n".encode())
            line.shutdown(socket.SHUT_WR)
            pieces = []
            while piece := line.recv(_PIECE_BYTES):
                pieces.append(piece)
    except OSError as exc:
        raise ProxySilent(f"HAProxy does not answer at {path}: {exc}") from exc
    return b"".join(pieces).decode("utf-8", "replace")


def description(path: Path) -> str | None:
    """`description` of the configuration that the worker runs; None while none answers."""
    try:
        told = ask(path, "show info")
    except ProxySilent:
        return None
    found = re.search(r"^description: (\S+)$", told, re.MULTILINE)
    return found[1] if found else None


def backends(path: Path) -> set[str]:
    """The backends that the worker has."""
    return set(ask(path, "show backend").split()) - {"#", "name"}


def server_states(path: Path, backend: str) -> dict[str, ServerState]:
    """The servers of a backend, by name."""
    lines = ask(path, f"show servers state {backend}").splitlines()
    header = next((line for line in lines if line.startswith("# ")), "")
    names = header.removeprefix("# ").split()
    rows = [dict(zip(names, line.split(), strict=False)) for line in lines if f" {backend} " in line]
    return {
        row["srv_name"]: ServerState(
            port=int(row["srv_port"]),
            # running, and neither in maintenance by command nor draining
            takes_requests=row["srv_op_state"] == "2" and not int(row["srv_admin_state"]) & 0b1001,
        )
        for row in rows
    }


def sessions(told: str) -> dict[tuple[str, str], int]:
    """Current sessions by backend and server, of an answer to `show stat`."""
    rows = csv.DictReader(line.removeprefix("# ") for line in told.splitlines() if line.strip())
    return {(row["pxname"], row["svname"]): int(row["scur"] or 0) for row in rows if row.get("scur")}


def master(told: str) -> Master:
    """The master and its workers, of an answer to `show proc`; raises `ProxySilent`."""
    found = re.search(r"master\s+(\d+) \[failed: (\d+)\]", told)
    if found is None:
        raise ProxySilent("what answers is no master of HAProxy 2.6 or later")
    _, _, old = told.partition("# old workers")
    leaving = re.findall(r"^(\d+)\s+worker", old, re.MULTILINE)
    return Master(int(found[1]), int(found[2]), tuple(int(pid) for pid in leaving))
