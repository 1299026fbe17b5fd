"""Ports of this host: whether one can be bound now, by trying it, and sockets that listen. Blocking."""

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


def listening(host: str, port: int) -> socket.socket:
    """A socket for a server; `::` takes IPv4 as well. Raises `OSError`.

    Without Nagle's algorithm, or each answer whose body follows its head would wait 40 ms for the other side;
    asyncio turns it off for sockets that it makes itself only.
    """
    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    made = socket.create_server(
        (host, port), family=family, backlog=2048, dualstack_ipv6=is_ipv6 and host == "::"
    )
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # those that are accepted have it, too
    return made
