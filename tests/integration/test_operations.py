"""What is done to containers, on a real engine: the old or the new version serves, whatever fails."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import socket
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from docker.errors import ImageNotFound
from docker.models.containers import Container

from receiver import operations as module
from receiver.archive import rebuilt
from receiver.contract import (
    LABEL_CONTAINER,
    LABEL_IMAGE_TAG,
    ErrorCode,
    HealthCheckConfig,
    HostState,
    PackageAnnouncement,
    PackageFormat,
)
from receiver.engine import PackageRefused, PortTaken
from receiver.health import ContainerUnwell
from receiver.ledger import StateConflict
from receiver.operations import Operations, RestoreFailed, StepFailed
from tests.consul import documented_consul, instances
from tests.integration.host_rig import (
    BASE_IMAGE,
    SERVE,
    STEPS,
    Rig,
    announced,
    assert_serves,
    host_rig,
    take,
    take_up_to,
)

S = HostState
DEADLINE_SECONDS = 15


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One host for all tests here; each has container names of its own."""
    with host_rig() as found:
        yield found


@pytest.fixture(autouse=True)
def _short_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restored container is looked at again after 0.2 s instead of 1 s."""
    monkeypatch.setattr(module, "RESTORED_QUIET_SECONDS", 0.2)


@pytest.fixture
def name() -> str:
    """A container name of the test's own."""
    return f"svc-{uuid4().hex[:10]}"


def wait_for(fact: Callable[[], bool], what: str) -> None:
    """Return when the fact holds; fail at the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not fact():
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS} s: {what}"
        time.sleep(0.05)


# -- the good way ----------------------------------------------------------------------------------


async def test_versions_replace_each_other_and_two_previous_ones_are_kept(rig: Rig, name: str) -> None:
    """Exactly one runs, two are kept for rollback, the rest goes with its image; foreign things stay."""
    neighbour = rig.serve(f"{name}-previous-mine")
    neighbour.kill()
    made = [(await rig.deploy(name, f"r{number}")).entry for number in range(1, 5)]
    ids = [entry.facts.container_id for entry in made]
    for entry, previous in zip(made[1:], ids[:-1], strict=True):
        assert entry.state is S.KEPT
        assert entry.facts.previous_container_id == previous
        assert entry.facts.service_interruption_ms is not None
    running = rig.docker.containers.get(name)
    assert (running.id, running.status) == (ids[3], "running")
    assert running.attrs["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert "COLOUR=blue" in running.attrs["Config"]["Env"]
    kept = [rig.docker.containers.get(f"{name}-previous-{str(each)[:8]}") for each in ids[1:3]]
    assert [each.status for each in kept] == ["exited", "exited"]
    assert {each.attrs["HostConfig"]["RestartPolicy"]["Name"] for each in kept} == {"no"}
    assert len(rig.names(name)) == 4
    assert f"{name}-previous-mine" in rig.names(name)
    with pytest.raises(ImageNotFound):
        rig.docker.images.get(f"{name}:r1")
    assert rig.docker.images.get(f"{name}:r2")
    assert rig.docker.images.get(BASE_IMAGE)


async def test_every_step_taken_twice_is_harmless(rig: Rig, name: str) -> None:
    """The second time each step finds its work done; there is still one new and one old container."""
    old = rig.serve(name)
    operations = rig.announce(name)
    for step in STEPS:
        await take(operations, step)
        started = operations.entry.facts.container_started_at
        await take(operations, step)
        assert operations.entry.facts.container_started_at == started
    assert rig.state(operations) is S.KEPT
    assert rig.names(name) == sorted([name, f"{name}-previous-{str(old.id)[:8]}"])
    assert rig.docker.containers.get(name).id == operations.entry.facts.container_id


async def test_an_image_that_other_containers_use_keeps_all_its_names(rig: Rig, name: str) -> None:
    """Retiring a container with the same image as the running one must not untag that image."""
    first = await rig.deploy(name, "v1")
    image_id = str(first.entry.facts.image_id)
    before = rig.docker.images.get(image_id).tags
    assert len(before) > 1
    assert not rig.host.engine.remove_our_image(image_id)
    assert rig.docker.images.get(image_id).tags == before


async def test_the_health_endpoint_is_asked_where_the_host_reaches_it(rig: Rig, name: str) -> None:
    """On the host itself, a published port answers and the deployment is kept."""
    script = (
        "import asyncio, sys\nfrom pathlib import Path\n"
        "from tests.integration.host_rig import open_host, take_up_to\n"
        "host = open_host(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "asyncio.run(take_up_to(host.operations(sys.argv[3]), 'keep'))\n"
    )
    operations = rig.announce(
        name,
        health=HealthCheckConfig(health_endpoint="/health", quiet_period_ms=100),
        command=["/bin/sh", "-c", "mkdir /www; echo ok > /www/health; exec httpd -f -p 80 -h /www"],
        port_mappings=[{"host_port": 18991, "container_port": 80}],
    )
    done = rig.node.run(
        rig.node.site.python,
        "-c",
        script,
        str(rig.host.settings.state_dir),
        str(rig.node.docker_socket),
        operations.deployment_id,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    status = rig.host.ledger.status(operations.deployment_id)
    assert status.state is S.KEPT
    assert [attempt.status_code for attempt in status.health_attempts] == [200]
    assert status.facts.health_endpoint_accessible is True


def test_the_bridge_of_a_container_is_known(rig: Rig, name: str) -> None:
    """By its network; one without a bridge of this machine has none."""
    network = rig.docker.networks.create(name, driver="bridge")
    modes = {"bridge": "docker0", "host": None, "none": None, name: f"br-{str(network.id)[:12]}"}
    try:
        for mode, expected in modes.items():
            made = rig.docker.containers.create(BASE_IMAGE, SERVE, network_mode=mode)
            assert rig.host.engine.bridge(str(made.id)) == expected
            beside = rig.docker.containers.create(BASE_IMAGE, SERVE, network_mode=f"container:{made.id}")
            assert rig.host.engine.bridge(str(beside.id)) is None
            beside.remove()
            made.remove()
    finally:
        network.remove()


# -- packages --------------------------------------------------------------------------------------


@pytest.fixture
def version() -> str:
    """A version of the test's own, so that its image may go."""
    return f"v-{uuid4().hex[:10]}"


def move_to_package(rig: Rig, version: str, package: Path) -> None:
    """`docker save`, and the image leaves the engine."""
    with package.open("wb") as file:
        for piece in rig.docker.images.get(f"test:{version}").save():
            file.write(piece)
    rig.docker.images.remove(f"test:{version}")


async def test_the_package_is_loaded_when_the_engine_lacks_the_image(
    rig: Rig, name: str, version: str
) -> None:
    """The container runs the image of the package."""
    operations = rig.announce(name, version)
    move_to_package(rig, version, operations.package_path())
    await take_up_to(operations, "retire")
    announced = operations.entry.request.image
    assert announced is not None
    assert rig.docker.containers.get(name).attrs["Image"] == announced.config_digest
    assert not operations.package_path().exists()


async def test_a_package_with_another_image_is_refused_before_it_is_loaded(
    rig: Rig, name: str, version: str
) -> None:
    """Nothing reaches the engine, and the old container serves untouched."""
    old = rig.serve(name)
    other = rig.image(f"{version}-evil")
    operations = rig.announce(name, version)
    rig.docker.images.remove(f"test:{version}")
    move_to_package(rig, f"{version}-evil", operations.package_path())
    with pytest.raises(PackageRefused, match=other.config_digest):
        await take(operations, "deploy_container")
    with pytest.raises(ImageNotFound):
        rig.docker.images.get(other.config_digest)
    assert_serves(rig, old, name)


async def test_a_package_without_the_layers_that_the_engine_has_is_loaded(
    rig: Rig, name: str, version: str
) -> None:
    """Compressed, and of the image nothing but what it is: the layers are those of the base image."""
    operations = rig.announce(name, version)
    announced = rig.image(version)
    bare = io.BytesIO()
    whole = io.BytesIO(b"".join(rig.docker.images.get(f"test:{version}").save()))
    for block in rebuilt(whole, lambda _: None, lambda member, _: member.name.endswith("layer.tar")):
        bare.write(block)
    rig.docker.images.remove(f"test:{version}")
    operations.package_path().write_bytes(gzip.compress(bare.getvalue()))
    package = PackageAnnouncement(
        size_bytes=1, blake3="0" * 64, format=PackageFormat.GZIP, omitted_layers=announced.layers
    )
    rig.host.ledger.set_package(operations.deployment_id, package)
    await take_up_to(operations, "retire")
    assert rig.docker.containers.get(name).attrs["Image"] == announced.config_digest


async def test_a_layer_that_went_after_it_was_left_out_is_told_and_nothing_is_touched(
    rig: Rig, name: str, version: str
) -> None:
    """The next step is to deploy again; the old container serves."""
    old = rig.serve(name)
    operations = rig.announce(name, version)
    move_to_package(rig, version, operations.package_path())
    gone = "sha256:" + "f" * 64
    package = PackageAnnouncement(size_bytes=1, blake3="0" * 64, omitted_layers=[gone])
    rig.host.ledger.set_package(operations.deployment_id, package)
    with pytest.raises(StepFailed, match=f"gone from it .{gone}.*deploy again"):
        await take(operations, "deploy_container")
    assert_serves(rig, old, name)


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "manifest of numbers"])
async def test_a_damaged_package_is_refused_and_not_loaded(
    rig: Rig, name: str, version: str, damage: str
) -> None:
    """Each kind of damage is a refusal with a reason, never a stray exception."""
    operations = rig.announce(name, version)
    path = operations.package_path()
    move_to_package(rig, version, path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "garbage":
        path.write_bytes(b"\x1f\x8b" + b"\x00" * 4096)
    else:
        with tarfile.open(path, "w") as archive:
            content = json.dumps([1]).encode()
            member = tarfile.TarInfo("manifest.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(PackageRefused):
        await take(operations, "deploy_container")
    assert rig.names(name) == []


async def test_a_layer_that_changed_on_the_host_s_disk_is_refused(
    rig: Rig, name: str, version: str, tmp_path: Path
) -> None:
    """After the package was verified: the engine proves each layer, and the old container serves."""
    old = rig.serve(name)
    secret = os.urandom(64).hex()
    (tmp_path / "Dockerfile").write_text(f"FROM {BASE_IMAGE}\nRUN echo {secret} > /content\n")
    image, _ = rig.docker.images.build(path=str(tmp_path), tag=f"test:{version}", rm=True)
    rig.images[version] = announced(image)
    operations = rig.announce(name, version)
    package = operations.package_path()
    move_to_package(rig, version, package)
    content = package.read_bytes()
    at = content.index(f"{secret}\n\0".encode())
    package.write_bytes(content[:at] + b"x" + content[at + 1 :])
    with pytest.raises(PackageRefused, match=r"the engine refuses the package: .*diffID"):
        await take(operations, "deploy_container")
    with pytest.raises(ImageNotFound):
        rig.docker.images.get(str(image.id))
    assert_serves(rig, old, name)


# -- the way back ----------------------------------------------------------------------------------


async def _in_mid_switch(operations: Operations, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Stop short at the first `call` of the switch, as a process that died there."""

    def die(*_: object) -> None:
        raise ConnectionAbortedError("died here")

    await take(operations, "deploy_container")
    with monkeypatch.context() as patch:
        patch.setattr(type(operations.engine), call, die)
        with pytest.raises(ConnectionAbortedError):
            await take(operations, "stop_existing_container")


PLACES = ["prepared", "stopping", "stopped", "renamed", "validating", "failed", "restoring"]


async def bring_to(place: str, operations: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a deployment to a place on its way and leave it there."""
    if place == "prepared":
        await take_up_to(operations, "deploy_container")
    elif place == "stopping":
        await _in_mid_switch(operations, monkeypatch, "stop")
    elif place == "stopped":
        await _in_mid_switch(operations, monkeypatch, "rename")
    elif place == "renamed":
        await take_up_to(operations, "stop_existing_container")
    else:
        await take_up_to(operations, "start_container")
    if place == "failed":
        operations.fail(ErrorCode.HEALTH_CHECK_FAILED, "HTTP 500, expected 200")
    if place == "restoring":
        operations.ledger.move(operations.deployment_id, S.RESTORING)
        operations.engine.stop(str(operations.entry.facts.container_id), 0)


@pytest.mark.parametrize(
    ("end", "place"),
    [
        *(("restore", place) for place in PLACES),
        *(("abort", place) for place in ("prepared", "renamed", "validating", "failed")),
    ],
)
async def test_the_old_container_serves_again_wherever_the_deployment_stood(
    rig: Rig, name: str, place: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process, name and policy are back, nothing of ours is left, and doing it again changes nothing."""
    old = rig.serve(name)
    operations = rig.announce(name)
    await bring_to(place, operations, monkeypatch)
    undo: Callable[[str], Awaitable[object]] = getattr(rig.host, end)
    await undo(operations.deployment_id)
    assert rig.state(operations) is S.RESTORED
    assert_serves(rig, old, name)
    facts = operations.entry.facts
    assert facts.previous_container_restored is (place != "prepared")
    started_at = rig.fresh(old).attrs["State"]["StartedAt"]
    await undo(operations.deployment_id)
    assert rig.fresh(old).attrs["State"]["StartedAt"] == started_at
    if place == "failed":
        assert operations.entry.error_code is ErrorCode.HEALTH_CHECK_FAILED
        assert facts.log_tail == "serving\n"


@pytest.mark.parametrize("state", [S.RECEIVING, S.READY])
async def test_an_abort_before_the_first_step_needs_no_undoing(rig: Rig, name: str, state: HostState) -> None:
    """The deployment is aborted, the running container is not even looked at."""
    old = rig.serve(name)
    operations = rig.announce(name, state=state)
    assert (await rig.host.abort(operations.deployment_id)).state is S.ABORTED
    assert (await rig.host.abort(operations.deployment_id)).state is S.ABORTED
    assert_serves(rig, old, name)


@pytest.mark.parametrize("end", ["restore", "abort"])
async def test_a_container_that_the_ledger_never_heard_of_goes_too(
    rig: Rig, name: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that died between creating the container and recording it leaves nothing behind."""
    operations = rig.announce(name)

    def die(*_: object, **__: object) -> None:
        raise ConnectionAbortedError("died here")

    with monkeypatch.context() as patch:
        patch.setattr(type(operations.ledger), "move", die)
        with pytest.raises(ConnectionAbortedError):
            await take(operations, "deploy_container")
    assert rig.names(name) == [f"{name}-next-{operations.deployment_id[:8]}"]
    await getattr(rig.host, end)(operations.deployment_id)
    assert rig.names(name) == []


async def test_undoing_what_is_over_changes_nothing(rig: Rig, name: str) -> None:
    """Kept stays kept: an abort with nothing under way must not take the service down."""
    operations = await rig.deploy(name, "v1")
    before = rig.docker.containers.get(name).attrs["State"]
    assert (await rig.host.restore(operations.deployment_id)).state is S.KEPT
    assert (await rig.host.abort(operations.deployment_id)).state is S.KEPT
    assert rig.docker.containers.get(name).attrs["State"] == before


async def test_a_late_step_of_a_restored_deployment_is_refused(rig: Rig, name: str) -> None:
    """Fencing: what the guardian settled stays settled, and the old container is not stopped again."""
    old = rig.serve(name)
    operations = rig.announce(name)
    await take(operations, "deploy_container")
    await rig.host.restore(operations.deployment_id)
    for step in STEPS:
        with pytest.raises(StateConflict):
            await take(operations, step)
        assert_serves(rig, old, name)


async def test_a_policy_that_is_not_the_default_comes_back(rig: Rig, name: str) -> None:
    """`on-failure:4` of a container that we did not make is on-failure:4 afterwards."""
    old = rig.docker.containers.create(
        BASE_IMAGE,
        ["sleep", "1000"],
        name=name,
        restart_policy={"Name": "on-failure", "MaximumRetryCount": 4},
    )
    old.start()
    operations = rig.announce(name)
    await take_up_to(operations, "start_container")
    assert rig.fresh(old).attrs["HostConfig"]["RestartPolicy"]["Name"] == "no"
    await rig.host.restore(operations.deployment_id)
    assert_serves(rig, old, name, "on-failure")
    assert rig.fresh(old).attrs["HostConfig"]["RestartPolicy"]["MaximumRetryCount"] == 4


async def test_a_previous_container_that_was_stopped_stays_stopped(rig: Rig, name: str) -> None:
    """Restoring gives back what was there, and that was a stopped container."""
    old = rig.serve(name, "always")
    old.stop()
    operations = rig.announce(name)
    await take_up_to(operations, "start_container")
    await rig.host.restore(operations.deployment_id)
    now = rig.fresh(old)
    assert (now.name, now.status) == (name, "exited")
    assert now.attrs["HostConfig"]["RestartPolicy"]["Name"] == "always"


async def test_a_container_that_always_restarts_stays_down_when_it_failed(rig: Rig, name: str) -> None:
    """A crash loop is not taken for health, and is gone after the restore, its last words kept."""
    old = rig.serve(name)
    operations = rig.announce(name, restart_policy="always", command=["/bin/sh", "-c", "echo boom; exit 3"])
    await take_up_to(operations, "start_container")
    with pytest.raises(ContainerUnwell, match=r"restart|exit code 3"):
        await take(operations, "check_container_status")
    operations.fail(ErrorCode.HEALTH_CHECK_FAILED, "it restarts")
    await rig.host.restore(operations.deployment_id)
    assert_serves(rig, old, name)
    assert "boom" in operations.entry.facts.log_tail


async def test_a_container_that_dies_after_its_checks_is_not_kept(rig: Rig, name: str) -> None:
    """Healthy a moment ago is not enough for `kept`."""
    operations = rig.announce(name, restart_policy="no")
    await take_up_to(operations, "verify_service_registration")
    rig.docker.containers.get(name).kill()
    with pytest.raises(ContainerUnwell):
        await operations.keep()
    assert rig.state(operations) is S.VALIDATING


async def test_an_unreadable_log_does_not_stand_in_the_way(rig: Rig, name: str) -> None:
    """A log driver that cannot be read costs the log tail, not the restore."""
    mute = rig.serve(name, log_config={"Type": "none"})
    assert rig.host.engine.log_tail(str(mute.id)) == ""


async def test_a_previous_container_that_was_removed_is_told_and_the_new_one_left(
    rig: Rig, name: str
) -> None:
    """Nothing can be brought back, so the new one is not stopped: something may still serve."""
    old = rig.serve(name)
    operations = rig.announce(name)
    await take_up_to(operations, "start_container")
    old.remove(force=True)
    for _ in range(2):
        with pytest.raises(RestoreFailed, match="is gone from the engine"):
            await rig.host.restore(operations.deployment_id)
        assert rig.state(operations) is S.RESTORE_FAILED
        assert operations.entry.error_code is ErrorCode.ROLLBACK_FAILED
        assert rig.docker.containers.get(name).status == "running"


@asynccontextmanager
async def _taken(rig: Rig, port: int) -> AsyncIterator[Container]:
    thief = rig.serve(f"thief-{uuid4().hex[:8]}", ports={"80/tcp": port})
    try:
        yield thief
    finally:
        thief.remove(force=True)


async def test_a_port_taken_after_the_preparation_brings_the_old_container_back(rig: Rig, name: str) -> None:
    """The start fails in the engine's own words, and the old container serves again."""
    old = rig.serve(name)
    operations = rig.announce(name, port_mappings=[{"host_port": 18992, "container_port": 80}])
    await take_up_to(operations, "stop_existing_container")
    async with _taken(rig, 18992):
        with pytest.raises(StepFailed, match="already allocated"):
            await take(operations, "start_container")
        operations.fail(ErrorCode.DEPLOYMENT_FAILED, "the port is taken")
        await rig.host.restore(operations.deployment_id)
        assert_serves(rig, old, name)


async def test_a_restore_that_failed_works_once_its_cause_is_repaired(rig: Rig, name: str) -> None:
    """The old container's own port is held by another: told as such, and the next restore succeeds."""
    old = rig.serve(name, ports={"80/tcp": 18993})
    operations = rig.announce(name, port_mappings=[{"host_port": 18993, "container_port": 80}])
    await take_up_to(operations, "stop_existing_container")
    async with _taken(rig, 18993):
        with pytest.raises(RestoreFailed, match="already allocated"):
            await rig.host.restore(operations.deployment_id)
        assert rig.state(operations) is S.RESTORE_FAILED
    assert (await rig.host.restore(operations.deployment_id)).state is S.RESTORED
    assert_serves(rig, old, name)


async def test_a_name_that_another_took_meanwhile_is_not_fought_over(rig: Rig, name: str) -> None:
    """A container that this deployment neither made nor replaced is never touched by its restore."""
    old = rig.serve(name)
    operations = rig.announce(name)
    await take_up_to(operations, "stop_existing_container")
    stranger = rig.serve(name)
    with pytest.raises(RestoreFailed, match="is held by container"):
        await rig.host.restore(operations.deployment_id)
    assert rig.fresh(stranger).status == "running"
    stranger.remove(force=True)
    await rig.host.restore(operations.deployment_id)
    assert_serves(rig, old, name)


async def test_a_restore_waits_for_the_step_that_its_deadline_cut_off(rig: Rig, name: str) -> None:
    """The engine still stops the old container when the restore begins; it must not end up stopped."""
    deaf = ["/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
    old = rig.serve(name, command=deaf, stop_signal="SIGTERM")
    operations = rig.announce(name, stop_timeout_seconds=2)
    await take(operations, "deploy_container")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(operations.stop_existing_container(), 0.5)
    operations.fail(ErrorCode.TIMEOUT, "stop_existing_container took too long")
    await rig.host.restore(operations.deployment_id)
    await asyncio.get_running_loop().shutdown_default_executor()  # until the cut off step has ended, too
    assert_serves(rig, old, name)


async def test_what_a_dead_process_left_is_undone_before_the_next_deployment(rig: Rig, name: str) -> None:
    """Otherwise the new one would take the half-made version for the one to come back to."""
    old = rig.serve(name)
    dead = rig.announce(name, "v2")
    await take_up_to(dead, "start_container")
    following = rig.announce(name, "v3")
    await take_up_to(following, "start_container")
    assert rig.state(dead) is S.RESTORED
    assert following.entry.facts.previous_container_id == old.id
    await rig.host.restore(following.deployment_id)
    assert_serves(rig, old, name)


# -- what must not be touched ----------------------------------------------------------------------


async def test_a_name_that_begins_another_containers_id_is_not_that_container(rig: Rig) -> None:
    """The engine would resolve `db` to a container whose id begins with db, and we would stop it."""
    bystander = rig.serve(f"bystander-{uuid4().hex[:8]}")
    name = str(bystander.id)[:12]
    operations = await rig.deploy(name, "v1")
    assert operations.entry.facts.previous_container_id is None
    assert rig.fresh(bystander).status == "running"
    assert str(rig.fresh(bystander).name).startswith("bystander-")


async def test_a_container_that_vanishes_when_stopped_is_refused_before_anything(rig: Rig, name: str) -> None:
    """One started with `--rm` could not be brought back."""
    old = rig.docker.containers.run(BASE_IMAGE, ["sleep", "1000"], name=name, detach=True, auto_remove=True)
    operations = rig.announce(name)
    with pytest.raises(StepFailed, match="--rm"):
        await take(operations, "deploy_container")
    assert rig.fresh(old).status == "running"
    assert rig.names(name) == [name]


async def test_a_port_of_a_stopped_container_may_belong_to_another_by_now(rig: Rig, name: str) -> None:
    """A stopped current container holds no port, so who listens there is found before the switch."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        old = rig.serve(name, ports={"80/tcp": port})
        operations = rig.announce(name, port_mappings=[{"host_port": port, "container_port": 80}])
        await take(operations, "deploy_container")
        await rig.host.restore(operations.deployment_id)
        old.stop()
        operations = rig.announce(name, port_mappings=[{"host_port": port, "container_port": 80}])
        with pytest.raises(PortTaken, match=str(port)):
            await take(operations, "deploy_container")
    gates = rig.host.ledger.status(operations.deployment_id).gates
    assert [(gate.name, gate.passed) for gate in gates] == [("no_port_conflicts", False)]


async def test_a_first_deployment_that_fails_leaves_nothing(rig: Rig, name: str) -> None:
    """There was nothing before, so there is nothing afterwards."""
    operations = rig.announce(name)
    await take_up_to(operations, "start_container")
    assert (await rig.host.restore(operations.deployment_id)).facts.previous_container_restored is False
    assert rig.names(name) == []


# -- Consul ----------------------------------------------------------------------------------------


def consul_gate(operations: Operations) -> tuple[bool, str]:
    """The gate's verdict and its message, when the deployment was kept all the same."""
    status = operations.ledger.status(operations.deployment_id)
    assert status.state is S.KEPT
    gate = next(gate for gate in status.gates if gate.name == "service_registered")
    assert status.facts.service_registered is gate.passed
    return gate.passed, gate.message


async def keep_with_consul(rig: Rig, name: str, url: str) -> tuple[bool, str]:
    """Deploy with Consul enabled; what the gate says."""
    asked = HealthCheckConfig(health_endpoint=None, quiet_period_ms=100, consul_enabled=True, consul_url=url)
    operations = rig.announce(name, health=asked)
    await take_up_to(operations, "keep")
    return consul_gate(operations)


async def test_a_consul_that_is_down_fails_its_gate_and_not_the_deployment(rig: Rig, name: str) -> None:
    """The specification lets this operation fail: the container is well."""
    passed, said = await keep_with_consul(rig, name, "http://127.0.0.1:9")
    assert not passed
    assert "Consul at http://127.0.0.1:9 cannot be asked: ConnectError" in said


@pytest.mark.parametrize(
    ("answers", "passed", "said"),
    [
        ((("200 OK", "[]"), instances("passing")), True, "registered; 1 of 1 instance(s) passing"),
        ((instances("critical", output="refused"),), True, "is critical: refused"),
        ((("403 Forbidden", "Permission denied"),), False, "refuses the question (403 Permission denied)"),
        ((("200 OK", "no JSON"),), False, "is no Consul: 200 no JSON"),
    ],
    ids=["a moment later", "critical", "no permission", "no Consul"],
)
async def test_what_consul_says_is_in_its_gate_and_fails_no_deployment(
    rig: Rig, name: str, answers: tuple[tuple[str, str], ...], passed: bool, said: str
) -> None:
    """Registered is what the specification asks for; the rest is for the person who reads the report."""
    async with documented_consul(*answers) as agent:
        gate = await keep_with_consul(rig, name, agent.url)
    assert gate[0] is passed
    assert said in gate[1]
    assert agent.asked[0].startswith(f"GET /v1/health/service/{name} ")


async def test_after_a_restore_names_point_to_what_serves(rig: Rig, name: str) -> None:
    """The failed image is gone with its name, and the previous version has its own."""
    first = f"v-{uuid4().hex[:10]}"
    await rig.deploy(name, first)
    operations = rig.announce(name, f"v-{uuid4().hex[:10]}")
    failed = operations.entry.request.image_tag
    await take_up_to(operations, "start_container")
    await rig.host.restore(operations.deployment_id)
    serving = rig.docker.containers.get(name)
    assert rig.docker.images.get(f"{name}:{first}").id == serving.attrs["Image"]
    with pytest.raises(ImageNotFound):
        rig.docker.images.get(f"{name}:{failed}")


@pytest.mark.parametrize("last", ["deploy_container", "start_container"])
async def test_a_tag_that_a_failed_image_took_names_what_serves(rig: Rig, name: str, last: str) -> None:
    """Also when it failed before the old container was stopped."""
    tag = f"v-{uuid4().hex[:10]}"
    serving = (await rig.deploy(name, tag)).entry
    other = serving.request.model_copy(update={"image": rig.image(f"v-{uuid4().hex[:10]}")})
    entry, _ = rig.host.ledger.create(other, S.READY)
    await take_up_to(rig.host.operations(entry.deployment_id), last)
    assert rig.docker.images.get(f"{name}:{tag}").id != serving.facts.image_id
    await rig.host.restore(entry.deployment_id)
    assert rig.docker.images.get(f"{name}:{tag}").id == serving.facts.image_id
    assert rig.docker.containers.get(name).attrs["Image"] == serving.facts.image_id


@pytest.mark.parametrize(("keep_versions", "left"), [(0, ["v3"]), (1, ["v3"]), (3, ["v1", "v2", "v3"])])
async def test_as_many_versions_are_kept_as_asked_for(
    rig: Rig, name: str, keep_versions: int, left: list[str]
) -> None:
    """The one that a rollback leads to always, whatever was asked."""
    for version in ("v1", "v2", "v3"):
        await rig.deploy(name, version, keep_versions=3)
    await rig.deploy(name, "v4", keep_versions=keep_versions)
    tags = {str(each.labels[LABEL_IMAGE_TAG]) for each in rig.host.engine.containers_of(name)}
    assert tags == {*left, "v4"}


async def test_an_image_too_large_for_the_engines_disk_is_refused_before_anything(
    rig: Rig, name: str
) -> None:
    """The old container serves, and the cause says how much is missing where."""
    old = rig.serve(name)
    operations = rig.announce(name)
    huge = rig.image("v2").model_copy(
        update={"size_bytes": 2**55, "config_digest": f"sha256:{'0' * 64}", "layers": [f"sha256:{'1' * 64}"]}
    )
    request = operations.entry.request.model_copy(update={"image": huge})
    entry, _ = rig.host.ledger.create(request, S.READY)
    with pytest.raises(StepFailed, match=f"needed are {2**55} bytes for the loaded image"):
        await take(rig.host.operations(entry.deployment_id), "deploy_container")
    assert_serves(rig, old, name)


async def test_an_image_that_a_dead_process_had_just_loaded_goes_too(rig: Rig, name: str) -> None:
    """It died before it could write down which image that was."""
    operations = rig.announce(name, "v2-dead")
    announced = operations.entry.request.image
    assert announced is not None
    rig.host.ledger.begin_step(operations.deployment_id, "deploy_container", "deployment_execution")
    await rig.host.restore(operations.deployment_id)
    assert rig.host.engine.find_image(announced) is None


async def test_a_stopped_container_that_a_person_made_of_our_image_is_left(rig: Rig, name: str) -> None:
    """It has the image's label and no deployment's; no retention touches it."""
    theirs = rig.docker.containers.create(BASE_IMAGE, SERVE, labels={LABEL_CONTAINER: name})
    await rig.deploy(name, "v1", keep_versions=0)
    await rig.deploy(name, "v2", keep_versions=0)
    assert rig.fresh(theirs).status == "created"
