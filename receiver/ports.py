"""Host ports: whether one is free, and who holds it, as far as this process can see.

Reads `/proc`; names nothing of other users' processes when it does not run as root. Blocking.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

from receiver.binding import bind_error
from receiver.contract import HostPort
from receiver.engine import PublishedPort

_WANTED = re.compile(r"([0-9]{1,5})(?:/(tcp|udp))?")
_LISTENING = {"tcp": "0A", "udp": "07"}
_PROC = Path("/proc")
Wanted = tuple[int, Literal["tcp", "udp"]]


class PortMalformed(Exception):
    """A port is written as 8080/tcp or 53/udp"""


def parse_port(text: str) -> Wanted:
    """`8080/tcp`, `53/udp`, or `8080` for TCP; raises `PortMalformed`."""
    found = _WANTED.fullmatch(text)
    if found is None or not 1 <= int(found[1]) <= 65535:
        raise PortMalformed(f"port {text[:20]!r}: write it as 8080/tcp or 53/udp, from 1 to 65535")
    return int(found[1]), cast("Literal['tcp', 'udp']", found[2] or "tcp")


def look_at(wanted: Wanted, published: Sequence[PublishedPort]) -> HostPort:
    """Whether a host port is free; a container that publishes it is named first, then a process."""
    port, protocol = wanted
    by = next((held for held in published if (held.port, held.protocol) == wanted), None)
    if by is not None:
        return HostPort(
            port=port,
            protocol=protocol,
            free=False,
            holder=f"container {by.name}",
            container_name=by.container_name,
        )
    inodes = set(_listeners(port, protocol))
    if not inodes and bind_error(port, protocol) is None:
        return HostPort(port=port, protocol=protocol, free=True)
    return HostPort(port=port, protocol=protocol, free=False, holder=_process_with(inodes))


def _listeners(port: int, protocol: str) -> Iterator[str]:
    """Inodes of the sockets that listen at a port in this network namespace."""
    for family in ("", "6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / f"{protocol}{family}").read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == _LISTENING[protocol]:
                    yield fields[9]


def _process_with(inodes: set[str]) -> str | None:
    """Name and id of a process that has one of the sockets; None when it is another user's."""
    sockets = {f"socket:[{inode}]" for inode in inodes}
    for process in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(opened.readlink()) in sockets for opened in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return None
