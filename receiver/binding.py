"""Whether a host port can be bound now, by trying it. Blocking."""

from __future__ import annotations

import socket


def bind_error(port: int, protocol: str = "tcp", host_ip: str | None = None) -> OSError | None:
    """Why the port cannot be had; None when it can, or when a low port needs more privilege than we have."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    family = socket.AF_INET6 if host_ip and ":" in host_ip else socket.AF_INET
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host_ip or "", port))
        except PermissionError:
            return None
        except OSError as exc:
            return exc
    return None
