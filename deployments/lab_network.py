"""Network of a lab: namespaces, point-to-point links, and cuts.

Every command holds the guard as its stdin, so the reaper waits for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from deployments.lab_http import NAMESPACES
from deployments.lab_processes import LabNotReady

LAB_NETWORK = ipaddress.IPv4Network("10.213.0.0/16")


class NetworkCommandFailed(LabNotReady):
    """A command that builds the lab's network failed; see its message, and that the caller is root"""


class NoFreeSubnet(LabNotReady):
    """No subnet is free on this machine; remove old labs, or the route or VPN that takes them"""


@dataclass(frozen=True)
class Link:
    """A veth pair: the control end (.1) and the host end (.2) of one /24."""

    subnet: ipaddress.IPv4Network
    control_device: str
    host_device: str
    control_namespace: str | None
    host_namespace: str

    @property
    def control_address(self) -> str:
        """Address of the control end."""
        return str(self.subnet[1])

    @property
    def host_address(self) -> str:
        """Address of the host end."""
        return str(self.subnet[2])


def add_namespace(name: str, guard: int) -> None:
    """Make namespace `name` with its loopback up."""
    _ip(guard, "netns", "add", name)
    _ip(guard, "-n", name, "link", "set", "lo", "up")


def add_link(link: Link, guard: int) -> None:
    """Make the pair, give both ends their address and set them up."""
    control = ("netns", link.control_namespace) if link.control_namespace else ()
    peer = ("peer", "name", link.host_device, "netns", link.host_namespace)
    _ip(guard, "link", "add", link.control_device, *control, "type", "veth", *peer)
    for namespace, device, address in (
        (link.control_namespace, link.control_device, link.control_address),
        (link.host_namespace, link.host_device, link.host_address),
    ):
        inside = ("-n", namespace) if namespace else ()
        _ip(guard, *inside, "addr", "add", f"{address}/24", "dev", device)
        _ip(guard, *inside, "link", "set", device, "up")


def add_route(link: Link, destination: str, guard: int) -> None:
    """Let the host of `link` reach one more address of the control side."""
    _ip(guard, "-n", link.host_namespace, "route", "add", destination, "via", link.control_address)


@contextlib.contextmanager
def choosing_subnets() -> Iterator[None]:
    """Hold while a subnet of this namespace is chosen and taken: two labs must not choose the same."""
    handle = os.open(NAMESPACES, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def subnet(number: int) -> ipaddress.IPv4Network:
    """The /24 of 10.213.0.0/16 with this number, for labs whose control side has a namespace of its own."""
    return list(LAB_NETWORK.subnets(new_prefix=24))[number]


def free_subnet() -> ipaddress.IPv4Network:
    """A random /24 of 10.213.0.0/16 that no route or address of this namespace overlaps."""
    taken = _taken_networks()
    free = [net for net in LAB_NETWORK.subnets(new_prefix=24) if not any(map(net.overlaps, taken))]
    if not free:
        raise NoFreeSubnet(f"every /24 of {LAB_NETWORK} overlaps a route")
    return random.choice(free)  # noqa: S311 - spreads labs, guards nothing


def _taken_networks() -> list[ipaddress.IPv4Network]:
    routes = json.loads(_output("ip", "-j", "-4", "route", "show", "table", "all"))
    links = json.loads(_output("ip", "-j", "-4", "address", "show"))
    texts = [route["dst"] for route in routes if route["dst"] != "default"]
    texts += [f"{info['local']}/{info['prefixlen']}" for link in links for info in link.get("addr_info", ())]
    return [ipaddress.IPv4Network(text, strict=False) for text in texts]


def cut(link: Link, guard: int, *, incoming: bool, outgoing: bool) -> None:
    """Drop silently what arrives at, or leaves from, the host end; containers' traffic too."""
    for chain, device in _cut_rules(link, incoming=incoming, outgoing=outgoing):
        _checked(_iptables(guard, link, "-I", chain, *device, "-j", "DROP"))


def heal(link: Link, guard: int) -> None:
    """Take away every rule that `cut` made; nothing happens when there is none."""
    for chain, device in _cut_rules(link, incoming=True, outgoing=True):
        while _iptables(guard, link, "-D", chain, *device, "-j", "DROP").returncode == 0:
            pass


def _cut_rules(link: Link, *, incoming: bool, outgoing: bool) -> Iterator[tuple[str, tuple[str, str]]]:
    """Table mangle sees packets before Docker's DNAT, and those that the host only forwards."""
    if incoming:
        yield "PREROUTING", ("-i", link.host_device)
    if outgoing:
        yield "POSTROUTING", ("-o", link.host_device)


def _ip(guard: int, *arguments: str) -> None:
    _checked(subprocess.run(["ip", *arguments], stdin=guard, check=False, capture_output=True, text=True))


def _iptables(guard: int, link: Link, *arguments: str) -> subprocess.CompletedProcess[str]:
    inside = ["nsenter", f"--net={NAMESPACES / link.host_namespace}", "--"]
    command = [*inside, "iptables", "-w", "5", "-t", "mangle", *arguments]
    return subprocess.run(command, stdin=guard, check=False, capture_output=True, text=True)


def _checked(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        raise NetworkCommandFailed(" ".join(done.args), done.stderr.strip())


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
