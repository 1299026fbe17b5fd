"""A package that arrives before it is announced: the sender still makes it while it sends."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
from blake3 import blake3

from receiver import contract, packages
from receiver.contract import ErrorCode, HostState, ImageAnnouncement, PackageAnnouncement
from receiver.settings import ReceiverSettings
from tests.contract.caller import REQUEST, Caller, FakeEngine, announcement, slug
from tests.contract.conftest import MakeApp

PACKAGE = bytes(range(256)) * 12_000
HALF = len(PACKAGE) // 2
LAYERS = [f"sha256:{digit * 64}" for digit in "ab"]
IMAGE = ImageAnnouncement(
    config_digest="sha256:" + "c" * 64, layers=LAYERS, architecture="amd64", size_bytes=len(PACKAGE)
)
WITH_IMAGE = REQUEST.model_copy(update={"image": IMAGE})


async def opened(caller: Caller) -> str:
    """A deployment whose package is not announced."""
    return str((await caller.announce(WITH_IMAGE)).json()["deployment_id"])


async def announce_package(caller: Caller, deployment_id: str, package: PackageAnnouncement) -> int:
    """Announce it now; the answer's status."""
    path = contract.deploy_path(deployment_id, "package")
    return (await caller.call("POST", path, package.model_dump_json().encode())).status_code


async def held(caller: Caller, deployment_id: str) -> tuple[int, str | None]:
    """What the host holds: bytes and their BLAKE3."""
    response = await caller.call("HEAD", contract.deploy_path(deployment_id, "package"))
    return int(response.headers["Upload-Offset"]), response.headers.get("Upload-BLAKE3")


async def test_a_package_that_came_before_its_announcement_is_verified_by_it(
    caller: Caller, settings: ReceiverSettings
) -> None:
    """Hashed as it came: the announcement alone makes it ready, without a byte more."""
    deployment_id = await opened(caller)
    assert await held(caller, deployment_id) == (0, blake3().hexdigest())
    for start in (0, HALF):
        assert (await caller.patch(deployment_id, start, PACKAGE[start : start + HALF])).status_code == 204
        assert await held(caller, deployment_id) == (
            start + HALF,
            blake3(PACKAGE[: start + HALF]).hexdigest(),
        )
    assert (await caller.status(deployment_id)).state is HostState.RECEIVING
    assert await announce_package(caller, deployment_id, announcement(PACKAGE)) == 200
    assert (await caller.status(deployment_id)).state is HostState.READY
    assert (settings.packages_dir / f"{deployment_id}.tar").read_bytes() == PACKAGE


async def test_an_announcement_in_the_middle_of_the_upload_is_as_good(make_app: MakeApp) -> None:
    """Also when the daemon was started again in between, and its hash is lost: the file is read once."""
    first = Caller(make_app())
    deployment_id = await opened(first)
    await first.patch(deployment_id, 0, PACKAGE[:HALF])
    caller = Caller(make_app())
    assert await announce_package(caller, deployment_id, announcement(PACKAGE)) == 200
    assert await held(caller, deployment_id) == (HALF, blake3(PACKAGE[:HALF]).hexdigest())
    await caller.patch(deployment_id, HALF, PACKAGE[HALF:])
    assert (await caller.status(deployment_id)).state is HostState.READY


@pytest.mark.parametrize("told", [PACKAGE[:-1] + b"x", PACKAGE[:-1]], ids=["other bytes", "too short"])
async def test_a_late_announcement_of_other_bytes_rejects_the_package(
    caller: Caller, settings: ReceiverSettings, told: bytes
) -> None:
    """What came can never be deployed, and is gone."""
    deployment_id = await opened(caller)
    await caller.patch(deployment_id, 0, PACKAGE)
    assert await announce_package(caller, deployment_id, announcement(told)) == 422
    status = await caller.status(deployment_id)
    assert (status.state, status.error_code) == (HostState.REJECTED, ErrorCode.TRANSFER_FAILED)
    assert list(settings.packages_dir.iterdir()) == []


async def test_bytes_that_are_not_the_sender_s_are_dropped_on_request(caller: Caller) -> None:
    """Then the upload begins anew; a package that was taken is not given up."""
    deployment_id = await opened(caller)
    path = contract.deploy_path(deployment_id, "package")
    await caller.patch(deployment_id, 0, b"of another export")
    assert (await caller.call("DELETE", path)).status_code == 204
    assert await held(caller, deployment_id) == (0, blake3().hexdigest())
    await caller.patch(deployment_id, 0, PACKAGE)
    await announce_package(caller, deployment_id, announcement(PACKAGE))
    refused = await caller.call("DELETE", path)
    assert (refused.status_code, slug(refused)) == (409, "not-receiving")


async def test_a_dead_sender_s_bytes_of_the_same_image_go_to_the_next_one(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the digest by which it knows them for its own; those of another image stay where they are."""
    monkeypatch.setattr(packages, "ORPHANED_AFTER", timedelta(0))
    orphan = await opened(caller)
    await caller.patch(orphan, 0, PACKAGE[:HALF])
    other = IMAGE.model_copy(update={"config_digest": "sha256:" + "d" * 64})
    foreign = REQUEST.model_copy(update={"container_name": "other", "image": other})
    stranger = str((await caller.announce(foreign)).json()["deployment_id"])
    assert (await held(caller, stranger))[0] == 0
    assert await held(caller, await opened(caller)) == (HALF, blake3(PACKAGE[:HALF]).hexdigest())


async def test_a_package_without_end_is_refused_before_it_fills_the_disk(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the largest package that is taken, and by the disk's free room; the offset stays."""
    deployment_id = await opened(caller)
    await caller.patch(deployment_id, 0, PACKAGE)
    monkeypatch.setattr(caller.app.state.service.packages, "_max_bytes", len(PACKAGE) + 1)
    refused = await caller.patch(deployment_id, len(PACKAGE), b"xx")
    assert (refused.status_code, slug(refused)) == (413, "package-too-large")
    full = os.statvfs_result((4096, 4096, 1000, 10, 10, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    refused = await caller.patch(deployment_id, len(PACKAGE), b"x")
    assert (refused.status_code, slug(refused)) == (507, "insufficient-storage")
    assert (await caller.status(deployment_id)).upload_offset == len(PACKAGE)


async def test_only_layers_that_the_engine_has_may_be_left_out(caller: Caller, engine: FakeEngine) -> None:
    """One that went meanwhile refuses the announcement, and the deployment can announce another package."""
    engine.layers = tuple(LAYERS)
    accepted = contract.DeployAccepted.model_validate_json((await caller.announce(WITH_IMAGE)).content)
    assert accepted.known_layers == LAYERS
    engine.layers = (LAYERS[0],)
    path = contract.deploy_path(accepted.deployment_id, "package")
    wanted = announcement(PACKAGE).model_copy(update={"omitted_layers": LAYERS})
    refused = await caller.call("POST", path, wanted.model_dump_json().encode())
    assert (refused.status_code, slug(refused)) == (409, "omitted-layers-unknown")
    assert LAYERS[1] in refused.json()["detail"]
    fewer = announcement(PACKAGE).model_copy(update={"omitted_layers": LAYERS[:1]})
    assert await announce_package(caller, accepted.deployment_id, fewer) == 200
