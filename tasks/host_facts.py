"""Setting a host up, decided: what the host is like, and what stands in the way. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict

from tasks.errors import GantryError
from tasks.provisioning import ProvisionParameters

OLDEST_ENGINE = (20, 10)
NEEDED_BYTES = 1_000_000_000


class HostUnsuited(GantryError):
    """The host cannot be set up as it is"""

    next_step = "Put right on the host what is named, and run this again; nothing was changed."


class Marker(BaseModel):
    """What `.gantry-host` in the prefix says: whose folder it is, and what goes when it goes."""

    model_config = ConfigDict(frozen=True)

    name: str
    port: int
    service_user: str
    made_user: bool


class HostFacts(BaseModel):
    """What `host_probe` found."""

    model_config = ConfigDict(frozen=True)

    control_address: str
    system: str
    machine: str
    libc: str
    python: str
    python_version: str
    has_systemd: bool
    engine_version: str
    engine_error: str
    engine_group: int | None
    api_error: str
    free_bytes: int
    missing_programs: list[str]
    has_ensurepip: bool
    user_exists: bool
    port_is_taken: bool
    marker: Marker | None
    is_occupied: bool
    releases: list[str]
    local_settings: str

    @property
    def supervision(self) -> str:
        """What keeps the services running."""
        return "systemd" if self.has_systemd else "supervisor"


def question(asked: ProvisionParameters, api_url: str) -> dict[str, Any]:
    """What `host_probe` is asked."""
    return {
        "prefix": asked.prefix,
        "docker_host": asked.docker_host,
        "port": asked.port,
        "service_user": asked.service_user,
        "prefect_api_url": api_url,
    }


def control_address(ssh_connection: str) -> str:
    """The control host's address as the host sees it, of the host's SSH_CONNECTION."""
    address = ipaddress.ip_address(ssh_connection.split()[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def api_url_for_host(own_url: str, address: str) -> str:
    """The Prefect API as the host reaches it: a loopback name becomes the control host's address."""
    parts = urlsplit(own_url)
    if not _is_loopback(parts.hostname or ""):
        return own_url.rstrip("/")
    host = f"[{address}]" if ":" in address else address
    return urlunsplit(parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host)).rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(asked: ProvisionParameters, facts: HostFacts, api_url: str) -> None:
    """Raise `HostUnsuited` with everything that stands in the way, and what mends each."""
    found = [
        *_machine_problems(asked, facts),
        *_place_problems(asked, facts),
        *_reach_problems(facts, api_url),
    ]
    if found:
        raise HostUnsuited("; ".join(found))


def _machine_problems(asked: ProvisionParameters, facts: HostFacts) -> list[str]:
    found = []
    if facts.system != "Linux":
        found.append(f"it runs {facts.system}: only Linux is supported")
    if facts.missing_programs:
        names = ", ".join(facts.missing_programs)
        found.append(f"not installed: {names} (Debian's packages: passwd, util-linux, tar)")
    if asked.package_index and not facts.has_ensurepip:
        found.append(f"{facts.python} has no ensurepip: install python3-venv, or leave package_index out")
    if facts.free_bytes < NEEDED_BYTES:
        room = facts.free_bytes // 1_000_000
        found.append(f"{room} MB are free for {asked.prefix}: {NEEDED_BYTES // 1_000_000} MB are needed")
    return found


def _place_problems(asked: ProvisionParameters, facts: HostFacts) -> list[str]:
    if facts.marker is None and facts.is_occupied:
        return [f"{asked.prefix} holds files of something else: give another prefix"]
    if facts.marker is not None and facts.marker.name != asked.name:
        return [f"{asked.prefix} belongs to {facts.marker.name}: give that name, or another prefix"]
    if facts.marker is not None and facts.marker.service_user != asked.service_user:
        return [
            f"{asked.prefix} is run by {facts.marker.service_user}: give service_user so, or remove it first"
        ]
    if facts.port_is_taken and (facts.marker is None or facts.marker.port != asked.port):
        return [f"port {asked.port} is taken: give another port, or end what listens there"]
    return []


def _reach_problems(facts: HostFacts, api_url: str) -> list[str]:
    found = []
    if facts.engine_error:
        found.append(
            f"no Docker Engine answers ({facts.engine_error}): install and start it, or give docker_host"
        )
    elif _version(facts.engine_version) < OLDEST_ENGINE:
        found.append(f"Docker Engine {facts.engine_version} is too old: 20.10 or newer is needed")
    elif facts.engine_group == 0:
        found.append("the engine's socket belongs to group root: start dockerd with --group docker")
    if facts.api_error:
        found.append(
            f"the Prefect API at {api_url} cannot be reached from there ({facts.api_error}): start it "
            "with --host 0.0.0.0 and open its port, or give prefect_api_url as the host reaches it"
        )
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
