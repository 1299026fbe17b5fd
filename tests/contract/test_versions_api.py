"""What a host keeps, and the way back to it by hand, over the real application with the fake engine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import uuid4

import httpx
import pytest

from blocks.receiver_client import ReceiverClient, ReceiverConfig, ReceiverRefused
from receiver import contract
from receiver.contract import DeploymentConfig, DeployRequest, HostState, ImageAnnouncement, RollbackRequest
from receiver.engine import MadeContainer
from receiver.ledger import Ledger
from tests.contract.caller import KEY, Caller, FakeEngine, slug
from tests.versions_behaviour import VersionsBehaviour, VersionsSite

WAY = (HostState.PREPARED, HostState.SWITCHING, HostState.VALIDATING, HostState.KEPT)
_moments = count()


def image_of(tag: str) -> ImageAnnouncement:
    """The image of a version."""
    digest = hashlib.sha256(tag.encode()).hexdigest()
    return ImageAnnouncement(
        config_digest=f"sha256:{digest}", layers=[f"sha256:{digest}"], architecture="amd64", size_bytes=9
    )


@dataclass
class FakeSite(VersionsSite):
    """Deploys by writing what a deployment leaves in ledger and engine."""

    engine: FakeEngine = field(default_factory=FakeEngine)

    async def deploy(self, tag: str, **config: Any) -> str:
        """As `VersionsSite` says."""
        deployment_id = self._take(tag, WAY, **config)
        aside = [replace(made, name=f"aside-{made.container_id}", running=False) for made in self._mine()]
        others = [made for made in self.engine.containers if made.container_name != self.name]
        self.engine.containers = (*others, *aside, self._made(deployment_id, tag, self.name, running=True))
        return deployment_id

    async def leave_unproven(self, tag: str) -> str:
        """As `VersionsSite` says."""
        deployment_id = self._take(tag, WAY[:1])
        made = self._made(deployment_id, tag, f"{self.name}-next", running=False)
        self.engine.containers = (*self.engine.containers, made)
        return deployment_id

    def drop_image(self, deployment_id: str) -> None:
        """As `VersionsSite` says."""
        lost = next(made.image_id for made in self._mine() if made.deployment_id == deployment_id)
        self.engine.images = tuple(image for image in self.engine.images if image.config_digest != lost)

    def containers(self) -> object:
        """As `VersionsSite` says."""
        return self.engine.containers

    def _mine(self) -> list[MadeContainer]:
        return [made for made in self.engine.containers if made.container_name == self.name]

    def _take(self, tag: str, way: tuple[HostState, ...], **config: Any) -> str:
        image = image_of(tag)
        self.engine.images = (*(known for known in self.engine.images if known != image), image)
        request = DeployRequest(
            container_name=self.name,
            image_tag=tag,
            image=image,
            deployment_config=DeploymentConfig(**config),
            rollback_on_failure=False,
        )
        entry, _ = self.ledger.create(request, HostState.READY)
        for state in way:
            self.ledger.move(entry.deployment_id, state)
        return entry.deployment_id

    def _made(self, deployment_id: str, tag: str, name: str, *, running: bool) -> MadeContainer:
        return MadeContainer(
            container_id=uuid4().hex * 2,
            container_name=self.name,
            name=name,
            deployment_id=deployment_id,
            image_tag=tag,
            image_id=image_of(tag).config_digest,
            created_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(_moments)),
            running=running,
        )


@pytest.fixture
def site(caller: Caller, engine: FakeEngine) -> FakeSite:
    """An empty host."""
    ledger: Ledger = caller.app.state.service.ledger
    return FakeSite(caller, ledger, "web", engine)


class TestVersionsOfTheFakeEngine(VersionsBehaviour):
    """The fake keeps what the real one keeps (`tests/integration/test_versions.py`)."""


async def test_an_empty_host_keeps_nothing(caller: Caller) -> None:
    """An empty list is an answer."""
    response = await caller.call("GET", contract.CONTAINERS_PATH)
    assert (response.status_code, response.json()) == (200, {"containers": []})


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/api/containers"),
        ("GET", "/api/containers/web"),
        ("GET", "/api/containers/web/rollback"),
        ("POST", "/api/containers/web/rollback"),
    ],
)
async def test_versions_are_for_those_who_sign_and_are_on_the_list(
    site: FakeSite, method: str, target: str
) -> None:
    """401 without a signature, with another key, and in the old form; 403 from elsewhere; no effect."""
    await site.deploy("v1")
    await site.deploy("v2")
    caller, body, before = site.caller, b"{}", site.entries()
    stranger = replace(caller, key=b"x" * 40)
    for headers in ({}, stranger.v2(method, target, body), caller.v1(body)):
        assert (await caller.send(method, target, body, headers)).status_code == 401
    elsewhere = replace(caller, peer="10.9.9.9")
    assert (await elsewhere.call(method, target, body)).status_code == 403
    assert site.entries() == before


async def test_the_query_is_signed_too(site: FakeSite) -> None:
    """Which version is asked for cannot be changed on the way."""
    target = contract.container_path("web", "rollback")
    headers = site.caller.v2("GET", f"{target}?to=v1")
    assert (await site.caller.send("GET", f"{target}?to=v2", headers=headers)).status_code == 401


async def test_a_rollback_that_names_things_wrongly_is_malformed(site: FakeSite) -> None:
    """Before anything is looked up."""
    target = contract.container_path("web", "rollback")
    for body in (b"{", b'{"version":"v1"}', b'{"to":""}', b'{"workflow_id":"a b"}'):
        response = await site.caller.call("POST", target, body)
        assert (response.status_code, slug(response)) == (422, "malformed-request")


async def test_an_engine_that_is_down_is_told_as_such(site: FakeSite, engine: FakeEngine) -> None:
    """503, to be asked again; never an empty list."""
    await site.deploy("v1")
    engine.down = True
    for target in ("/api/containers", "/api/containers/web"):
        response = await site.caller.call("GET", target)
        assert (response.status_code, slug(response)) == (503, "engine-unreachable")


async def test_our_client_speaks_to_it(site: FakeSite) -> None:
    """Its methods give models, and a refusal rises with its next step."""
    await site.deploy("v1")
    first = (await site.versions()).versions[0].deployment_id
    await site.deploy("v2")
    transport = httpx.ASGITransport(app=site.caller.app, client=("127.0.0.1", 50_000))
    config = ReceiverConfig(base_url="http://receiver", signing_key=KEY)
    async with ReceiverClient(config, transport=transport) as client:
        assert await client.versions() == await client.versions("web") == [await site.versions()]
        for to in (None, "v1"):
            assert (await client.rollback_target("web", to)).version.deployment_id == first
        request = RollbackRequest(to="v1", workflow_id="wf")
        taken = [await client.rollback_to("web", request, "key") for _ in range(2)]
        assert taken[0] == taken[1]
        assert site.ledger.get(taken[0].deployment_id).facts.restored_from == first
        with pytest.raises(ReceiverRefused, match="kept: v1") as refused:
            await client.rollback_target("web", "a tag/with?odd&signs")
        assert (refused.value.status, refused.value.retryable) == (404, False)
