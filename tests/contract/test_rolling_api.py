"""Rolling services over the real application with the fake engine: announced, shown, and rolled back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from receiver import contract
from receiver.contract import DeploymentConfig, DeployRequest, HostReport, RollbackRequest, Strategy
from receiver.routes import Routes, Target, route_for
from tests.contract.caller import Caller, FakeEngine, slug
from tests.contract.test_versions_api import FakeSite

PORTS = [{"host_port": 18997, "container_port": 80}]
ROLLING: dict[str, Any] = {"strategy": "rolling", "port_mappings": PORTS}
PROXIED = {**ROLLING, "hostname": "web.example.com", "https_certificate_file": "/etc/web.pem"}
DATA = {"host_path": "/data", "container_path": "/data"}


@pytest.mark.parametrize(("haproxy", "status"), [("no-such-proxy", 422), ("sh", 201)])
async def test_a_host_without_haproxy_refuses_before_a_byte_is_sent(
    caller: Caller, haproxy: str, status: int
) -> None:
    """With the command that installs it; where a program of that name is, the request is taken."""
    service = caller.app.state.service
    caller.app.state.service = replace(service, settings=replace(service.settings, haproxy=haproxy))
    request = DeployRequest(container_name="web", deployment_config=DeploymentConfig(**ROLLING))
    answer = await caller.announce(request)
    assert answer.status_code == status
    assert ("apt-get install haproxy" in answer.text) is (status == 422)
    assert status != 422 or slug(answer) == "rolling-impossible"


async def test_the_port_of_a_rolling_service_is_told_as_its_own(caller: Caller) -> None:
    """HAProxy holds it; for whoever asks, the service does."""
    folder = caller.app.state.service.settings.proxy_dir
    route = route_for("web", DeploymentConfig(**ROLLING), Target(container_id="one", ports={80: 20001}))
    (folder / "routes.json").write_text(Routes(routes=(route,)).model_dump_json())
    answer = await caller.call("GET", f"{contract.HOST_PATH}?port=18997/tcp")
    (port,) = HostReport.model_validate_json(answer.content).ports
    assert (port.free, port.holder, port.container_name) == (False, "container web (HAProxy)", "web")


@pytest.mark.parametrize(
    ("kept", "now", "expected"),
    [
        ({"port_mappings": PORTS}, ROLLING, Strategy.ROLLING),
        ({"port_mappings": PORTS}, {"port_mappings": PORTS}, Strategy.RECREATE),
        ({"network_mode": "host"}, ROLLING, Strategy.RECREATE),
        (ROLLING, {"port_mappings": PORTS}, Strategy.RECREATE),
        (PROXIED, {"port_mappings": PORTS}, Strategy.RECREATE),
        (ROLLING, {**PROXIED, "strategy_fallback": "recreate", "volumes": [DATA]}, Strategy.RECREATE),
    ],
)
async def test_a_rollback_goes_the_way_of_the_version_that_runs(
    caller: Caller, engine: FakeEngine, kept: dict[str, Any], now: dict[str, Any], expected: Strategy
) -> None:
    """A service that rolls is rolled back without a lost request, where the kept version can.

    One that is recreated is not given to the proxy, which has lost its host name and certificate.
    """
    site = FakeSite(caller, caller.app.state.service.ledger, "web", engine)
    await site.deploy("v1", **kept)
    await site.deploy("v2", **now)
    body = RollbackRequest().model_dump_json().encode()
    answer = await caller.call("POST", contract.container_path("web", "rollback"), body)
    entry = site.ledger.get(answer.json()["deployment_id"])
    assert (entry.request.image_tag, entry.request.deployment_config.way) == ("v1", expected)
    DeploymentConfig.model_validate(entry.request.deployment_config.model_dump())


async def test_without_a_version_that_runs_a_rollback_goes_the_kept_one_s_way(
    caller: Caller, engine: FakeEngine
) -> None:
    """Someone has removed the container: nothing else says how."""
    site = FakeSite(caller, caller.app.state.service.ledger, "web", engine)
    await site.deploy("v1", **ROLLING)
    await site.deploy("v2", port_mappings=PORTS)
    engine.containers = tuple(made for made in engine.containers if made.image_tag == "v1")
    body = RollbackRequest().model_dump_json().encode()
    answer = await caller.call("POST", contract.container_path("web", "rollback"), body)
    entry = site.ledger.get(answer.json()["deployment_id"])
    assert entry.request.deployment_config.way is Strategy.ROLLING


async def test_two_strategies_of_the_same_version_are_one_version(caller: Caller, engine: FakeEngine) -> None:
    """Going from one to the other would change nothing that runs, so that it is no version to go back to."""
    site = FakeSite(caller, caller.app.state.service.ledger, "web", engine)
    await site.deploy("v1", port_mappings=PORTS)
    await site.deploy("v1", **ROLLING)
    answer = await caller.call("GET", contract.container_path("web"))
    assert answer.json()["previous"] is None
