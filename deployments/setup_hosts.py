"""The hosts that set-up is told of: `NAME=[https://]ADDRESS[:PORT]`. Pure."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from receiver.contract import DEFAULT_PORT

HOSTS_VARIABLE = "GANTRY_HOSTS"


@dataclass(frozen=True)
class HostAddress:
    """Where a host's receiver is, and the name of its block."""

    name: str
    address: str
    port: int = DEFAULT_PORT
    tls: bool = False
    worker_python: str | None = None


def host_name(text: str) -> str:
    """A name that Prefect takes for a block, a work pool and a Prefect deployment."""
    if not re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", text):
        raise ArgumentTypeError(
            f"{text!r}: use lower-case letters, digits and '-', such as 'host-b'; "
            "the host's real name or address stands apart from it"
        )
    return text


def host_address(text: str) -> HostAddress:
    """A host as `--host` takes it."""
    name, equals, where = text.partition("=")
    scheme, slashes, rest = where.strip().rpartition("://")
    parts = urlsplit(f"//{rest}")
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError as exc:
        raise _refused(text, str(exc)) from exc
    if not equals or not parts.hostname or parts.netloc != rest or "@" in rest:
        raise _refused(text, "it is no NAME=ADDRESS")
    if slashes and scheme not in {"http", "https"}:
        raise _refused(text, f"the scheme is {scheme!r}")
    return HostAddress(host_name(name.strip()), parts.hostname, port, tls=scheme == "https")


def told_hosts(arguments: Sequence[HostAddress], environ: Mapping[str, str]) -> list[HostAddress]:
    """Those of GANTRY_HOSTS and of the arguments; an argument wins over the variable."""
    texts = re.split(r"[,\s]+", environ.get(HOSTS_VARIABLE, "").strip())
    try:
        hosts = {host.name: host for host in map(host_address, filter(None, texts))}
    except ArgumentTypeError as exc:
        raise ArgumentTypeError(f"{HOSTS_VARIABLE}: {exc}") from exc
    return list((hosts | {host.name: host for host in arguments}).values())


def _refused(text: str, why: str) -> ArgumentTypeError:
    return ArgumentTypeError(
        f"{text!r}: {why}; give NAME=[https://]ADDRESS[:PORT], as in 'host-b=10.0.0.7:8001'"
    )
