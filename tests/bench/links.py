"""The link between the lab's two sides: how fast it may be, and how many bytes it carried."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from deployments.lab_network import Link

LINKS: Mapping[str, int | None] = {"bare": None, "1g": 1_000_000_000, "100m": 100_000_000}
"""Bits per second by name; None: as fast as the machine is."""
NAMES = {"bare": "bare link", "1g": "1 Gbit/s", "100m": "100 Mbit/s"}
_BURST_SECONDS = 0.002
_MIN_BURST_BYTES = 64 * 1024  # the largest packet that a veth hands over at once


def tbf(bits_per_second: int) -> list[str]:
    """The token bucket that lets this many bits per second through, as `tc qdisc` takes it."""
    burst = max(int(bits_per_second / 8 * _BURST_SECONDS), _MIN_BURST_BYTES)
    return ["tbf", "rate", f"{bits_per_second}bit", "burst", f"{burst}b", "latency", "50ms"]


def ends(link: Link) -> list[tuple[str, str]]:
    """Namespace and device of both ends; the control side of the link has a namespace of its own."""
    assert link.control_namespace is not None
    return [(link.control_namespace, link.control_device), (link.host_namespace, link.host_device)]


@contextmanager
def shaped(link: Link, bits_per_second: int | None) -> Iterator[None]:
    """Slow both directions down while the block runs; None leaves the link bare."""
    if bits_per_second is None:
        yield
        return
    try:
        for namespace, device in ends(link):
            _tc("-n", namespace, "qdisc", "replace", "dev", device, "root", *tbf(bits_per_second))
        yield
    finally:
        for namespace, device in ends(link):
            subprocess.run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], check=False)


def sent_bytes(link: Link) -> int:
    """What the control end has sent since the link is there: frames, with all headers."""
    namespace, device = ends(link)[0]
    command = ["ip", "-json", "-statistics", "-n", namespace, "link", "show", "dev", device]
    (shown,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return int(shown["stats64"]["tx"]["bytes"])


def _tc(*arguments: str) -> None:
    subprocess.run(["tc", *arguments], check=True, capture_output=True, text=True)
