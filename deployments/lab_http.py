"""HTTP from inside a network namespace, without a subprocess and without proxies. Imports nothing of ours."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Response:
    """Answer to an HTTP request."""

    status: int
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The body parsed as JSON."""
        return json.loads(self.body)


def connect(namespace: str | None, host: str, port: int, timeout_seconds: float) -> socket.socket:
    """A connected TCP socket that lives in `namespace`; raises `OSError` as `connect` does."""
    if namespace is None:
        return socket.create_connection((host, port), timeout_seconds)
    # setns changes one thread only: a thread of its own needs no way back.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_connect_inside, namespace, host, port, timeout_seconds).result()


def _connect_inside(namespace: str, host: str, port: int, timeout_seconds: float) -> socket.socket:
    enter(namespace)
    return socket.create_connection((host, port), timeout_seconds)


def enter(namespace: str) -> None:
    """Move the calling thread into `namespace` for good: for a thread that asks from there all its life."""
    with (NAMESPACES / namespace).open("rb") as handle:
        if _libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)


def request(
    namespace: str | None,
    method: str,
    url: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 5,
) -> Response:
    """One HTTP exchange from inside `namespace`, without proxies; `url` must hold an address, not a name."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with contextlib.closing(http.client.HTTPConnection(host, port)) as connection:
        connection.sock = connect(namespace, host, port, timeout_seconds)
        return exchange(connection, method, target, body=body, headers=headers)


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One request over a connection whose socket is open."""
    connection.request(method, target, body=body, headers={"Connection": "close", **(headers or {})})
    answer = connection.getresponse()
    return Response(answer.status, answer.read())
