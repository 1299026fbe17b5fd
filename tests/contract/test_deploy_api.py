"""Announcing deployments, asking for them, and the host's health, over the real application."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from dataclasses import replace

import pytest

from receiver import app as receiver_app
from receiver import contract, ledger, locks
from receiver.contract import DeployAccepted, HostState, ImageAnnouncement
from receiver.settings import ReceiverSettings
from tests.contract.caller import KEY, REQUEST, Caller, FakeEngine, announcement, slug

LAYERS = ["sha256:" + "1" * 64, "sha256:" + "2" * 64]
IMAGE = ImageAnnouncement(
    config_digest="sha256:" + "a" * 64, layers=LAYERS, architecture="amd64", size_bytes=1000
)
WITH_IMAGE = REQUEST.model_copy(update={"image": IMAGE, "package": announcement(b"package")})


async def test_the_specifications_own_client_is_understood(caller: Caller) -> None:
    """Its three fields, signed and sent as its guide shows, give a deployment id."""
    payload = {
        "container_name": "omninode-orchestrator",
        "image_tag": "latest",
        "deployment_config": {"port_mappings": [{"host_port": 8060, "container_port": 8060}]},
    }
    timestamp = str(int(time.time()))
    signature = hmac.new(KEY, f"{timestamp}.{json.dumps(payload)}".encode(), hashlib.sha256).hexdigest()
    headers = {"X-Deployment-Signature": signature, "X-Deployment-Timestamp": timestamp}
    response = await caller.send("POST", "/api/deploy", json.dumps(payload), headers)
    assert response.status_code == 201
    accepted = DeployAccepted.model_validate_json(response.content)
    status = await caller.status(accepted.deployment_id)
    assert (status.container_name, status.state) == ("omninode-orchestrator", HostState.RECEIVING)


async def test_the_same_request_again_gives_the_same_deployment(caller: Caller) -> None:
    """A sender whose answer was lost asks again with its key, and no second deployment is made."""
    first, again = await caller.announce(key="wf-1"), await caller.announce(key="wf-1")
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    other = await caller.announce(REQUEST.model_copy(update={"image_tag": "v2"}), key="wf-1")
    assert (other.status_code, slug(other)) == (409, "idempotency-conflict")
    assert (await caller.announce()).json()["deployment_id"] != first.json()["deployment_id"]


@pytest.mark.parametrize("key", ["v1:abc", "x" * 129, "with space"])
async def test_an_idempotency_key_has_a_fixed_form(caller: Caller, key: str) -> None:
    """The host's own prefix cannot be taken."""
    response = await caller.announce(key=key)
    assert (response.status_code, slug(response)) == (422, "malformed-request")


async def test_an_image_that_the_engine_has_needs_no_upload(caller: Caller, engine: FakeEngine) -> None:
    """The deployment is ready at once, also when the image came after the first announcement."""
    before = DeployAccepted.model_validate_json((await caller.announce(WITH_IMAGE, key="a")).content)
    assert (before.state, before.image_present) == (HostState.RECEIVING, False)
    engine.images = (IMAGE,)
    for key, status_code in (("b", 201), ("a", 200)):
        response = await caller.announce(WITH_IMAGE, key=key)
        accepted = DeployAccepted.model_validate_json(response.content)
        assert response.status_code == status_code
        assert (accepted.state, accepted.image_present) == (HostState.READY, True)
        assert accepted.known_layers == LAYERS


async def test_known_layers_are_told(caller: Caller, engine: FakeEngine) -> None:
    """What the engine has need not travel."""
    engine.layers = (LAYERS[0], "sha256:" + "9" * 64)
    accepted = DeployAccepted.model_validate_json((await caller.announce(WITH_IMAGE)).content)
    assert accepted.known_layers == [LAYERS[0]]
    assert accepted.upload_url == contract.deploy_path(accepted.deployment_id, "package")


@pytest.mark.parametrize(("field", "value"), [("architecture", "arm64"), ("os", "windows")])
async def test_an_image_for_another_platform_is_refused_with_both_named(
    caller: Caller, field: str, value: str
) -> None:
    """It would start with 'exec format error' after the old container was stopped."""
    image = IMAGE.model_copy(update={field: value})
    response = await caller.announce(WITH_IMAGE.model_copy(update={"image": image}))
    assert (response.status_code, slug(response)) == (422, "platform-mismatch")
    problem = response.json()
    assert problem["error_code"] == "DEPLOYMENT_FAILED"
    assert f"{image.os}/{image.architecture}" in problem["detail"]
    assert "linux/amd64" in problem["detail"]


async def test_a_correlation_id_in_the_header_names_the_workflow(caller: Caller) -> None:
    """Only where the body names none."""
    for body, expected in ((b'{"container_name":"a"}', "wf-head"),
                           (b'{"container_name":"a","workflow_id":"wf-body"}', "wf-body")):  # fmt: skip
        headers = {contract.CORRELATION_HEADER: "wf-head"}
        response = await caller.call("POST", contract.DEPLOY_PATH, body, headers)
        assert (await caller.status(response.json()["deployment_id"])).workflow_id == expected


async def test_an_unknown_deployment_is_told_as_such_everywhere(caller: Caller) -> None:
    """404 with the next step, whatever is asked of it; a path in the id is no path."""
    body = announcement(b"x").model_dump_json().encode()
    for deployment_id in ("nobody", "%2e%2e%2fledger"):
        for method, action, content in (
            ("GET", "status", b""),
            ("HEAD", "package", b""),
            ("PATCH", "package", b"x"),
            ("POST", "package", body),
            ("POST", "restore", b""),
            ("POST", "abort", b""),
        ):
            target = f"/api/deploy/{deployment_id}/{action}"
            response = await caller.call(method, target, content, {"Upload-Offset": "0"})
            assert response.status_code == 404, (method, target)
    assert slug(await caller.call("GET", "/api/deploy/nobody/status")) == "deployment-unknown"


async def test_an_operation_under_way_is_not_disturbed(caller: Caller, settings: ReceiverSettings) -> None:
    """While a process holds the container's lock, what it has begun is 409 to abort and to restore.

    What nobody has begun can be given up all the same: no lock of another deployment stands in its way.
    """
    begun = (await caller.announce()).json()["deployment_id"]
    untouched = (await caller.announce()).json()["deployment_id"]
    service_ledger: ledger.Ledger = caller.app.state.service.ledger
    for deployment_id in (begun, untouched):
        service_ledger.move(deployment_id, HostState.READY)
    service_ledger.begin_step(begun, "deploy_container", "deployment_execution")
    settings.locks_dir.mkdir(parents=True, exist_ok=True)
    with (settings.locks_dir / f"{REQUEST.container_name}.lock").open("w") as held:
        locks._lock_now(held.fileno(), settings.locks_dir, REQUEST.container_name)
        for action in ("abort", "restore"):
            response = await caller.call("POST", contract.deploy_path(begun, action))
            assert (response.status_code, slug(response)) == (409, "container-busy")
        response = await caller.call("POST", contract.deploy_path(untouched, "abort"))
        assert response.json()["state"] == "aborted"


async def test_health_tells_the_engine_and_its_absence(
    caller: Caller, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 and 503 with the same fields; the specification's two are among them."""
    engine.down = True
    response = await caller.send("GET", contract.HEALTH_PATH)
    assert response.status_code == 503
    health = contract.HostHealth.model_validate_json(response.content)
    assert (health.status, health.docker_connected) == ("degraded", False)
    monkeypatch.setattr(receiver_app, "HEALTH_CACHE_SECONDS", -1)
    engine.down = False
    response = await caller.send("GET", contract.HEALTH_PATH)
    assert response.status_code == 200
    health = contract.HostHealth.model_validate_json(response.content)
    assert (health.status, health.docker_connected, health.architecture) == ("healthy", True, "amd64")


async def test_what_seldom_changes_of_the_engine_is_asked_once_but_a_failure_is_not_kept(
    caller: Caller, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An announcement after others asks nothing; the first after a failure asks again."""
    engine.down = True
    assert (await caller.announce(WITH_IMAGE)).status_code == 503
    monkeypatch.setattr(receiver_app, "HEALTH_CACHE_SECONDS", -1)
    engine.down = False
    for _ in range(3):
        assert (await caller.announce(WITH_IMAGE)).status_code == 201
    assert engine.times_asked == 2
    assert (await caller.send("GET", contract.HEALTH_PATH)).status_code == 200
    assert engine.times_asked == 3


async def test_an_engine_that_is_down_refuses_only_what_needs_it(caller: Caller, engine: FakeEngine) -> None:
    """Uploads and questions go on; what needs the engine is 503 with the next step."""
    engine.down = True
    response = await caller.announce(WITH_IMAGE)
    assert (response.status_code, slug(response)) == (503, "engine-unreachable")
    deployment_id = await caller.announce_upload(b"package")
    assert (await caller.patch(deployment_id, 0, b"package")).status_code == 204
    assert (await caller.status(deployment_id)).state is HostState.READY


async def test_other_methods_are_refused_as_problems(caller: Caller) -> None:
    """Even the framework's own refusals are problem details."""
    response = await caller.call("DELETE", contract.DEPLOY_PATH)
    assert (response.status_code, slug(response)) == (405, "method-not-allowed")
    assert (await replace(caller).send("DELETE", contract.HEALTH_PATH)).status_code == 405


async def test_the_status_says_whether_a_process_works_on_the_deployment(
    caller: Caller, settings: ReceiverSettings
) -> None:
    """One that works on another deployment of the same container does not count."""
    mine = (await caller.announce()).json()["deployment_id"]
    other = (await caller.announce()).json()["deployment_id"]
    assert not (await caller.status(mine)).is_held
    with locks.container_lock(settings.locks_dir, REQUEST.container_name, mine):
        assert (await caller.status(mine)).is_held
        assert not (await caller.status(other)).is_held
    assert not (await caller.status(mine)).is_held
