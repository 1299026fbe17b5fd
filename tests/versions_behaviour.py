"""What a host promises of the versions that it keeps: the same tests for the fake engine and for a real one.

Subclass `VersionsBehaviour` in a module that has a fixture `site`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import httpx

from receiver import contract
from receiver.contract import (
    ContainerVersion,
    ContainerVersions,
    DeployAccepted,
    HostState,
    RollbackRequest,
)
from receiver.ledger import Entry, Ledger
from tests.contract.caller import Caller, slug


@dataclass
class VersionsSite(ABC):
    """One host with its application, and one container name on it."""

    caller: Caller
    ledger: Ledger
    name: str

    @abstractmethod
    async def deploy(self, tag: str, **config: Any) -> str:
        """Deploy a version to its good end; the one before it is kept. Returns the deployment's id."""

    @abstractmethod
    async def leave_unproven(self, tag: str) -> str:
        """Begin a deployment, and leave its container created beside the one that serves."""

    @abstractmethod
    def drop_image(self, deployment_id: str) -> None:
        """Take the image of a kept container away, against all good advice."""

    @abstractmethod
    def containers(self) -> Any:
        """Something that is equal as long as no container was touched."""

    def forget(self, deployment_id: str) -> None:
        """Lose a deployment from the ledger."""
        with self.ledger._transaction() as db:
            for table in ("journal", "observations", "deployments"):
                db.execute(f"DELETE FROM {table} WHERE deployment_id = ?", (deployment_id,))  # noqa: S608

    def entries(self) -> list[Entry]:
        """All deployments of this name."""
        return [entry for entry in self.ledger.in_states(*HostState) if self.name in _names(entry)]

    async def versions(self) -> ContainerVersions:
        """What the host tells of this container."""
        response = await self.caller.call("GET", contract.container_path(self.name))
        assert response.status_code == 200, response.text
        return ContainerVersions.model_validate_json(response.content)

    async def ask(self, to: str | None = None, key: str = "", workflow_id: str = "wf") -> httpx.Response:
        """Ask for a rollback."""
        body = RollbackRequest(to=to, workflow_id=workflow_id).model_dump_json().encode()
        headers = {contract.IDEMPOTENCY_HEADER: key} if key else {}
        return await self.caller.call("POST", contract.container_path(self.name, "rollback"), body, headers)

    async def roll_back(self, to: str | None = None, key: str = "") -> Entry:
        """The entry that a rollback made; a new one."""
        response = await self.ask(to, key)
        assert response.status_code == 201, response.text
        accepted = DeployAccepted.model_validate_json(response.content)
        assert (accepted.state, accepted.image_present) == (HostState.READY, True)
        return self.ledger.get(accepted.deployment_id)


def _names(entry: Entry) -> set[str]:
    return {entry.request.container_name}


def _told(versions: list[ContainerVersion]) -> list[tuple[str, str, bool]]:
    return [(version.image_tag, version.role, version.running) for version in versions]


async def _refused(site: VersionsSite, to: str | None, status: int, kind: str) -> str:
    """Asking is refused so, by GET as by POST; nothing was entered and nothing touched. Returns why."""
    entries, containers = site.entries(), site.containers()
    target = contract.container_path(site.name, "rollback") + (f"?to={to}" if to else "")
    for response in (await site.ask(to), await site.caller.call("GET", target)):
        assert (response.status_code, slug(response)) == (status, kind), response.text
        assert response.json()["next_step"]
    assert (site.entries(), site.containers()) == (entries, containers)
    return str(response.json()["detail"])


class VersionsBehaviour:
    """For any engine."""

    async def test_versions_are_told_newest_first_with_the_one_that_runs(self, site: VersionsSite) -> None:
        """Alone, and among all containers of the host."""
        ids = [await site.deploy(tag) for tag in ("v1", "v2", "v3")]
        told = await site.versions()
        assert _told(told.versions) == [
            ("v3", "running", True),
            ("v2", "kept", False),
            ("v1", "kept", False),
        ]
        assert [version.deployment_id for version in told.versions] == ids[::-1]
        assert told.previous == ids[1]
        assert all(version.can_be_restored for version in told.versions)
        response = await site.caller.call("GET", contract.CONTAINERS_PATH)
        everything = contract.HostContainers.model_validate_json(response.content).containers
        assert told in everything

    async def test_a_name_that_the_host_has_nothing_of_is_unknown(self, site: VersionsSite) -> None:
        """To the list as to the rollback."""
        response = await site.caller.call("GET", contract.container_path(site.name))
        assert (response.status_code, slug(response)) == (404, "container-unknown")
        assert site.name in await _refused(site, None, 404, "container-unknown")

    async def test_a_rollback_is_a_deployment_of_the_kept_version_s_own_request(
        self, site: VersionsSite
    ) -> None:
        """Same configuration, health check and tag; a new id, its own workflow, and the way back on."""
        variables = {"COLOUR": "red", "KEY": "secret://block"}
        old = await site.deploy("v1", environment_variables=variables)
        await site.deploy("v2")
        before, source = site.containers(), site.ledger.get(old).request
        entry = await site.roll_back()
        assert site.containers() == before
        assert entry.state is HostState.READY
        assert entry.deployment_id != old
        assert entry.facts.restored_from == old
        assert entry.request.workflow_id == "wf"
        assert entry.request.rollback_on_failure
        assert entry.request.image == source.image
        assert entry.request.package is None
        for field in ("image_tag", "deployment_config", "health_check_config"):
            assert getattr(entry.request, field) == getattr(source, field)

    async def test_a_version_is_named_by_its_tag_or_by_its_deployment_id(self, site: VersionsSite) -> None:
        """Either gives the same one, and GET says beforehand which."""
        first = await site.deploy("v1")
        await site.deploy("v2")
        await site.deploy("v3")
        for to in ("v1", first):
            target = contract.container_path(site.name, "rollback") + f"?to={to}"
            said = contract.RollbackTarget.model_validate_json(
                (await site.caller.call("GET", target)).content
            )
            assert said.version.deployment_id == first
            assert (await site.roll_back(to)).facts.restored_from == first

    async def test_the_same_request_again_gives_the_same_deployment(self, site: VersionsSite) -> None:
        """Also after another version has become the previous one; a key serves one request only."""
        for tag in ("v1", "v2"):
            await site.deploy(tag)
        entry = await site.roll_back(key=f"{site.name}-a")
        await site.deploy("v3")
        again = await site.ask(key=f"{site.name}-a")
        assert (again.status_code, again.json()["deployment_id"]) == (200, entry.deployment_id)
        for other in ({"to": "v2"}, {"workflow_id": "wf-2"}):
            response = await site.ask(key=f"{site.name}-a", **other)
            assert (response.status_code, slug(response)) == (409, "idempotency-conflict")

    async def test_what_cannot_be_gone_back_to_is_refused_and_nothing_is_touched(
        self, site: VersionsSite
    ) -> None:
        """With the reason; an unknown version with those that are kept."""
        first = await site.deploy("v1")
        await _refused(site, None, 409, "nothing-kept")
        second = await site.deploy("v2")
        for to in ("v2", second):
            await _refused(site, to, 409, "version-runs")
        said = await _refused(site, "v9", 404, "version-unknown")
        assert f"v1 ({first})" in said
        assert second not in said
        site.forget(first)
        assert not (await site.versions()).versions[1].can_be_restored
        for named in (None, "v1"):
            await _refused(site, named, 409, "version-lost")

    async def test_a_container_whose_image_was_removed_is_no_way_back(self, site: VersionsSite) -> None:
        """Told before anything is begun."""
        first = await site.deploy("v1")
        await site.deploy("v2")
        site.drop_image(first)
        assert "image" in await _refused(site, None, 409, "version-lost")

    async def test_the_previous_version_is_another_one_than_what_runs(self, site: VersionsSite) -> None:
        """A second deployment of the same leaves its twin; another configuration is another version."""
        first = await site.deploy("v1")
        second = await site.deploy("v2")
        await site.deploy("v2")
        assert (await site.versions()).previous == first
        await site.deploy("v2", stop_timeout_seconds=3)
        assert (await site.versions()).previous not in (first, second, None)

    async def test_what_never_served_is_no_version(self, site: VersionsSite) -> None:
        """A container that is being deployed is neither shown nor gone back to."""
        first = await site.deploy("v1")
        unproven = await site.leave_unproven("v2")
        assert [version.deployment_id for version in (await site.versions()).versions] == [first]
        await _refused(site, unproven, 404, "version-unknown")
