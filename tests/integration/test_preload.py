"""A package that the engine gets while it arrives: kept as the verified whole, named by its deployment."""

from __future__ import annotations

import asyncio
import fcntl
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from blake3 import blake3
from docker.errors import ImageNotFound
from zstandard import ZstdCompressor

from receiver import app as app_module
from receiver import preload
from receiver.contract import (
    DeploymentConfig,
    DeployRequest,
    ErrorCode,
    HealthCheckConfig,
    HostState,
    ImageAnnouncement,
    deploy_path,
)
from receiver.engine import Engine, PackageRefused
from receiver.operations import Operations
from receiver.packages import Packages
from receiver.preload import Preloads
from receiver.settings import from_environment
from tests.contract.caller import KEY, Caller, announcement
from tests.integration.host_rig import SERVE, Rig, host_rig, take, take_up_to

PIECES = 8


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One host for all tests here."""
    with host_rig() as found:
        yield found


@dataclass
class Arrival:
    """A deployment whose package comes in pieces, and the engine that gets it meanwhile."""

    rig: Rig
    image: ImageAnnouncement
    package: bytes
    operations: Operations
    packages: Packages
    preloads: Preloads
    work: threading.Thread | None = None
    sent: int = field(default=0)

    @property
    def deployment_id(self) -> str:
        """Of the deployment."""
        return self.operations.deployment_id

    async def send(self, pieces: int) -> None:
        """The next pieces, the first of which begins the work."""
        size = len(self.package) // PIECES + 1
        for _ in range(pieces):
            piece = self.package[self.sent : self.sent + size]
            await self.packages.append(self.deployment_id, self.sent, piece)
            self.sent += len(piece)
            if self.preloads.is_due(self.deployment_id, self.sent):
                self.work = self.begin()

    async def append_first(self) -> None:
        """One piece, with which nothing begins."""
        await self.packages.append(self.deployment_id, 0, self.package[:1000])

    def begin(self) -> threading.Thread | None:
        """Have the engine fed."""
        part = self.packages.part(self.deployment_id)
        return self.preloads.begin(self.deployment_id, part, self.rig.host.engine)

    async def end(self) -> None:
        """Until the engine is done."""
        assert self.work is not None
        await asyncio.to_thread(self.work.join, 30)
        assert not self.work.is_alive()

    def wait(self) -> None:
        """As the step that loads does."""
        preload.wait_until_fed(self.rig.host.settings.packages_dir, self.operations.entry)

    @property
    def is_loaded(self) -> bool:
        """Whether the engine has the image."""
        return self.rig.host.engine.find_image(self.image) is not None

    @property
    def is_marked(self) -> bool:
        """Whether there is a trace in the package folder."""
        return (self.rig.host.settings.packages_dir / f"{self.deployment_id}.ahead").exists()


def arrival(
    rig: Rig, content: Callable[[bytes], bytes] = lambda whole: whole, size_bytes: int | None = None
) -> Arrival:
    """Of an image that the engine does not have; `content` makes another archive of its own one."""
    version = f"v-{uuid4().hex[:10]}"
    built = rig.image(version)
    image = built.model_copy(update={"size_bytes": size_bytes or built.size_bytes})
    whole = content(b"".join(rig.docker.images.get(f"test:{version}").save(named=True)))
    rig.docker.images.remove(f"test:{version}")
    packages = Packages(rig.host.settings, rig.host.ledger)
    request = DeployRequest(
        container_name=f"svc-{uuid4().hex[:10]}",
        image_tag="v1",
        image=image,
        deployment_config=DeploymentConfig(command=SERVE, stop_timeout_seconds=1),
        health_check_config=HealthCheckConfig(health_endpoint=None, quiet_period_ms=100),
    )
    entry, _ = rig.host.ledger.create(request, HostState.RECEIVING)
    made = rig.host.operations(entry.deployment_id)
    preloads = Preloads(rig.host.settings.packages_dir, rig.host.ledger, from_bytes=1)
    return Arrival(rig, image, ZstdCompressor(write_checksum=True).compress(whole), made, packages, preloads)


async def test_the_image_is_there_without_a_name_when_the_whole_is_verified(rig: Rig) -> None:
    """Not before; then the deployment names and runs it without its package."""
    arriving = arrival(rig)
    await arriving.send(PIECES)
    await asyncio.sleep(0.5)
    assert not arriving.is_loaded
    await arriving.packages.announce(arriving.deployment_id, announcement(arriving.package))
    await asyncio.to_thread(arriving.wait)
    assert rig.docker.images.get(arriving.image.config_digest).tags == []
    arriving.operations.package_path().unlink()
    await take_up_to(arriving.operations, "start_container")
    made = rig.docker.containers.get(arriving.operations.entry.request.container_name)
    assert made.attrs["Image"] == arriving.image.config_digest
    assert made.image is not None
    assert made.image.tags == [f"{made.name}:v1"]


async def test_two_deployments_that_share_layers_arrive_at_once(rig: Rig) -> None:
    """Both images are there and run, each with its own and the common layers."""
    both = [arrival(rig), arrival(rig)]
    for _ in range(PIECES):
        for one in both:
            await one.send(1)
    for one in both:
        await one.packages.announce(one.deployment_id, announcement(one.package))
    await asyncio.gather(*(take_up_to(one.operations, "start_container") for one in both))
    assert set(both[0].image.layers) & set(both[1].image.layers)
    for one in both:
        made = rig.docker.containers.get(one.operations.entry.request.container_name)
        assert (made.attrs["Image"], made.status) == (one.image.config_digest, "running")


async def test_another_package_than_the_announced_one_is_not_kept(rig: Rig) -> None:
    """The host refuses it, and the engine forgets what it got."""
    arriving = arrival(rig)
    await arriving.send(PIECES)
    other = announcement(arriving.package).model_copy(update={"blake3": blake3(b"other").hexdigest()})
    with pytest.raises(Exception, match="BLAKE3"):
        await arriving.packages.announce(arriving.deployment_id, other)
    await arriving.end()
    assert (arriving.is_loaded, arriving.is_marked) == (False, False)


async def test_another_image_than_the_announced_one_is_not_kept(rig: Rig) -> None:
    """The step that loads it tells why."""
    evil = rig.image(f"v-{uuid4().hex[:10]}")
    tag = next(iter(rig.docker.images.get(evil.config_digest).tags))
    archive = b"".join(rig.docker.images.get(tag).save(named=True))
    rig.docker.images.remove(tag)
    arriving = arrival(rig, lambda _: archive)
    await arriving.send(PIECES)
    await arriving.packages.announce(arriving.deployment_id, announcement(arriving.package))
    await arriving.end()
    with pytest.raises(ImageNotFound):
        rig.docker.images.get(evil.config_digest)
    with pytest.raises(PackageRefused, match=evil.config_digest):
        await take(arriving.operations, "deploy_container")


@pytest.mark.parametrize("end", ["abort", "drop", "silence"])
async def test_an_upload_that_does_not_come_to_its_end_leaves_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Given up, begun anew, or without a sign of life."""
    monkeypatch.setattr(preload, "STALL_SECONDS", 0.5 if end == "silence" else 60.0)
    arriving = arrival(rig)
    await arriving.send(PIECES // 2)
    if end == "abort":
        await rig.host.abort(arriving.deployment_id)
    elif end == "drop":
        await arriving.packages.drop(arriving.deployment_id)
    await arriving.end()
    assert (arriving.is_loaded, arriving.is_marked) == (False, False)
    if end == "drop":
        arriving.sent = 0
    if end != "abort":
        await arriving.send(PIECES if end == "drop" else PIECES - PIECES // 2)
        await arriving.packages.announce(arriving.deployment_id, announcement(arriving.package))
        await take_up_to(arriving.operations, "start_container")
        assert arriving.is_loaded


async def test_bytes_that_are_dropped_before_the_engine_takes_any_are_not_waited_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a busy host: the package is open, and the ledger is asked for more only after the drop."""
    reading: Any = vars(preload)["_Arriving"]
    is_dropped, has_more = threading.Event(), vars(reading)["_has_more"]

    def has_more_late(arriving: Any) -> Any:
        is_dropped.wait(30)
        return has_more(arriving)

    monkeypatch.setattr(reading, "_has_more", has_more_late)
    arriving = arrival(rig)
    await arriving.send(1)
    await asyncio.sleep(1)
    await arriving.packages.drop(arriving.deployment_id)
    is_dropped.set()
    await arriving.end()
    assert (arriving.is_loaded, arriving.is_marked) == (False, False)


async def abort_all(rig: Rig) -> None:
    """What other tests left waiting."""
    for entry in rig.host.ledger.in_states(HostState.RECEIVING, HostState.READY, HostState.PREPARED):
        await rig.host.abort(entry.deployment_id)


async def loaded_ahead(rig: Rig) -> Arrival:
    """A deployment that is READY, whose image the engine has already."""
    await abort_all(rig)
    arriving = arrival(rig)
    await arriving.send(PIECES)
    await arriving.packages.announce(arriving.deployment_id, announcement(arriving.package))
    await arriving.end()
    assert (arriving.is_loaded, arriving.is_marked) == (True, True)
    return arriving


def clear(rig: Rig) -> None:
    """As a daemon does it that was started since."""
    fresh = Preloads(rig.host.settings.packages_dir, rig.host.ledger, from_bytes=1)
    fresh.clear(fresh.left(), rig.host.engine)


async def test_an_image_that_its_deployment_never_used_is_removed(rig: Rig) -> None:
    """Once it waits no more."""
    arriving = await loaded_ahead(rig)
    clear(rig)
    assert (arriving.is_loaded, arriving.is_marked) == (True, True)
    await rig.host.abort(arriving.deployment_id)
    clear(rig)
    assert (arriving.is_loaded, arriving.is_marked) == (False, False)


async def test_layers_that_another_deployment_counts_on_stay(rig: Rig) -> None:
    """It was told that the host has them, or is told so in this moment."""
    arriving = await loaded_ahead(rig)
    other = arrival(rig)
    await rig.host.abort(arriving.deployment_id)
    clear(rig)
    assert (arriving.is_loaded, arriving.is_marked) == (True, True)
    await rig.host.abort(other.deployment_id)
    fresh = Preloads(rig.host.settings.packages_dir, rig.host.ledger, from_bytes=1)
    fresh.spare(other.image)
    fresh.clear(fresh.left(), rig.host.engine)
    assert (arriving.is_loaded, arriving.is_marked) == (True, True)
    clear(rig)
    assert (arriving.is_loaded, arriving.is_marked) == (False, False)


async def test_a_deployment_that_failed_without_rollback_leaves_nothing(rig: Rig) -> None:
    """It stays as it failed; its image has no name."""
    arriving = await loaded_ahead(rig)
    arriving.operations.fail(ErrorCode.DEPLOYMENT_FAILED, "for the test")
    assert rig.state(arriving.operations) is HostState.FAILED
    clear(rig)
    assert (arriving.is_loaded, arriving.is_marked) == (False, False)


async def test_an_engine_without_room_is_not_fed(rig: Rig) -> None:
    """The deployment is refused in its own time, with the reason."""
    arriving = arrival(rig, size_bytes=2**60)
    await arriving.append_first()
    assert arriving.begin() is None
    assert not arriving.is_marked


async def test_a_thread_that_cannot_be_started_holds_up_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is free again, and so is the place."""
    arriving = arrival(rig)
    await arriving.append_first()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(preload.AT_ONCE + 1):
            with pytest.raises(RuntimeError):
                arriving.begin()
    arriving.wait()
    work = arriving.begin()
    assert work is not None
    await rig.host.abort(arriving.deployment_id)
    await asyncio.to_thread(work.join, 30)


async def test_a_daemon_that_stands_still_is_not_waited_for_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the deployment loads its package itself."""
    monkeypatch.setattr(preload, "WAIT_SECONDS", 0.3)
    arriving = arrival(rig)
    marker = rig.host.settings.packages_dir / f"{arriving.deployment_id}.ahead"
    with marker.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        arriving.wait()
    marker.unlink()


async def test_an_engine_that_breaks_off_after_the_end_may_have_kept_the_image(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is still known that one may be left."""
    await abort_all(rig)
    arriving = arrival(rig)
    load = type(rig.host.engine).load_nameless

    def break_off(engine: Engine, archive: Generator[bytes]) -> None:
        load(engine, archive)
        raise ConnectionError("for the test")

    monkeypatch.setattr(Engine, "load_nameless", break_off)
    await arriving.send(PIECES)
    await arriving.packages.announce(arriving.deployment_id, announcement(arriving.package))
    await arriving.end()
    assert (arriving.is_loaded, arriving.is_marked) == (True, True)
    await rig.host.abort(arriving.deployment_id)
    clear(rig)
    assert (arriving.is_loaded, arriving.is_marked) == (False, False)


def test_nothing_is_due_below_the_limit_nor_where_it_is_0(rig: Rig) -> None:
    """The limit is a setting of the host; what was tried once is not tried again."""
    some, none = (Preloads(rig.host.settings.packages_dir, rig.host.ledger, limit) for limit in (100, 0))
    assert [some.is_due("d", held) for held in (99, 100, 101)] == [False, True, False]
    assert not none.is_due("d", 10**12)


async def test_the_receiver_feeds_its_engine_by_itself(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the application: what the sender's requests bring is in the engine a moment after the last."""
    monkeypatch.setattr(preload, "SPARED_SECONDS", 0.0)
    await abort_all(rig)
    arriving = arrival(rig)
    settings = from_environment(
        {
            "HMAC_SECRET_KEY": KEY.decode(),
            "IP_WHITELIST": "127.0.0.0/8",
            "HOOK_RECEIVER_STATE_DIR": str(rig.host.settings.state_dir),
            "DOCKER_HOST": rig.host.settings.docker_host,
            "HOOK_RECEIVER_LOAD_AHEAD_BYTES": "1",
        }
    )
    app = app_module.create_app(settings, ledger=rig.host.ledger, engine=rig.host.engine)
    caller, size = Caller(app), len(arriving.package) // 2 + 1
    for offset in (0, size):
        piece = arriving.package[offset : offset + size]
        assert (await caller.patch(arriving.deployment_id, offset, piece)).status_code == 204
    assert arriving.is_marked
    path = deploy_path(arriving.deployment_id, "package")
    told = announcement(arriving.package).model_dump_json().encode()
    assert (await caller.call("POST", path, told)).status_code == 200
    await asyncio.to_thread(arriving.wait)
    assert arriving.is_loaded
    await rig.host.abort(arriving.deployment_id)
    await app.state.service.sweep()
    assert (arriving.is_loaded, arriving.is_marked) == (False, False)
