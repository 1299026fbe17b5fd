"""The package's way to the host: chunks, resuming, verification, clearing up."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest

from receiver import contract, packages
from receiver.app import Service
from receiver.contract import ErrorCode, HostState
from receiver.ledger import utc_now
from receiver.settings import ReceiverSettings
from tests.contract.caller import REQUEST, Caller, FakeEngine, announcement, slug
from tests.contract.conftest import MakeApp

PACKAGE = bytes(range(256)) * 12_000
CHUNK_BYTES = 1_000_000
CHUNKS = [PACKAGE[start : start + CHUNK_BYTES] for start in range(0, len(PACKAGE), CHUNK_BYTES)]


def files(settings: ReceiverSettings) -> list[str]:
    """What lies in the package folder, by suffix."""
    return sorted(path.suffix for path in settings.packages_dir.iterdir())


async def test_a_package_in_chunks_becomes_ready_after_its_last_byte_only(
    caller: Caller, settings: ReceiverSettings
) -> None:
    """`ready_for_deployment` means: every byte is here and the whole BLAKE3 matched."""
    deployment_id = await caller.announce_upload(PACKAGE)
    offset = 0
    for chunk in CHUNKS:
        assert (await caller.status(deployment_id)).state is HostState.RECEIVING
        response = await caller.patch(deployment_id, offset, chunk)
        offset += len(chunk)
        assert (response.status_code, response.headers["Upload-Offset"]) == (204, str(offset))
    status = await caller.status(deployment_id)
    assert (status.state, status.upload_offset) == (HostState.READY, len(PACKAGE))
    assert (settings.packages_dir / f"{deployment_id}.tar").read_bytes() == PACKAGE
    assert files(settings) == [".tar"]


async def test_an_upload_goes_on_after_the_daemon_started_again(make_app: MakeApp) -> None:
    """HEAD tells a new process's caller where to go on; nothing is sent twice."""
    first = Caller(make_app())
    deployment_id = await first.announce_upload(PACKAGE)
    await first.patch(deployment_id, 0, CHUNKS[0])
    caller = Caller(make_app())
    head = await caller.call("HEAD", contract.deploy_path(deployment_id, "package"))
    assert head.status_code == 200
    assert head.headers["Upload-Offset"] == str(CHUNK_BYTES)
    assert head.headers["Upload-Length"] == str(len(PACKAGE))
    await caller.patch(deployment_id, CHUNK_BYTES, PACKAGE[CHUNK_BYTES:])
    assert (await caller.status(deployment_id)).state is HostState.READY


async def test_a_sender_that_started_again_goes_on_with_what_the_host_holds(
    caller: Caller, settings: ReceiverSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new deployment of the same package takes over the bytes that a dead sender left."""
    monkeypatch.setattr(packages, "ORPHANED_AFTER", timedelta(0))
    orphan = await caller.announce_upload(PACKAGE)
    await caller.patch(orphan, 0, CHUNKS[0])
    heir = await caller.announce_upload(PACKAGE)
    head = await caller.call("HEAD", contract.deploy_path(heir, "package"))
    assert head.headers["Upload-Offset"] == str(CHUNK_BYTES)
    await caller.patch(heir, CHUNK_BYTES, PACKAGE[CHUNK_BYTES:])
    assert (await caller.status(heir)).state is HostState.READY
    assert (await caller.status(orphan)).upload_offset == 0
    assert files(settings) == [".tar"]


async def test_a_sender_that_still_sends_keeps_its_bytes(caller: Caller) -> None:
    """Only an upload that has been silent for a while is taken over."""
    alive = await caller.announce_upload(PACKAGE)
    await caller.patch(alive, 0, CHUNKS[0])
    other = await caller.announce_upload(PACKAGE)
    assert (await caller.status(other)).upload_offset == 0
    assert (await caller.patch(alive, CHUNK_BYTES, CHUNKS[1])).status_code == 204


async def test_what_a_dead_process_wrote_past_the_offset_is_cut_off(
    make_app: MakeApp, settings: ReceiverSettings
) -> None:
    """Bytes that the ledger does not vouch for never become part of the package."""
    caller = Caller(make_app())
    deployment_id = await caller.announce_upload(PACKAGE)
    await caller.patch(deployment_id, 0, CHUNKS[0])
    with (settings.packages_dir / f"{deployment_id}.part").open("ab") as part:
        part.write(b"torn" * len(PACKAGE))
    await caller.patch(deployment_id, CHUNK_BYTES, PACKAGE[CHUNK_BYTES:])
    assert (await caller.status(deployment_id)).state is HostState.READY


async def test_a_process_that_died_before_ready_lets_the_last_chunk_come_again(
    make_app: MakeApp, settings: ReceiverSettings
) -> None:
    """The file had its new name already, the ledger did not know: sending the last chunk again is enough."""
    caller = Caller(make_app())
    deployment_id = await caller.announce_upload(PACKAGE)
    await caller.patch(deployment_id, 0, CHUNKS[0])
    part = settings.packages_dir / f"{deployment_id}.part"
    part.write_bytes(PACKAGE)
    part.rename(part.with_suffix(".tar"))
    await Caller(make_app()).patch(deployment_id, CHUNK_BYTES, PACKAGE[CHUNK_BYTES:])
    assert (await caller.status(deployment_id)).state is HostState.READY
    assert files(settings) == [".tar"]


async def test_a_part_file_that_is_gone_starts_the_upload_anew(
    caller: Caller, settings: ReceiverSettings
) -> None:
    """A disk that lost the bytes is told to the sender as the offset to go on from."""
    deployment_id = await caller.announce_upload(PACKAGE)
    await caller.patch(deployment_id, 0, CHUNKS[0])
    (settings.packages_dir / f"{deployment_id}.part").unlink()
    response = await caller.patch(deployment_id, CHUNK_BYTES, CHUNKS[1])
    assert (response.status_code, response.headers["Upload-Offset"]) == (409, "0")
    await caller.patch(deployment_id, 0, PACKAGE)
    assert (await caller.status(deployment_id)).state is HostState.READY


async def test_one_flipped_bit_rejects_the_package_and_deletes_it(
    caller: Caller, settings: ReceiverSettings
) -> None:
    """A package that is not the announced one can never be deployed."""
    deployment_id = await caller.announce_upload(PACKAGE)
    flipped = bytes([PACKAGE[0] ^ 1]) + PACKAGE[1:]
    response = await caller.patch(deployment_id, 0, flipped)
    assert (response.status_code, slug(response)) == (422, "package-digest-mismatch")
    status = await caller.status(deployment_id)
    assert (status.state, status.error_code) == (HostState.REJECTED, ErrorCode.TRANSFER_FAILED)
    assert files(settings) == []
    again = await caller.patch(deployment_id, 0, PACKAGE)
    assert (again.status_code, slug(again)) == (409, "not-receiving")
    assert "Upload-Offset" not in again.headers  # nothing to go on with


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES + 1])
async def test_a_wrong_offset_is_answered_with_the_right_one(caller: Caller, offset: int) -> None:
    """A sender that lost an answer finds its place, and the bytes on the host stay as they are."""
    deployment_id = await caller.announce_upload(PACKAGE)
    await caller.patch(deployment_id, 0, CHUNKS[0])
    response = await caller.patch(deployment_id, offset, CHUNKS[1])
    assert (response.status_code, slug(response)) == (409, "wrong-offset")
    assert response.headers["Upload-Offset"] == str(CHUNK_BYTES)
    await caller.patch(deployment_id, CHUNK_BYTES, PACKAGE[CHUNK_BYTES:])
    assert (await caller.status(deployment_id)).state is HostState.READY


async def test_the_last_chunk_sent_again_is_told_that_all_is_here(caller: Caller) -> None:
    """A sender whose last answer was lost sees the whole length as the offset."""
    deployment_id = await caller.announce_upload(PACKAGE)
    await caller.patch(deployment_id, 0, PACKAGE)
    response = await caller.patch(deployment_id, 0, PACKAGE)
    assert (response.status_code, response.headers["Upload-Offset"]) == (409, str(len(PACKAGE)))


async def test_more_bytes_than_announced_are_refused(caller: Caller) -> None:
    """The announced size is a promise, and it was checked against the disk."""
    deployment_id = await caller.announce_upload(PACKAGE)
    response = await caller.patch(deployment_id, 0, PACKAGE + b"x")
    assert (response.status_code, slug(response)) == (413, "beyond-announced-size")
    assert (await caller.status(deployment_id)).upload_offset == 0


async def test_a_second_writer_is_told_to_wait_its_turn(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks at once never mix; the loser gets the offset."""
    deployment_id = await caller.announce_upload(PACKAGE)
    store, inner = _store(caller), list[Exception]()
    write = packages._write

    def write_and_try_again(descriptor: int, offset: int, chunk: bytes) -> None:
        try:
            store._append(deployment_id, offset, chunk)
        except packages.UploadBusy as exc:
            inner.append(exc)
        write(descriptor, offset, chunk)

    monkeypatch.setattr(packages, "_write", write_and_try_again)
    assert (await caller.patch(deployment_id, 0, CHUNKS[0])).status_code == 204
    assert isinstance(inner[0], packages.OffsetRefused)  # told as 409 with Upload-Offset


@pytest.mark.parametrize(("turn_seconds", "status"), [(20.0, 204), (0.05, 409)])
async def test_the_next_chunk_waits_while_the_one_before_is_written(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, turn_seconds: float, status: int
) -> None:
    """A sender may send it ahead; it is not kept waiting for ever, and loses nothing by being refused."""
    deployment_id = await caller.announce_upload(PACKAGE)
    is_writing, may_end = threading.Event(), threading.Event()
    write = packages._write

    def write_slowly(descriptor: int, offset: int, chunk: bytes) -> None:
        is_writing.set()
        may_end.wait(20)
        write(descriptor, offset, chunk)

    monkeypatch.setattr(packages, "_write", write_slowly)
    monkeypatch.setattr(packages, "TURN_SECONDS", turn_seconds)
    first = asyncio.create_task(caller.patch(deployment_id, 0, CHUNKS[0]))
    await asyncio.to_thread(is_writing.wait, 20)
    following = asyncio.create_task(caller.patch(deployment_id, CHUNK_BYTES, CHUNKS[1]))
    await asyncio.wait([following], timeout=0.2)
    assert following.done() is (status == 409)
    may_end.set()
    assert [(await first).status_code, (await following).status_code] == [204, status]
    offset = CHUNK_BYTES * (2 if status == 204 else 1)
    await caller.patch(deployment_id, offset, PACKAGE[offset:])
    assert (await caller.status(deployment_id)).state is HostState.READY


@pytest.mark.parametrize(("arrival_seconds", "status"), [(20.0, 204), (0.05, 409)])
async def test_a_chunk_that_is_here_before_the_one_before_it_waits_for_that(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, arrival_seconds: float, status: int
) -> None:
    """A short one may overtake a long one; not for ever, as the host may have lost bytes."""
    deployment_id = await caller.announce_upload(PACKAGE)
    monkeypatch.setattr(packages, "ARRIVAL_SECONDS", arrival_seconds)
    following = asyncio.create_task(caller.patch(deployment_id, CHUNK_BYTES, CHUNKS[1]))
    await asyncio.wait([following], timeout=0.3)
    assert following.done() is (status == 409)
    first = await caller.patch(deployment_id, 0, CHUNKS[0])
    assert [first.status_code, (await following).status_code] == [204, status]


async def test_an_offset_that_is_no_number_is_malformed(caller: Caller) -> None:
    """The header is needed and counts bytes."""
    deployment_id = await caller.announce_upload(PACKAGE)
    path = contract.deploy_path(deployment_id, "package")
    for headers in ({}, {"Upload-Offset": "-1"}, {"Upload-Offset": "1e3"}):
        response = await caller.call("PATCH", path, b"x", headers)
        assert (response.status_code, slug(response)) == (422, "malformed-request")


async def test_a_late_announcement_is_taken_once(caller: Caller) -> None:
    """The same announcement again is fine; another one is refused."""
    deployment_id = str((await caller.announce()).json()["deployment_id"])
    path = contract.deploy_path(deployment_id, "package")
    body = announcement(PACKAGE).model_dump_json().encode()
    for _ in range(2):
        response = await caller.call("POST", path, body)
        assert response.status_code == 200
        assert contract.DeployAccepted.model_validate_json(response.content).upload_offset == 0
    other = await caller.call("POST", path, announcement(b"other").model_dump_json().encode())
    assert (other.status_code, slug(other)) == (409, "announcement-conflict")
    await caller.patch(deployment_id, 0, PACKAGE)
    assert (await caller.status(deployment_id)).state is HostState.READY
    assert (await caller.call("POST", path, body)).status_code == 200


async def test_a_package_larger_than_the_host_takes_is_refused_at_once(caller: Caller) -> None:
    """Both the first and the late announcement are checked before a byte is sent."""
    huge = announcement(PACKAGE).model_copy(update={"size_bytes": 64 * 1024 * 1024 + 1})
    response = await caller.announce(REQUEST.model_copy(update={"package": huge}))
    assert (response.status_code, slug(response)) == (413, "package-too-large")
    deployment_id = str((await caller.announce()).json()["deployment_id"])
    path = contract.deploy_path(deployment_id, "package")
    late = await caller.call("POST", path, huge.model_dump_json().encode())
    assert (late.status_code, slug(late)) == (413, "package-too-large")


async def test_a_disk_without_room_refuses_the_announcement(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host says how much it has, before the sender sends for nothing; a known request stays known."""
    request = REQUEST.model_copy(update={"package": announcement(PACKAGE)})
    assert (await caller.announce(request, key="known")).status_code == 201
    full = os.statvfs_result((4096, 4096, 1000, 10, 10, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    response = await caller.announce(request, key="new")
    assert (response.status_code, slug(response)) == (507, "insufficient-storage")
    assert "bytes free" in response.json()["detail"]
    assert (await caller.announce(request, key="known")).status_code == 200


def _fail_once(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Make one of the disk's calls fail once, as a full disk does, after half of the bytes."""
    real: Callable[..., Any] = getattr(os, call)
    failures = iter([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])

    def failing(descriptor: int, *rest: Any) -> Any:
        if call == "pwrite":
            real(descriptor, rest[0][: len(rest[0]) // 2], *rest[1:])
        for failure in failures:
            raise failure
        return real(descriptor, *rest)

    monkeypatch.setattr(os, call, failing)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
async def test_a_disk_that_fills_up_leaves_the_offset_as_it_was(
    caller: Caller, settings: ReceiverSettings, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """507, the half write is undone, and the same chunk goes through once there is room."""
    deployment_id = await caller.announce_upload(PACKAGE)
    await caller.patch(deployment_id, 0, CHUNKS[0])
    _fail_once(monkeypatch, call)
    response = await caller.patch(deployment_id, CHUNK_BYTES, CHUNKS[1])
    assert (response.status_code, slug(response)) == (507, "insufficient-storage")
    assert "No space left" in response.json()["detail"]
    assert (await caller.status(deployment_id)).upload_offset == CHUNK_BYTES
    assert (settings.packages_dir / f"{deployment_id}.part").stat().st_size == CHUNK_BYTES
    await caller.patch(deployment_id, CHUNK_BYTES, PACKAGE[CHUNK_BYTES:])
    assert (await caller.status(deployment_id)).state is HostState.READY


async def test_an_aborted_upload_leaves_no_file(caller: Caller, settings: ReceiverSettings) -> None:
    """Abort ends the deployment and deletes what came; twice is the same."""
    deployment_id = await caller.announce_upload(PACKAGE)
    await caller.patch(deployment_id, 0, CHUNKS[0])
    for _ in range(2):
        response = await caller.call("POST", contract.deploy_path(deployment_id, "abort"))
        assert (response.status_code, response.json()["state"]) == (200, "aborted")
    assert files(settings) == []
    assert slug(await caller.patch(deployment_id, CHUNK_BYTES, CHUNKS[1])) == "not-receiving"


async def test_the_sweep_deletes_only_what_nobody_needs(caller: Caller, settings: ReceiverSettings) -> None:
    """Files of unknown or settled deployments go, those on their way stay."""
    store = _store(caller)
    arriving, whole = await caller.announce_upload(PACKAGE), await caller.announce_upload(PACKAGE)
    await caller.patch(arriving, 0, CHUNKS[0])
    await caller.patch(whole, 0, PACKAGE)
    (settings.packages_dir / "unknown.part").write_bytes(b"x")
    assert await store.sweep() == 1
    assert files(settings) == [".part", ".tar"]


async def test_an_upload_that_nobody_goes_on_with_is_given_up(
    caller: Caller, settings: ReceiverSettings
) -> None:
    """After a day without a byte the deployment is aborted, with the reason, and its bytes are freed."""
    arriving, whole = await caller.announce_upload(PACKAGE), await caller.announce_upload(PACKAGE)
    await caller.patch(whole, 0, PACKAGE)
    await _store(caller).sweep(utc_now() + timedelta(hours=23))
    assert (await caller.status(arriving)).state is HostState.RECEIVING
    await _store(caller).sweep(utc_now() + timedelta(hours=25))
    for deployment_id in (arriving, whole):
        status = await caller.status(deployment_id)
        assert (status.state, status.error_code) == (HostState.ABORTED, ErrorCode.TIMEOUT)
        assert status.error_message == "nothing happened for 24 h"
    assert files(settings) == []


async def test_metrics_count_bytes_and_packages(caller: Caller, engine: FakeEngine) -> None:
    """Bytes taken, and how packages ended."""
    await caller.patch(await caller.announce_upload(PACKAGE), 0, PACKAGE)
    await caller.patch(await caller.announce_upload(PACKAGE), 0, PACKAGE[1:] + b"x")
    text = (await caller.send("GET", contract.METRICS_PATH)).text
    for line in (
        f"gantry_receiver_upload_bytes_total {len(PACKAGE)}",
        'gantry_receiver_packages_total{outcome="ready"} 1',
        'gantry_receiver_packages_total{outcome="rejected"} 1',
    ):
        assert line in text.splitlines()
    assert _samples(text.splitlines()) > 5


def _samples(lines: Sequence[str]) -> int:
    """Lines that are well-formed samples; a malformed one raises."""
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")]
    return len(values)


def _store(caller: Caller) -> packages.Packages:
    service: Service = caller.app.state.service
    return service.packages
