"""One package to several hosts at once, behind one link: until the last has verified all of it.

Exported meanwhile, or before, as it is for the hosts after a fleet's canary. The hosts are receivers with
state folders of their own in one namespace; nothing is loaded, so that the link is what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deployments.lab_processes import wait_until
from tests.bench import images, ours
from tests.bench.links import sent_bytes
from tests.bench.site import Site
from tests.bench.ways import Sent

WAY = "fan-out"
_FIRST_PORT = 8101
_READY_SECONDS = 60


@dataclass(frozen=True)
class Fan:
    """So many hosts, and whether the package is there already."""

    hosts: int
    is_exported: bool = False

    @property
    def case(self) -> str:
        """Name of the case."""
        return f"hosts-{self.hosts}{'-exported' if self.is_exported else ''}"

    def __str__(self) -> str:
        return f"{self.hosts}{', exported before' if self.is_exported else ''}"


FANS = (Fan(1), Fan(2), Fan(4), Fan(8), Fan(8, is_exported=True))


@contextmanager
def receivers(site: Site, number: int) -> Iterator[list[int]]:
    """Start so many receivers on the host; yields their ports."""
    ports = [_FIRST_PORT + each for each in range(number)]
    try:
        for port in ports:
            _start(site, port)
        yield ports
    finally:
        for port in ports:
            if (name := _name(port)) in site.host.services:
                site.host.services[name].stop()
            site.host.run("rm", "-rf", str(site.host.folder / name))


def _name(port: int) -> str:
    return f"receiver-{port}"


def _start(site: Site, port: int) -> None:
    name = _name(port)
    own = {
        "HOOK_RECEIVER_PORT": str(port),
        "HOOK_RECEIVER_STATE_DIR": str(site.host.folder / name),
        "HOOK_RECEIVER_LOAD_AHEAD_BYTES": "0",  # they share one engine, as hosts do not
    }
    service = site.host.spawn(name, sys.executable, "-m", "receiver", env=own)
    url = f"http://127.0.0.1:{port}/health"
    wait_until(
        lambda: site.host.get(url).status == 200, name, deadline_seconds=_READY_SECONDS, services=[service]
    )


def measure(site: Site, fan: Fan) -> tuple[Sent, int]:
    """Send the large image to fresh hosts at once; returns what it took, and bytes sent."""
    site.clean_host()
    ours.Ours().prepare(site)
    if fan.is_exported:
        ours.export(site, images.FIRST)
    with receivers(site, fan.hosts) as ports:
        before = sent_bytes(site.host.link)
        told = ours.send_to(site, images.FIRST, ports)
        sent = sent_bytes(site.host.link) - before
        pids = [site.host.services[_name(port)].pid for port in ports]
        peak = max(ours.peak_bytes(pid) for pid in pids)
    parts = told["parts"]
    return Sent(sum(parts.values()), parts, told["peak_bytes"], peak, told["package_bytes"]), sent
