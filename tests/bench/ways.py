"""The ways to bring an image to a host without Gantry, each as people type it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from shutil import which
from typing import Protocol

from deployments.lab_processes import wait_until
from tests.bench import images
from tests.bench.images import DOCKER
from tests.bench.site import Site

REGISTRY = "docker-registry"
REGISTRY_PORT = 5000
CASES: Mapping[str, str] = {
    "small": images.SMALL,
    "first": images.FIRST,
    "same": images.FIRST,
    "changed": images.CHANGED,
    "large": images.LARGE,
}
"""What is sent in each case, in this order: after `first` the host has what the later ones build upon."""
_WHOLE_IMAGE = ("small", "first", "changed")


@dataclass(frozen=True)
class Sent:
    """One transfer: seconds until the host's engine has the image, of which parts; peaks of memory."""

    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)
    sender_peak_bytes: int | None = None
    receiver_peak_bytes: int | None = None
    package_bytes: int | None = None


class Way(Protocol):
    """One way: `prepare` before a round, then `send` for each of its cases."""

    @property
    def title(self) -> str:
        """How the table calls it."""

    @property
    def cases(self) -> Sequence[str]:
        """Those of `CASES` that it is measured in."""

    def prepare(self, site: Site) -> None:
        """Forget everything that was sent before."""

    def send(self, site: Site, reference: str) -> Sent:
        """Bring the image to the host's engine."""


@dataclass(frozen=True)
class Piped:
    """`docker save` into `docker load` through filters; what the host has already travels again."""

    title: str
    pack: str
    unpack: str
    cases: Sequence[str] = _WHOLE_IMAGE

    def prepare(self, site: Site) -> None:
        """Nothing is kept between transfers."""

    def send(self, site: Site, reference: str) -> Sent:
        """In one line."""
        line = f"{DOCKER} save {reference} {self.pack} | {site.over_ssh(f'{self.unpack}{DOCKER} load -q')}"
        return timed(lambda: site.at_control(line))


@dataclass(frozen=True)
class Rsynced:
    """The archive by rsync, compressed by zstd on the way; the one sent before lies there, for its delta."""

    title: str = "rsync of the archive, `docker load`"
    cases: Sequence[str] = _WHOLE_IMAGE

    def prepare(self, site: Site) -> None:
        """Remove both archives."""
        for node in (site.control, site.host):
            (node.folder / "bench.tar").unlink(missing_ok=True)

    def send(self, site: Site, reference: str) -> Sent:
        """Save, copy, load."""
        here, there = site.control.folder / "bench.tar", site.host.folder / "bench.tar"
        packed = "--compress --compress-choice=zstd --compress-level=1"
        copy = f"rsync {packed} -e '{site.ssh_command()}' {here} root@{site.host.address}:{there}"
        load = site.over_ssh(f"{DOCKER} load -q -i {there}")
        return timed(lambda: site.at_control(f"{DOCKER} save -o {here} {reference}; {copy}; {load}"))


@dataclass(frozen=True)
class Registry:
    """Push to a registry on the host, pull from there by the host's loopback."""

    title: str = "push to `docker-registry`, pull"
    cases: Sequence[str] = tuple(CASES)

    def prepare(self, site: Site) -> None:
        """Start it with nothing in it."""
        folder = site.host.folder / "registry"
        if REGISTRY in site.host.services:
            site.host.services[REGISTRY].stop()
        site.host.run("rm", "-rf", str(folder))
        folder.mkdir()
        (folder / "config.yml").write_text(registry_config(str(folder / "blobs")))
        service = site.host.spawn(REGISTRY, REGISTRY, "serve", str(folder / "config.yml"))
        url = f"http://127.0.0.1:{REGISTRY_PORT}/v2/"
        wait_until(
            lambda: site.host.get(url).status == 200, REGISTRY, deadline_seconds=20, services=[service]
        )

    def send(self, site: Site, reference: str) -> Sent:
        """Push, then pull."""
        pushed = f"{site.host.address}:{REGISTRY_PORT}/{reference}"
        push = timed(lambda: site.at_control(f"{DOCKER} tag {reference} {pushed}; {DOCKER} push -q {pushed}"))
        pulled = f"127.0.0.1:{REGISTRY_PORT}/{reference}"
        pull = timed(lambda: site.host.run(DOCKER, "pull", "-q", pulled, timeout=3600))
        return Sent(push.seconds + pull.seconds, {"push": push.seconds, "pull": pull.seconds})


def registry_config(folder: str) -> str:
    """Configuration of a registry that keeps its blobs in `folder`."""
    return (
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}}}}}\n"
        f"http: {{addr: '0.0.0.0:{REGISTRY_PORT}'}}\n"
    )


def timed(action: Callable[[], object]) -> Sent:
    """Do it, and say how long it took."""
    began = time.monotonic()
    action()
    return Sent(time.monotonic() - began)


RIVALS: Mapping[str, Way] = {
    "gzip": Piped("`docker save \\| gzip \\| ssh docker load`", "| gzip", ""),
    "plain": Piped("`docker save \\| ssh docker load`", "", ""),
    "zstd": Piped("`docker save \\| zstd -1 \\| ssh ... \\| docker load`", "| zstd -1 -q", "zstd -dcq | "),
    "rsync": Rsynced(),
    "registry": Registry(),
}


def missing_programs(names: Sequence[str]) -> list[str]:
    """Debian's packages that lack here, for these ways."""
    needed = {"zstd": ("zstd", "zstd"), "rsync": ("rsync", "rsync"), "registry": (REGISTRY, REGISTRY)}
    return [package for name, (program, package) in needed.items() if name in names and not which(program)]
