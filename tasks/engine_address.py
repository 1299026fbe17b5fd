"""Which engine builds where no block names one, and whether it is on this machine. Imports no Docker."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit


def engine_address() -> str:
    """`DOCKER_HOST`, or the socket where an engine is found by default."""
    return os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"


def is_local(address: str) -> bool:
    """True for a Unix socket and for loopback."""
    url = urlsplit(address)
    if url.scheme in ("unix", "http+unix"):
        return True
    try:
        return url.hostname == "localhost" or ipaddress.ip_address(url.hostname or "").is_loopback
    except ValueError:
        return False
