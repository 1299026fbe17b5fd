"""Who may call the receiver, over the real application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from receiver import app as receiver_app
from receiver import contract, settings
from receiver.access import Access
from receiver.app import create_app
from receiver.settings import ReceiverSettings
from tests.contract.caller import KEY, REQUEST, Caller, FakeEngine, slug
from tests.contract.conftest import MakeApp

STATUS = contract.deploy_path("00000000-0000-0000-0000-000000000000", "status")
BODY = REQUEST.model_dump_json().encode()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Deployment-Timestamp": "1", "X-Deployment-Signature": "0" * 64},
        {"X-Deployment-Signature-Version": "v3"},
    ],
)
async def test_unsigned_bytes_never_reach_the_parser(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    """Malformed JSON without a good signature is 401, and nobody tried to read it."""
    parsed: list[type[BaseModel]] = []

    async def spy(request: Any, model: type[BaseModel]) -> BaseModel:
        parsed.append(model)
        return REQUEST

    monkeypatch.setattr(receiver_app, "read", spy)
    response = await caller.send("POST", contract.DEPLOY_PATH, b"{not json", headers)
    assert response.status_code == 401
    assert response.json()["detail"].startswith("Authentication failed")
    assert parsed == []
    await caller.call("POST", contract.DEPLOY_PATH, BODY)
    assert parsed == [contract.DeployRequest]  # the spy does see what is signed


async def test_a_wrong_key_is_refused_in_the_specifications_words(caller: Caller) -> None:
    """The sender reads 'Authentication failed: Invalid signature', in both forms."""
    stranger = replace(caller, key=b"x" * 40)
    for headers in (stranger.v1(BODY), stranger.v2("POST", contract.DEPLOY_PATH, BODY)):
        response = await caller.send("POST", contract.DEPLOY_PATH, BODY, headers)
        assert (response.status_code, slug(response)) == (401, "invalid-signature")
        assert response.json()["detail"] == "Authentication failed: Invalid signature"
        assert "WWW-Authenticate" in response.headers


@pytest.mark.parametrize(("offset_seconds", "side"), [(-400, "behind"), (400, "ahead of")])
async def test_a_refused_clock_says_how_far_off_it_is(caller: Caller, offset_seconds: int, side: str) -> None:
    """An operator sees the difference in seconds, and the host's time."""
    response = await replace(caller, clock_offset_seconds=offset_seconds).call("GET", STATUS)
    assert (response.status_code, slug(response)) == (401, "stale-request")
    problem = response.json()
    assert f"s {side} this host's" in problem["detail"]
    assert abs(abs(problem["extra"]["skew_seconds"]) - 400) <= 2
    assert int(response.headers["X-Host-Time"]) > 1_700_000_000


async def test_a_replayed_request_is_refused_after_a_restart_too(make_app: MakeApp) -> None:
    """A captured request works once, whatever process serves the second."""
    first = Caller(make_app())
    for headers in (first.v1(BODY), first.v2("POST", contract.DEPLOY_PATH, BODY)):
        accepted = await first.send("POST", contract.DEPLOY_PATH, BODY, headers)
        assert accepted.status_code == 201
        again = await first.send("POST", contract.DEPLOY_PATH, BODY, headers)
        assert (again.status_code, slug(again)) == (409, "replayed-request")
        restarted = await Caller(make_app()).send("POST", contract.DEPLOY_PATH, BODY, headers)
        assert (restarted.status_code, slug(restarted)) == (409, "replayed-request")


async def test_of_two_identical_requests_at_once_exactly_one_wins(make_app: MakeApp) -> None:
    """The replay store is a unique key: no race lets both through, not even in two processes' apps."""
    callers = [Caller(make_app()), Caller(make_app())] * 4
    headers = callers[0].v2("POST", contract.DEPLOY_PATH, BODY)
    responses = await asyncio.gather(
        *(caller.send("POST", contract.DEPLOY_PATH, BODY, headers) for caller in callers)
    )
    assert sorted(response.status_code for response in responses) == [201] + [409] * 7


async def test_a_foreign_network_is_refused_before_anything_else(caller: Caller) -> None:
    """A caller off the allow-list gets 403 with a good signature too; only /health answers it."""
    for peer in ("192.0.2.7", "2001:db8::1", "not-an-address"):
        foreign = replace(caller, peer=peer)
        response = await foreign.announce()
        assert (response.status_code, slug(response)) == (403, "network-not-allowed")
        assert (await foreign.send("GET", "/metrics")).status_code == 403
        assert (await foreign.send("GET", "/health")).status_code == 200


async def test_an_ipv4_caller_of_an_ipv6_socket_counts_as_ipv4(caller: Caller) -> None:
    """A dual-stack socket tells 127.0.0.1 as ::ffff:127.0.0.1; the allow-list means both."""
    assert (await replace(caller, peer="::ffff:127.0.0.1").announce()).status_code == 201
    assert (await replace(caller, peer="::ffff:192.0.2.7").announce()).status_code == 403


async def test_metrics_need_the_allow_list_only(caller: Caller) -> None:
    """Prometheus cannot sign."""
    await caller.announce()
    response = await caller.send("GET", contract.METRICS_PATH)
    assert response.status_code == 200
    assert 'gantry_receiver_requests_total{status="2xx"} 1' in response.text


async def test_an_announced_body_that_is_too_large_is_never_read(caller: Caller) -> None:
    """The head alone is enough for 413."""
    size_bytes, read = contract.MAX_CHUNK_BYTES + 1, list[str]()
    for method, path in (("PATCH", contract.deploy_path("x", "package")), ("POST", contract.DEPLOY_PATH)):

        async def never() -> AsyncIterator[bytes]:
            read.append("read")
            yield b""

        headers = {**caller.v2(method, path), "Content-Length": str(size_bytes)}
        response = await caller.send(method, path, never(), headers)
        assert (response.status_code, slug(response)) == (413, "body-too-large")
        assert response.headers["connection"] == "close"
    assert read == []


async def test_a_body_without_a_length_is_cut_off_at_the_limit(caller: Caller) -> None:
    """A sender that hides the size is caught while it sends."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65_536
            yield b"\0" * 65_536

    path = contract.deploy_path("x", "package")
    response = await caller.send("PATCH", path, endless(), caller.v2("PATCH", path))
    assert (response.status_code, slug(response)) == (413, "body-too-large")
    assert contract.MAX_CHUNK_BYTES < sent <= contract.MAX_CHUNK_BYTES + 2 * 65_536


async def test_signed_nonsense_is_named_field_by_field(caller: Caller) -> None:
    """A caller with the key learns which field is wrong; values are not repeated."""
    for body, expected in (
        (b"{not json", "body: Invalid JSON"),
        (b'{"container_name": "UPPER"}', "container_name: container_name 'UPPER': use at most"),
        (
            json.dumps(
                {"container_name": "a", "deployment_config": {"environment_variables": {"A": ["hush"]}}}
            ).encode(),
            "deployment_config.environment_variables.A",
        ),
    ):
        response = await caller.call("POST", contract.DEPLOY_PATH, body)
        assert (response.status_code, slug(response)) == (422, "malformed-request")
        assert expected in response.json()["detail"]
        assert "hush" not in response.text


async def test_a_changed_body_is_refused_and_the_request_is_not_spent(caller: Caller) -> None:
    """Bytes changed on the way are 422; the same signed request may then go again."""
    headers = caller.v2("POST", contract.DEPLOY_PATH, BODY)
    response = await caller.send("POST", contract.DEPLOY_PATH, BODY.replace(b"v1", b"v2"), headers)
    assert (response.status_code, slug(response)) == (422, "content-digest-mismatch")
    assert response.json()["error_code"] == "TRANSFER_FAILED"
    assert (await caller.send("POST", contract.DEPLOY_PATH, BODY, headers)).status_code == 201


async def test_a_changed_body_in_the_specifications_form_is_refused(caller: Caller) -> None:
    """There the signature itself covers the body."""
    response = await caller.send("POST", contract.DEPLOY_PATH, BODY + b" ", caller.v1(BODY))
    assert (response.status_code, slug(response)) == (401, "invalid-signature")


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", STATUS + "?all=1"), ("GET", STATUS.replace("0", "1", 1)), ("POST", STATUS)],
)
async def test_a_signature_holds_for_its_method_path_and_query_only(
    caller: Caller, method: str, target: str
) -> None:
    """A captured signature cannot be turned to another call."""
    response = await caller.send(method, target, b"", caller.v2("GET", STATUS))
    assert (response.status_code, slug(response)) == (401, "invalid-signature")


async def test_an_encoded_path_is_signed_as_it_is_sent(caller: Caller) -> None:
    """The raw request target counts, not what it decodes to."""
    target = STATUS.replace("0000", "%30000", 1) + "?a=%2F"
    assert (await caller.call("GET", target)).status_code == 404
    assert (await caller.send("GET", target, b"", caller.v2("GET", STATUS))).status_code == 401


async def test_the_specifications_form_opens_only_the_announcement(caller: Caller) -> None:
    """v1 does not cover the path, so it is taken where the specification uses it and nowhere else."""
    response = await caller.send("GET", STATUS, b"", caller.v1(b""))
    assert (response.status_code, slug(response)) == (401, "signature-missing")
    assert "v2" in response.json()["detail"]


@pytest.mark.parametrize("nonce", ["short", "x" * 65, "with space!"])
async def test_a_nonce_has_a_fixed_form(caller: Caller, nonce: str) -> None:
    """What goes into the replay store is bounded."""
    response = await caller.send("GET", STATUS, b"", caller.v2("GET", STATUS, nonce=nonce))
    assert response.status_code == 401
    assert contract.NONCE_HEADER in response.json()["detail"]


async def test_any_of_the_keys_opens_so_that_a_key_can_be_rotated(
    settings: ReceiverSettings, engine: FakeEngine, tmp_path: Any
) -> None:
    """Current and previous key work side by side."""
    old, new = "o" * 32, "n" * 32
    rotated = from_keys(f"{new},{old}", str(tmp_path / "rotated"))
    app = create_app(rotated, engine=engine.as_engine())
    for key, status in ((new, 201), (old, 201), ("x" * 32, 401)):
        assert (await Caller(app, key=key.encode()).announce()).status_code == status


def from_keys(keys: str, state_dir: str) -> ReceiverSettings:
    """Settings with these keys."""
    return settings.from_environment({"HMAC_SECRET_KEY": keys, "HOOK_RECEIVER_STATE_DIR": state_dir})


async def test_the_signature_headers_name_can_be_configured(
    settings: ReceiverSettings, engine: FakeEngine
) -> None:
    """`security.hmac_authentication.signature_header` is honoured, in both forms."""
    caller = Caller(
        create_app(replace(settings, signature_header="X-Our-Signature"), engine=engine.as_engine())
    )
    for headers in (caller.v1(BODY), caller.v2("POST", contract.DEPLOY_PATH, BODY)):
        assert (await caller.send("POST", contract.DEPLOY_PATH, BODY, headers)).status_code == 401
        headers["X-Our-Signature"] = headers.pop(contract.SIGNATURE_HEADER)
        assert (await caller.send("POST", contract.DEPLOY_PATH, BODY, headers)).status_code == 201


async def test_a_peer_that_asks_too_often_is_slowed_down_and_others_are_not(
    settings: ReceiverSettings, engine: FakeEngine
) -> None:
    """The bucket holds one second's worth per peer."""
    limited = create_app(replace(settings, rate_limit_per_second=5), engine=engine.as_engine())
    caller = Caller(limited)
    answers = [(await caller.send("GET", "/health")).status_code for _ in range(30)]
    assert answers[:5] == [200] * 5
    assert 429 in answers
    assert (await replace(caller, peer="127.0.0.2").send("GET", "/health")).status_code == 200


async def test_a_client_that_goes_in_mid_body_changes_nothing(app: FastAPI, caller: Caller) -> None:
    """Its request is not answered, not parsed and not spent."""
    headers, sent = caller.v2("POST", contract.DEPLOY_PATH, BODY), []
    messages = [{"type": "http.request", "body": BODY[:5], "more_body": True}, {"type": "http.disconnect"}]
    scope = {
        "type": "http", "method": "POST", "path": contract.DEPLOY_PATH, "query_string": b"",
        "raw_path": contract.DEPLOY_PATH.encode(), "client": ("127.0.0.1", 1),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    assert sent == []
    assert (await caller.send("POST", contract.DEPLOY_PATH, BODY, headers)).status_code == 201


async def test_nothing_is_open_but_health(caller: Caller) -> None:
    """Unknown paths, documentation routes and slashes at the end need a signature like the rest."""
    for path in ("/", "/docs", "/openapi.json", "/health/", "/metrics/", "/api/deploy/x"):
        assert (await caller.send("GET", path)).status_code == 401
        assert (await caller.call("GET", path)).status_code == 404


async def test_the_correlation_id_comes_back(caller: Caller) -> None:
    """A caller's own id is echoed, on refusals too; without one the host makes one."""
    headers = {contract.CORRELATION_HEADER: "wf-7"}
    assert (await caller.send("GET", STATUS, b"", headers)).headers[contract.CORRELATION_HEADER] == "wf-7"
    assert len((await caller.send("GET", STATUS)).headers[contract.CORRELATION_HEADER]) == 36


async def test_the_key_is_in_no_log_line_and_no_answer(
    caller: Caller, settings: ReceiverSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither success nor refusal nor `repr` tells it, nor an environment value of the container."""
    caplog.set_level("DEBUG")
    secret = {"container_name": "a", "deployment_config": {"environment_variables": {"TOKEN": "hush-hush"}}}
    answers = [
        await caller.call("POST", contract.DEPLOY_PATH, json.dumps(secret).encode()),
        await caller.call("POST", contract.DEPLOY_PATH, b"{"),
        await replace(caller, key=b"x" * 40).announce(),
    ]
    told = caplog.text + repr(settings) + "".join(answer.text for answer in answers)
    assert "request" in caplog.text
    assert KEY.decode() not in told
    assert "hush-hush" not in told


async def test_an_unexpected_error_tells_its_correlation_id_and_no_more(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The traceback goes to the log, once; the caller gets 500 and the id to look for."""

    def broken(_: object, __: str) -> None:
        raise RuntimeError("inner secret")

    monkeypatch.setattr("receiver.ledger.Ledger.status", broken)
    response = await caller.call("GET", STATUS, headers={contract.CORRELATION_HEADER: "wf-9"})
    assert (response.status_code, slug(response)) == (500, "internal-error")
    assert "inner secret" not in response.text
    assert response.headers[contract.CORRELATION_HEADER] == "wf-9"
    assert [record.message for record in caplog.records if record.exc_info] == ["unexpected error"]


async def test_a_body_that_does_not_come_frees_its_place(
    settings: ReceiverSettings, app: FastAPI, caller: Caller
) -> None:
    """A caller without a key that stalls is sent off after a while, and the application never sees it."""
    reached: list[Any] = []

    async def inner(*arguments: Any) -> None:
        reached.append(arguments)

    impatient = Access(
        inner,
        keys=settings.hmac_keys,
        ledger=app.state.service.ledger,
        allowed_networks=settings.allowed_networks,
        body_patience_seconds=0.01,
    )

    async def stalling() -> AsyncIterator[bytes]:
        yield BODY[:5]
        await asyncio.Event().wait()

    stalled = Caller(cast("FastAPI", impatient))
    response = await stalled.send("POST", contract.DEPLOY_PATH, stalling(), caller.v1(BODY))
    assert (response.status_code, slug(response)) == (408, "body-too-slow")
    assert reached == []
