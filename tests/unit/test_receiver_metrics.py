"""What the receiver tells Prometheus, and that its labels are words of ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from receiver import access
from receiver.app import create_app
from receiver.contract import METRICS_PATH, DeploymentStatus, DeployRequest, HostState
from receiver.guardian import Guardian
from receiver.ledger import Ledger
from receiver.metrics import Metrics, count_deployments
from receiver.operations import Host, RestoreFailed
from receiver.problems import Refusal
from receiver.settings import from_environment
from tests.contract.caller import KEY, Caller, FakeEngine

REQUEST = DeployRequest(container_name="shop")
S = HostState


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """A receiver with its state in a folder of the test."""
    settings = from_environment({"HMAC_SECRET_KEY": KEY.decode(), "HOOK_RECEIVER_STATE_DIR": str(tmp_path)})
    return create_app(settings, engine=FakeEngine().as_engine())


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """The receiver's ledger, as its host's processes open it."""
    ledger = Ledger(tmp_path / "ledger.sqlite3")
    yield ledger
    ledger.close()


def samples(text: str) -> dict[str, float]:
    """Values by `name{label="value"}`, read by Prometheus' own parser."""
    return {
        sample.name + "".join(f"{{{name}={value}}}" for name, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(app: FastAPI) -> dict[str, float]:
    response = await Caller(app).send("GET", METRICS_PATH)
    assert response.status_code == 200
    return samples(response.text)


async def test_a_refusal_at_the_door_is_counted_by_its_reason(app: FastAPI) -> None:
    """Each check of the door, and nothing that a caller could invent as a label."""
    before = await scrape(app)
    assert {
        before[f"gantry_receiver_refused_requests_total{{reason={each}}}"] for each in access.REASONS
    } == {0}
    caller = Caller(app)
    await caller.send("POST", "/api/deploy", b"{}")
    await Caller(app, key=b"x" * 32).announce()
    await Caller(app, clock_offset_seconds=-3600).announce()
    await Caller(app, peer="192.0.2.1").announce()
    nonce = caller.v2("POST", "/api/deploy", b"{}")
    for _ in range(2):
        await caller.send("POST", "/api/deploy", b"{}", nonce)
    after = await scrape(app)
    counted = {name: after[name] - before[name] for name in before if "refused" in name}
    reasons = ("signature-missing", "invalid-signature", "stale-request", "network-not-allowed")
    assert {name.partition("=")[2].rstrip("}") for name, count in counted.items() if count == 1} == {
        *reasons,
        "replayed-request",
    }
    assert sum(counted.values()) == 5


def test_every_reason_of_the_door_is_known_from_the_start() -> None:
    """A refusal that is added later and forgotten in the list would begin at 1, which alerts do not see."""
    refusals = {
        kind.slug
        for kind in vars(access).values()
        if isinstance(kind, type) and issubclass(kind, Refusal) and kind is not Refusal
    }
    assert set(access.REASONS) == refusals


async def test_deployments_are_counted_by_state_from_the_ledger(app: FastAPI, ledger: Ledger) -> None:
    """Written by whichever process of the host; states without a deployment are told as 0."""
    for _ in range(2):
        ledger.create(REQUEST)
    entry, _ = ledger.create(REQUEST, S.READY)
    ledger.move(entry.deployment_id, S.PREPARED)
    found = await scrape(app)
    told = {state: found[f"gantry_receiver_deployments{{state={state}}}"] for state in HostState}
    assert told == dict.fromkeys(HostState, 0) | {S.RECEIVING: 2, S.PREPARED: 1}
    assert found["gantry_receiver_up"] == 1
    assert [name for name in found if name.startswith("gantry_receiver_info{version=")]


def test_a_ledger_that_cannot_be_read_is_told_as_down(tmp_path: Path) -> None:
    """The scrape itself works, so that the alert can tell a bad disk from a dead daemon."""
    assert count_deployments(tmp_path / "nowhere.sqlite3") is None
    (tmp_path / "broken").write_text("no database, but text that is longer than the header of one " * 9)
    assert count_deployments(tmp_path / "broken") is None
    found = samples(Metrics().render("1", None))
    assert found["gantry_receiver_up"] == 0
    assert not [name for name in found if name.startswith("gantry_receiver_deployments")]


async def test_an_upload_is_counted_once_however_many_chunks_it_has(app: FastAPI) -> None:
    """Also one whose bytes turn out to be wrong."""
    caller, package = Caller(app), b"x" * 3000
    good, bad = await caller.announce_upload(package), await caller.announce_upload(package)
    for offset in (0, 1000, 2000):
        assert (await caller.patch(good, offset, package[offset : offset + 1000])).status_code == 204
    assert (await caller.patch(bad, 0, b"y" * 3000)).status_code != 204
    found = await scrape(app)
    assert found["gantry_receiver_uploads_total"] == 2
    assert found["gantry_receiver_upload_bytes_total"] == 3000
    assert found["gantry_receiver_packages_total{outcome=ready}"] == 1
    assert found["gantry_receiver_packages_total{outcome=rejected}"] == 1


@dataclass
class HostOfOutcomes:
    """A host whose engine brings some containers back and others not."""

    ledger: Ledger
    hopeless: set[str] = field(default_factory=set)

    async def restore(self, deployment_id: str) -> DeploymentStatus:
        """As `Host.restore`."""
        self.ledger.move(deployment_id, S.RESTORING)
        if deployment_id in self.hopeless:
            self.ledger.move(deployment_id, S.RESTORE_FAILED)
            raise RestoreFailed("the engine lost the previous container")
        self.ledger.move(deployment_id, S.RESTORED)
        return self.ledger.status(deployment_id)


async def test_what_the_guardian_did_is_counted_by_how_it_ended(ledger: Ledger) -> None:
    """Once per deployment, though it looks again and again."""
    left = []
    for _ in range(3):
        entry, _ = ledger.create(REQUEST, S.READY)
        ledger.move(entry.deployment_id, S.PREPARED)
        left.append(entry.deployment_id)
    metrics = Metrics()
    host = HostOfOutcomes(ledger, {left[1]})
    guardian = Guardian(cast("Host", host), tell=metrics.count_guardian_action)
    for _ in range(2):
        await guardian.look()
    found = samples(metrics.render("1", {}))
    told = {name: value for name, value in found.items() if "guardian" in name}
    assert told == {
        "gantry_receiver_guardian_actions_total{outcome=restored}": 2,
        "gantry_receiver_guardian_actions_total{outcome=restore_failed}": 1,
    }
