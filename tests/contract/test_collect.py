"""A package that rsync brought: the receiver owns the bytes before it verifies them, and follows no link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from receiver import contract, disk, incoming, packages
from receiver.app import Service
from receiver.contract import ErrorCode, HostState, Transport
from receiver.ledger import utc_now
from receiver.settings import ReceiverSettings, SettingsRefused
from tests.contract.caller import REQUEST, Caller, announcement, slug

PACKAGE = bytes(range(256)) * 12_000
OTHER = PACKAGE[:-1] + b"x"


async def announced(caller: Caller, package: bytes = PACKAGE) -> tuple[str, Path]:
    """A deployment whose package is to come by rsync: its id, and where the package may be put."""
    request = REQUEST.model_copy(update={"package": announcement(package), "transport": Transport.RSYNC})
    answer = contract.DeployAccepted.model_validate_json((await caller.announce(request)).content)
    assert answer.incoming_path is not None
    return answer.deployment_id, Path(answer.incoming_path)


def collect_path(deployment_id: str) -> str:
    """Target of the call."""
    return contract.deploy_path(deployment_id, "collect")


def store(caller: Caller) -> packages.Packages:
    """The application's own packages."""
    service: Service = caller.app.state.service
    return service.packages


async def assert_waits(caller: Caller, deployment_id: str) -> None:
    """Nothing was decided: the package may come still, and nothing of it was taken."""
    status = await caller.status(deployment_id)
    assert (status.state, status.upload_offset) == (HostState.RECEIVING, 0)


async def test_a_collected_package_is_ready_and_a_copy(caller: Caller, settings: ReceiverSettings) -> None:
    """The announcement names a path of this deployment alone; what is kept is the receiver's own file."""
    deployment_id, path = await announced(caller)
    assert path == settings.state_dir / "incoming" / deployment_id / "package.tar"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_bytes(PACKAGE)
    with path.open("r+b") as still_open:
        response = await caller.call("POST", collect_path(deployment_id))
        still_open.write(b"after the verification")
    told = contract.DeploymentStatus.model_validate_json(response.content)
    assert (response.status_code, told.state, told.upload_offset) == (200, HostState.READY, len(PACKAGE))
    kept = settings.packages_dir / f"{deployment_id}.tar"
    assert kept.read_bytes() == PACKAGE
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert list(settings.incoming_dir.iterdir()) == []
    again = await caller.call("POST", collect_path(deployment_id))
    assert (again.status_code, again.json()["state"]) == (200, "ready_for_deployment")
    text = (await caller.send("GET", contract.METRICS_PATH)).text
    assert f"gantry_receiver_upload_bytes_total {len(PACKAGE)}" in text
    assert 'gantry_receiver_packages_total{outcome="ready"} 1' in text


async def test_only_a_signed_call_collects(caller: Caller) -> None:
    """Whoever can put a file there cannot have it deployed."""
    deployment_id, path = await announced(caller)
    path.write_bytes(PACKAGE)
    unsigned = await caller.send("POST", collect_path(deployment_id))
    assert (unsigned.status_code, slug(unsigned)) == (401, "signature-missing")
    stranger = Caller(caller.app, key=b"another key of thirty-two bytes or more")
    foreign = await stranger.call("POST", collect_path(deployment_id))
    assert (foreign.status_code, slug(foreign)) == (401, "invalid-signature")
    await assert_waits(caller, deployment_id)


async def test_http_is_the_default_and_names_no_path(caller: Caller, settings: ReceiverSettings) -> None:
    """No folder is opened that nobody asked for."""
    request = REQUEST.model_copy(update={"package": announcement(PACKAGE)})
    assert (await caller.announce(request)).json()["incoming_path"] is None
    assert list(settings.incoming_dir.iterdir()) == []


async def test_wrong_bytes_are_rejected_and_deleted(caller: Caller, settings: ReceiverSettings) -> None:
    """A package that is not the announced one can never be deployed, whichever way it came."""
    deployment_id, path = await announced(caller)
    path.write_bytes(OTHER)
    response = await caller.call("POST", collect_path(deployment_id))
    assert (response.status_code, slug(response)) == (422, "package-digest-mismatch")
    status = await caller.status(deployment_id)
    assert (status.state, status.error_code) == (HostState.REJECTED, ErrorCode.TRANSFER_FAILED)
    assert [*settings.packages_dir.iterdir(), *settings.incoming_dir.iterdir()] == []
    again = await caller.call("POST", collect_path(deployment_id))
    assert (again.status_code, slug(again)) == (409, "not-receiving")


@pytest.mark.parametrize("package", [None, b"", PACKAGE[:-1], PACKAGE + b"x"])
async def test_a_file_of_another_size_may_still_become_the_package(
    caller: Caller, package: bytes | None
) -> None:
    """Nothing, a part or too much is refused without a verdict: rsync can go on from there."""
    deployment_id, path = await announced(caller)
    if package is not None:
        path.write_bytes(package)
    response = await caller.call("POST", collect_path(deployment_id))
    assert (response.status_code, slug(response)) == (409, "package-incomplete")
    await assert_waits(caller, deployment_id)
    path.write_bytes(PACKAGE)
    assert (await caller.call("POST", collect_path(deployment_id))).status_code == 200


def _link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def _second_name(path: Path, target: Path) -> None:
    path.hardlink_to(target)


def _pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path, _: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("plant", [_link, _second_name, _pipe, _folder])
async def test_what_is_no_plain_file_is_not_followed(
    caller: Caller, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    """Not even a link to the right bytes: the receiver may read more than the SSH user."""
    target = tmp_path / "secret"
    target.write_bytes(PACKAGE)
    deployment_id, path = await announced(caller)
    plant(path, target)
    response = await caller.call("POST", collect_path(deployment_id))
    assert (response.status_code, slug(response)) == (422, "foreign-file")
    await assert_waits(caller, deployment_id)
    assert target.read_bytes() == PACKAGE


@pytest.mark.parametrize("moment", ["before the copy", "after the copy"])
async def test_a_file_that_is_replaced_meanwhile_changes_nothing_that_was_verified(
    caller: Caller, settings: ReceiverSettings, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Its bytes are either in the copy, and the copy is rejected, or they come too late to matter."""
    deployment_id, path = await announced(caller)
    path.write_bytes(PACKAGE)
    copy = incoming.copy

    def meddle(source: int, target: int, size_bytes: int) -> None:
        if moment == "before the copy":
            path.write_bytes(OTHER)
        copy(source, target, size_bytes)
        path.write_bytes(OTHER)
        path.with_name("new").write_bytes(OTHER)
        path.with_name("new").rename(path)

    monkeypatch.setattr(incoming, "copy", meddle)
    response = await caller.call("POST", collect_path(deployment_id))
    kept = settings.packages_dir / f"{deployment_id}.tar"
    if moment == "before the copy":
        assert slug(response) == "package-digest-mismatch"
        assert not kept.exists()
    else:
        assert response.json()["state"] == "ready_for_deployment"
        assert kept.read_bytes() == PACKAGE


async def test_a_file_that_shrinks_under_the_copy_is_incomplete(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy ends where the file ends; it is not waited for, and not padded."""
    deployment_id, path = await announced(caller)
    path.write_bytes(PACKAGE)
    check = incoming._check_size

    def check_and_shrink(size_bytes: int, announced_bytes: int) -> None:
        check(size_bytes, announced_bytes)
        os.truncate(path, 1000)

    monkeypatch.setattr(incoming, "_check_size", check_and_shrink)
    response = await caller.call("POST", collect_path(deployment_id))
    assert (response.status_code, slug(response)) == (409, "package-incomplete")
    assert "1000 bytes have arrived" in response.json()["detail"]


async def test_a_package_that_is_being_taken_over_is_asked_for_again_later(caller: Caller) -> None:
    """A caller whose answer was lost may come back while the first call still works."""
    deployment_id, path = await announced(caller)
    path.write_bytes(PACKAGE)
    with store(caller)._only_writer(deployment_id):
        response = await caller.call("POST", collect_path(deployment_id))
    assert (response.status_code, slug(response)) == (503, "being-collected")
    assert response.headers["Retry-After"] == "5"
    assert (await caller.call("POST", collect_path(deployment_id))).status_code == 200


async def test_a_sender_that_started_again_goes_on_with_the_file_that_arrived(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new deployment of the same package finds in its own folder what rsync had brought for a dead one."""
    orphan, old_path = await announced(caller)
    old_path.write_bytes(PACKAGE[:1_000_000])
    monkeypatch.setattr(packages, "ORPHANED_AFTER", timedelta(0))
    heir, path = await announced(caller)
    assert path.read_bytes() == PACKAGE[:1_000_000]
    assert (await caller.status(orphan)).state is HostState.ABORTED
    assert not old_path.parent.exists()
    path.write_bytes(PACKAGE)
    assert (await caller.call("POST", collect_path(heir))).status_code == 200


async def test_a_file_that_still_grows_is_left_to_its_sender(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rsync tells the ledger nothing: what it wrote a moment ago keeps the deployment alive, for days too."""
    alive, path = await announced(caller)
    path.write_bytes(PACKAGE[:1000])
    long_ago = utc_now() - timedelta(hours=30)
    monkeypatch.setattr(packages, "ORPHANED_AFTER", timedelta(seconds=60))
    ledger = store(caller)._ledger
    ledger._db.execute("UPDATE deployments SET updated_at = ?", (long_ago.isoformat(),))
    _, other_path = await announced(caller)
    await store(caller).sweep()
    assert not other_path.exists()
    assert (await caller.status(alive)).state is HostState.RECEIVING
    assert path.stat().st_size == 1000


async def test_the_sweep_deletes_folders_that_nobody_needs_and_nothing_else(
    caller: Caller, settings: ReceiverSettings
) -> None:
    """Those of ended and unknown deployments go; one that waits, and what is none of ours, stays."""
    _, waiting = await announced(caller)
    ended, path = await announced(caller)
    path.write_bytes(OTHER)
    await caller.call("POST", collect_path(ended))
    for name in (ended, "0" * 8 + "-0000-0000-0000-" + "0" * 12):
        (settings.incoming_dir / name).mkdir()
        (settings.incoming_dir / name / "package.tar").write_bytes(b"left")
    (settings.incoming_dir / "notes").mkdir()
    assert await store(caller).sweep() == 2
    assert {left.name for left in settings.incoming_dir.iterdir()} == {waiting.parent.name, "notes"}


async def test_an_abort_deletes_what_arrived(caller: Caller, settings: ReceiverSettings) -> None:
    """At once, and not with the next sweep."""
    deployment_id, path = await announced(caller)
    path.write_bytes(PACKAGE)
    response = await caller.call("POST", contract.deploy_path(deployment_id, "abort"))
    assert response.json()["state"] == "aborted"
    assert list(settings.incoming_dir.iterdir()) == []


async def test_room_is_asked_for_both_copies_before_a_byte_is_sent(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host with room for one of them refuses rsync, says what for, and takes the package by HTTP."""
    free_bytes = len(PACKAGE) + len(PACKAGE) // 2 + disk.RESERVE_BYTES
    tight = os.statvfs_result((1, 1, free_bytes, free_bytes, free_bytes, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: tight)
    request = REQUEST.model_copy(update={"package": announcement(PACKAGE)})
    refused = await caller.announce(request.model_copy(update={"transport": Transport.RSYNC}))
    assert (refused.status_code, slug(refused)) == (507, "insufficient-storage")
    assert "the package as rsync brings it" in refused.json()["detail"]
    assert (await caller.announce(request)).status_code == 201


async def test_a_disk_that_fills_up_under_the_copy_keeps_what_arrived(
    caller: Caller, settings: ReceiverSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """507, no half copy holds the room, and the same call goes through once there is some."""
    deployment_id, path = await announced(caller)
    path.write_bytes(PACKAGE)
    failures = iter([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
    sync = os.fdatasync

    def full_once(descriptor: int) -> None:
        for failure in failures:
            raise failure
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", full_once)
    response = await caller.call("POST", collect_path(deployment_id))
    assert (response.status_code, slug(response)) == (507, "insufficient-storage")
    assert (settings.packages_dir / f"{deployment_id}.part").stat().st_size == 0
    assert (await caller.call("POST", collect_path(deployment_id))).status_code == 200


async def test_a_shared_incoming_folder_gives_its_group_the_deployment_s_folder_alone(
    caller: Caller, settings: ReceiverSettings
) -> None:
    """The SSH user may be another one; where it could swap folders, the daemon does not start."""
    settings.incoming_dir.chmod(0o2750)
    _, path = await announced(caller)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o2770
    settings.make_folders()
    settings.incoming_dir.chmod(0o2770)
    with pytest.raises(SettingsRefused, match=r"HOOK_RECEIVER_INCOMING_DIR.*chmod 2750"):
        settings.make_folders()
