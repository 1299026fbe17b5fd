"""What a real engine keeps, and going back to it by hand: the endpoints, then the steps of the deployment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Any
from uuid import uuid4

import pytest
from docker.errors import APIError
from pydantic import SecretBytes

from receiver.app import create_app
from receiver.contract import ErrorCode, HostState
from receiver.health import ContainerUnwell
from tests.contract.caller import KEY, Caller
from tests.integration.host_rig import Rig, host_rig, take_up_to
from tests.versions_behaviour import VersionsBehaviour, VersionsSite

# Runs once for each volume: the second container of its kind is not well.
ONCE = ["/bin/sh", "-c", "[ -f /data/was-here ] && exit 3; touch /data/was-here; exec sleep 1000"]


@dataclass
class RealSite(VersionsSite):
    """Deploys by the steps that the host's flow takes."""

    rig: Rig

    async def deploy(self, tag: str, **config: Any) -> str:
        """As `VersionsSite` says."""
        return (await self.rig.deploy(self.name, tag, **config)).deployment_id

    async def leave_unproven(self, tag: str) -> str:
        """As `VersionsSite` says."""
        operations = self.rig.announce(self.name, tag)
        await take_up_to(operations, "deploy_container")
        return operations.deployment_id

    def drop_image(self, deployment_id: str) -> None:
        """As `VersionsSite` says."""
        image_id = self.rig.host.ledger.get(deployment_id).facts.image_id
        self.rig.docker.images.remove(str(image_id), force=True)

    def containers(self) -> object:
        """As `VersionsSite` says."""
        return self.rig.host.engine.made_containers(self.name)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One host for all tests here; each has a container name of its own."""
    with host_rig() as found:
        yield found


@pytest.fixture
def site(rig: Rig) -> Iterator[RealSite]:
    """The receiver's application over the host's ledger and engine, and a name of the test's own."""
    settings = replace(
        rig.host.settings, hmac_keys=(SecretBytes(KEY),), allowed_networks=(ip_network("127.0.0.0/8"),)
    )
    app = create_app(settings, ledger=rig.host.ledger, engine=rig.host.engine)
    site = RealSite(Caller(app), rig.host.ledger, f"web-{uuid4().hex[:10]}", rig)
    yield site
    for made in rig.host.engine.made_containers(site.name):
        rig.host.engine.remove(made.container_id)


class TestVersionsOfARealEngine(VersionsBehaviour):
    """The same promises as over the fake."""


async def test_the_version_gone_back_to_serves_and_the_other_is_kept(site: RealSite, rig: Rig) -> None:
    """By the steps of any deployment; and back again, without a name."""
    for tag in ("v1", "v2"):
        await site.deploy(tag)
    for tag, other in (("v1", "v2"), ("v2", "v1")):
        entry = await site.roll_back()
        await take_up_to(rig.host.operations(entry.deployment_id), "retire")
        assert rig.host.ledger.get(entry.deployment_id).state is HostState.KEPT
        serving = rig.docker.containers.get(site.name)
        assert serving.status == "running"
        assert f"VERSION={tag}" in serving.attrs["Config"]["Env"]
        told = await site.versions()
        assert (told.versions[0].image_tag, told.versions[0].role) == (tag, "running")
        assert [each.image_tag for each in told.versions if each.deployment_id == told.previous] == [other]


async def test_a_version_that_is_not_well_any_more_leaves_what_runs_serving(site: RealSite, rig: Rig) -> None:
    """Its own deployment had asked for no rollback; a rollback by hand is undone all the same."""
    volume = {"host_path": f"{site.name}-data", "container_path": "/data"}
    old = rig.announce(site.name, "v1", rollback_on_failure=False, command=ONCE, volumes=[volume])
    await take_up_to(old, "retire")
    await site.deploy("v2")
    serving = rig.docker.containers.get(site.name)
    operations = rig.host.operations((await site.roll_back("v1")).deployment_id)
    with pytest.raises(ContainerUnwell):
        await take_up_to(operations, "check_container_status")
    operations.fail(ErrorCode.HEALTH_CHECK_FAILED, "not well")
    assert operations.entry.request.rollback_on_failure
    assert (await rig.host.restore(operations.deployment_id)).state is HostState.RESTORED
    assert rig.fresh(serving).name == site.name
    assert rig.fresh(serving).status == "running"
    assert [version.image_tag for version in (await site.versions()).versions] == ["v2", "v1"]
    kept = rig.host.ledger.get(old.deployment_id).facts
    assert rig.docker.images.get(str(kept.image_id))


async def test_the_image_stays_from_the_request_to_the_deployment(site: RealSite, rig: Rig) -> None:
    """Its container pins it: neither pruning nor losing its names takes it away."""
    await site.deploy("v1")
    await site.deploy("v2")
    entry = await site.roll_back()
    assert entry.request.image is not None
    *others, last = rig.docker.images.get(entry.request.image.config_digest).tags
    for reference in others:
        rig.docker.images.remove(reference)
    with pytest.raises(APIError, match="container"):
        rig.docker.images.remove(last)
    assert not rig.host.engine.remove_our_image(entry.request.image.config_digest)
    rig.docker.images.prune()
    await take_up_to(rig.host.operations(entry.deployment_id), "keep")
    serving = rig.docker.containers.get(site.name)
    assert serving.attrs["Image"] == entry.request.image.config_digest


async def test_what_somebody_starts_from_our_image_is_no_version(site: RealSite, rig: Rig) -> None:
    """An image hands its label on; only a deployment makes a version."""
    await site.deploy("v1")
    await site.deploy("v2")
    image_id = rig.docker.containers.get(site.name).attrs["Image"]
    stranger = rig.docker.containers.create(
        image_id, ["sleep", "9"], labels={"gantry.container_name": site.name}
    )
    try:
        assert len((await site.versions()).versions) == 2
    finally:
        stranger.remove()


async def test_a_container_of_somebody_else_under_the_name_is_put_aside_and_comes_back(
    site: RealSite, rig: Rig
) -> None:
    """The name is held by no version: the newest kept one is the previous."""
    first = await site.deploy("v1")
    rig.docker.containers.get(site.name).remove(force=True)
    await site.deploy("v1")
    second = await site.deploy("v2")
    rig.docker.containers.get(site.name).rename(f"{site.name}-mine")
    rig.docker.containers.get(f"{site.name}-mine").stop(timeout=0)
    foreign = rig.serve(site.name)
    try:
        told = await site.versions()
        assert told.previous == second
        assert first not in [version.deployment_id for version in told.versions]
        operations = rig.host.operations((await site.roll_back()).deployment_id)
        await take_up_to(operations, "start_container")
        await rig.host.restore(operations.deployment_id)
        assert rig.fresh(foreign).name == site.name
        assert rig.fresh(foreign).status == "running"
    finally:
        foreign.remove(force=True)
