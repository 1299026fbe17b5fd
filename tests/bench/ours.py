"""Our own way, through the pieces that a deployment uses, without Prefect's starts of processes.

The one place that knows how the product sends. Run on the sending side and on the host:

python -m tests.bench.ours send <image reference> <port of a receiver> ... --address <host>
python -m tests.bench.ours load <deployment id>
python -m tests.bench.ours learn <image reference>
python -m tests.bench.ours export <image reference>
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blocks.remote_host import RemoteHost
    from receiver.contract import DeployAccepted
    from tasks.package import ImageMetadata
    from tasks.shared_package import SharedPackage
    from tests.bench.site import Site
    from tests.bench.ways import Sent

PROGRAM = "tests.bench.ours"
RECEIVER_PORT = 8001
_LIMIT_SECONDS = 3600


# -- what the benchmark calls --------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """Announce, export, upload and verify by a program on the sending side; then load on the host."""

    title: str = "**Gantry**"
    cases: Sequence[str] = ("small", "first", "same", "changed", "large")

    def prepare(self, site: Site) -> None:
        """Forget packages; the layers' digests stay known, as the sending engine remembers them, too."""
        shutil.rmtree(_home(site) / "packages", ignore_errors=True)

    def send(self, site: Site, reference: str) -> Sent:
        """Announce until verified, then load; the clock stands still while Python starts."""
        from tests.bench.ways import Sent

        receiver_pid = site.host.services["receiver"].pid
        forget_peak(receiver_pid)
        told = send_to(site, reference, [RECEIVER_PORT])
        parts = dict(told["parts"])
        (deployment_id,) = told["deployment_ids"]
        loaded = site.host.run(sys.executable, "-m", PROGRAM, "load", deployment_id, timeout=3600)
        parts["load"] = json.loads(loaded.stdout)["seconds"]
        learn(site, reference)
        return Sent(
            sum(parts.values()), parts, told["peak_bytes"], peak_bytes(receiver_pid), told["package_bytes"]
        )


def send_to(site: Site, reference: str, ports: Sequence[int]) -> dict[str, Any]:
    """Send to receivers on the host at once; returns what the program said when all had verified it."""
    where = ["--address", site.host.address]
    command = [sys.executable, "-m", PROGRAM, "send", reference, *map(str, ports), *where]
    home = {"GANTRY_HOME": str(_home(site))}
    said: dict[str, Any] = json.loads(site.control.run(*command, env=home, timeout=_LIMIT_SECONDS).stdout)
    return said


def learn(site: Site, reference: str) -> float:
    """What the flow `learn-layers` does after a deployment, beside everything; returns its seconds."""
    return _on_sending_side(site, "learn", reference)


def export(site: Site, reference: str) -> float:
    """Make the package for hosts that have nothing, as an earlier deployment would; returns its seconds."""
    return _on_sending_side(site, "export", reference)


def _on_sending_side(site: Site, action: str, reference: str) -> float:
    command = [sys.executable, "-m", PROGRAM, action, reference]
    home = {"GANTRY_HOME": str(_home(site))}
    return float(json.loads(site.control.run(*command, env=home, timeout=_LIMIT_SECONDS).stdout)["seconds"])


def _home(site: Site) -> Path:
    return site.control.folder / "bench-home"


def forget_peak(pid: int) -> None:
    """Let the process's peak of memory begin at what it has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int | str) -> int:
    """The most memory that the process had at once."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# -- the program on the sending side -------------------------------------------------------------


@dataclass
class _Clock:
    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - began


async def _send(reference: str, address: str, ports: Sequence[int]) -> dict[str, Any]:
    """In the order of a deployment: exported once, compressed and sent to all hosts at the same time."""
    import flows.deploy  # noqa: F401 - a flow run has it in memory
    from blocks.remote_host import RemoteHost
    from receiver.contract import HostState
    from tasks import builder, package

    hosts = [RemoteHost(address=address, port=port) for port in ports]
    image_id = str(builder.connect().images.get(reference).id)
    clock = _Clock()
    with clock.part("announce"):
        metadata = await asyncio.to_thread(package._inspect, image_id, reference)
        accepted = [await _announce(host, metadata) for host in hosts]
    pairs = zip(hosts, accepted, strict=True)
    lacking = [(host, one) for host, one in pairs if one.state is HostState.RECEIVING]
    sizes: list[int] = []
    if lacking:
        with clock.part("export and upload"):
            sizes = await asyncio.gather(*(_upload(host, one, metadata) for host, one in lacking))
    return {
        "parts": clock.parts,
        "deployment_ids": [one.deployment_id for one in accepted],
        "package_bytes": max(sizes, default=0),
        "peak_bytes": peak_bytes("self"),
    }


async def _announce(host: RemoteHost, metadata: ImageMetadata) -> DeployAccepted:
    from receiver.contract import DeployRequest
    from tasks.package import announce_image

    image = announce_image(metadata)
    name, tag = metadata.reference.split(":")
    request = DeployRequest(container_name=name, image_tag=tag, workflow_id=secrets.token_hex(8), image=image)
    async with host.receiver() as receiver:
        return await receiver.announce(request, secrets.token_hex(8))


def _package_of(
    image_id: str, reference: str, omitted: Sequence[str] = ()
) -> AbstractContextManager[SharedPackage]:
    from functools import partial

    from tasks import exports, shared_package

    key = shared_package.PackageKey(image_id, reference, tuple(sorted(omitted)))
    return shared_package.opened(key, partial(exports.open_export, image_id, reference, frozenset(omitted)))


async def _upload(host: RemoteHost, accepted: DeployAccepted, metadata: ImageMetadata) -> int:
    """Until the host has verified the whole package, of which the bytes are returned."""
    from blocks import package_stream
    from receiver.contract import HostState

    async with host.receiver() as receiver:
        with _package_of(metadata.image_id, metadata.reference, accepted.known_layers) as shared:
            await package_stream.send(receiver, accepted.deployment_id, shared)
            package = await shared.finished()
        status = await receiver.status(accepted.deployment_id)
    assert status.state is HostState.READY, status
    return package.size_bytes


async def _export(reference: str) -> dict[str, Any]:
    from tasks import builder

    image_id = str(builder.connect().images.get(reference).id)
    began = time.monotonic()
    with _package_of(image_id, reference) as shared:
        await shared.finished()
    return {"seconds": time.monotonic() - began}


# -- the program on the host ---------------------------------------------------------------------


async def _load(deployment_id: str) -> dict[str, Any]:
    """The step of `deploy_container` that loads and names the image; then the deployment is given up."""
    from tasks.hosting import this_host

    host = this_host()
    operations = host.operations(deployment_id)
    began = time.monotonic()
    await asyncio.to_thread(operations._load, operations.entry)
    seconds = time.monotonic() - began
    await host.abort(deployment_id)
    operations.package_path().unlink(missing_ok=True)
    return {"seconds": seconds}


async def _learn(reference: str) -> dict[str, Any]:
    """Of the layers of an image that was just deployed."""
    from tasks import builder
    from tasks.learning import learn_layers

    image_id = str(builder.connect().images.get(reference).id)
    began = time.monotonic()
    await asyncio.to_thread(learn_layers, image_id)
    return {"seconds": time.monotonic() - began}


def main(arguments: Sequence[str]) -> int:
    """Send or load; prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ours")
    actions = parser.add_subparsers(dest="action", required=True)
    send = actions.add_parser("send")
    send.add_argument("reference")
    send.add_argument("ports", nargs="+", type=int)
    send.add_argument("--address", required=True)
    actions.add_parser("load").add_argument("deployment_id")
    actions.add_parser("learn").add_argument("reference")
    actions.add_parser("export").add_argument("reference")
    asked = parser.parse_args(arguments)
    match asked.action:
        case "send":
            said = asyncio.run(_send(asked.reference, asked.address, asked.ports))
        case "load":
            said = asyncio.run(_load(asked.deployment_id))
        case "export":
            said = asyncio.run(_export(asked.reference))
        case _:
            said = asyncio.run(_learn(asked.reference))
    sys.stdout.write(json.dumps(said) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
