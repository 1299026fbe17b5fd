"""The HTTP API over its real application: real records (SQLite), a real Prefect server, no worker."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    temporary_settings,
)
from prefect.states import Completed, Failed
from prefect.testing.utilities import prefect_test_harness
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from deployments import api_models
from deployments.api_access import Access
from deployments.api_app import create_app
from deployments.api_models import WEB
from deployments.api_services import Services
from deployments.api_tokens import TokenStore
from flows.deploy import deploy_container
from receiver.contract import ErrorCode, OperationResult, Stage
from tasks.records import Facts, NewWorkflow, Records, StageResult, WorkflowState
from tests.services import free_port

LIST = "/api/v1/deployments"
TRIGGER = f"{LIST}/trigger"
NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
SECRET = "pl41n-s3cr3t-0f-th3-3nv1r0nm3nt"
S = WorkflowState


@flow(name="something-else")
def something_else() -> None:
    """A flow that is none of ours."""


@pytest.fixture(scope="module", autouse=True)
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server that knows `deploy-container/default`; no worker takes its runs."""
    updates = {PREFECT_HOME: tmp_path_factory.mktemp("prefect"), PREFECT_SERVER_ANALYTICS_ENABLED: False}
    with temporary_settings(updates), prefect_test_harness(server_startup_timeout=60):
        asyncio.run(register())
        yield


async def register() -> None:
    """The Prefect deployments of these tests."""
    for registered in (deploy_container, something_else):
        await (await registered.ato_deployment(name="default")).aapply()


@dataclass(frozen=True)
class Rig:
    """One API with its records; `http` carries a good token."""

    http: httpx.AsyncClient
    tokens: TokenStore
    records: Records
    services: Services

    async def trigger(self, body: Mapping[str, Any] = WEB, **headers: str) -> str:
        """The workflow id of a deployment that was triggered."""
        answer = await self.http.post(TRIGGER, json=body, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["workflow_id"])

    async def begin(self, workflow_id: str, **changes: Any) -> None:
        """Record the workflow as the flow does when it begins."""
        values = {"container_name": "web", "remote_host": "host-b", "image_tag": "v1.2.0"} | changes
        at = values.pop("at", None)
        await self.records.create(NewWorkflow(workflow_id=workflow_id, **values), at=at)

    async def complete(self, workflow_id: str) -> None:
        """Carry the workflow through all stages."""
        path = [S.PENDING, S.PACKAGING, S.TRANSFERRING, S.DEPLOYING, S.VALIDATING, S.COMPLETED]
        facts = {
            S.TRANSFERRING: Facts(stage=stage_result(Stage.PACKAGE)),
            S.DEPLOYING: Facts(deployment_id="d-1"),
            S.COMPLETED: Facts(deployed_url="http://10.0.0.7:8080"),
        }
        for before, after in pairwise(path):
            await self.records.advance(workflow_id, before, after, facts.get(after, Facts()))


def stage_result(stage: Stage) -> StageResult:
    """A stage with one operation."""
    told = OperationResult(
        name="build_docker_image", stage=stage, success=True, started_at=NOW, duration_ms=1200
    )
    return StageResult(
        stage=stage, success=True, duration_ms=1500, operations=(told,), started_at=NOW, completed_at=NOW
    )


@asynccontextmanager
async def calling(
    services: Services, tokens: TokenStore | None, token: str = ""
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application over these services."""
    transport = httpx.ASGITransport(app=create_app(services, tokens), raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1:8060", headers=headers
    ) as http:
        yield http
    await services.close()


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine, no broker, no home but the test's own."""
    for name in ("KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL", "GANTRY_API_TOKENS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GANTRY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-engine.sock")


@pytest.fixture(scope="module")
def empty_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database to copy: migrations take longer than most of these tests."""
    path = tmp_path_factory.mktemp("records") / "empty.db"

    async def migrate() -> None:
        async with await Records.open(f"sqlite:///{path}"):
            pass

    asyncio.run(migrate())
    return path


@pytest.fixture
async def rig(tmp_path: Path, empty_records: Path) -> AsyncIterator[Rig]:
    """An API with one token, on records of its own."""
    shutil.copyfile(empty_records, tmp_path / "records.db")
    url = f"sqlite:///{tmp_path / 'records.db'}"
    tokens = TokenStore(tmp_path / "tokens.json")
    services = Services(lambda: found(url))
    async with (
        await Records.open(url) as records,
        calling(services, tokens, tokens.create("ci", NOW)) as http,
    ):
        yield Rig(http, tokens, records, services)


async def found(url: str) -> str:
    """The URL, as the block or the environment would tell it."""
    return url


async def run_of(workflow_id: str) -> FlowRun:
    """The flow run in Prefect."""
    async with get_client() as client:
        return await client.read_flow_run(UUID(workflow_id))


async def end_run(workflow_id: str, state: State[Any]) -> None:
    """Have Prefect end the run, as a worker would."""
    async with get_client() as client:
        await client.set_flow_run_state(UUID(workflow_id), state, force=True)


def slug(answer: httpx.Response) -> str:
    """The problem's slug; fails when the answer is no problem in the promised form."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["title"]
    assert problem["detail"]
    assert problem["next_step"]
    return str(problem["type"].removeprefix("urn:gantry:problem:"))


# Who may call


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer gantry_wrong", "Basic dXNlcjpwYXNz", "gantry_wrong", "Bearer a b", "Bearer \xff"],
)
async def test_without_a_known_token_nothing_is_answered(rig: Rig, authorization: str) -> None:
    """Missing, wrong and malformed are all 401, with the challenge."""
    headers = [(b"authorization", authorization.encode("latin-1"))]
    for method, path in [("POST", TRIGGER), ("GET", LIST), ("GET", "/metrics"), ("GET", "/no-such-path")]:
        request = rig.http.build_request(method, path)
        request.headers = httpx.Headers(headers)
        answer = await rig.http.send(request)
        assert (answer.status_code, slug(answer)) == (401, "invalid-token")
        assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_bytes_without_a_token_never_reach_the_parser(rig: Rig) -> None:
    """Malformed JSON is 401 without a token, and 422 with one; the same for a body that is too large."""
    stranger = {"Authorization": "Bearer gantry_wrong", "Content-Type": "application/json"}
    known = {"Content-Type": "application/json"}
    for body, status in ((b"{not json", 422), (b" " * (1024 * 1024 + 1), 413)):
        assert (await rig.http.post(TRIGGER, content=body, headers=stranger)).status_code == 401
        answer = await rig.http.post(TRIGGER, content=body, headers=known)
        assert answer.status_code == status
        slug(answer)


async def test_a_revoked_token_is_refused_while_the_api_runs(rig: Rig) -> None:
    """The next request is 401; another token still works."""
    other = rig.tokens.create("other", NOW)
    assert (await rig.http.get(LIST)).status_code == 200
    rig.tokens.revoke("ci")
    assert (await rig.http.get(LIST)).status_code == 401
    assert (await rig.http.get(LIST, headers={"Authorization": f"bearer {other}"})).status_code == 200


async def test_tokens_that_cannot_be_read_let_nobody_in(rig: Rig) -> None:
    """503, not open."""
    rig.tokens.path.write_text("broken")
    assert (await rig.http.get(LIST)).status_code == 503


async def test_a_body_without_a_length_is_counted_too(rig: Rig) -> None:
    """A chunked body ends at the same limit."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 64 * 1024

    answer = await rig.http.post(TRIGGER, content=pieces(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, slug(answer)) == (413, "body-too-large")


async def test_a_body_that_does_not_come_is_given_up() -> None:
    """A caller that stalls holds nothing for ever."""
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        sent.append(message)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the application must not be asked")

    access = Access(application, tokens=None, open_paths=(), body_patience_seconds=0.01)
    scope = {"type": "http", "path": "/", "headers": [(b"host", b"localhost")]}
    await asyncio.wait_for(access(scope, receive, send), 5)
    assert sent[0]["status"] == 408


async def test_without_tokens_only_loopback_names_are_answered(rig: Rig) -> None:
    """A web page that makes its own name mean 127.0.0.1 is not let in."""
    async with calling(Services(lambda: found("sqlite:////nowhere")), None) as http:
        for host in ("localhost:8060", "127.0.0.1", "[::1]:8060"):
            assert (await http.get("/openapi.json", headers={"Host": host})).status_code == 200
        answer = await http.post(TRIGGER, json=WEB, headers={"Host": "attacker.example"})
        assert (answer.status_code, slug(answer)) == (403, "host-not-allowed")


# Trigger


async def test_a_trigger_starts_a_run_and_leaves_defaults_to_the_flow(rig: Rig) -> None:
    """The workflow's id is the flow run's; what was not given is not passed; who asked is a tag."""
    answer = await rig.http.post(TRIGGER, json=WEB, headers={"X-Correlation-ID": "order-7"})
    told = answer.json()
    workflow_id = told["workflow_id"]
    assert answer.status_code == 202
    assert told == {
        "status": "accepted",
        "workflow_id": workflow_id,
        "deployment_id": None,
        "deployed_url": None,
        "duration_ms": None,
        "error_code": None,
        "error_message": None,
        "status_url": f"{LIST}/status/{workflow_id}",
    }
    assert answer.headers["location"] == told["status_url"]
    assert answer.headers["x-correlation-id"] == "order-7"
    run = await run_of(workflow_id)
    assert run.parameters == WEB
    assert {"correlation:order-7", "api:ci"} <= set(run.tags)
    assert run.state is not None
    assert run.state.is_scheduled()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"container_name": "no/such name"}, "container_name"),
        ({"remote_host": "http://host-b"}, "remote_host"),
        ({"remote_port": 0}, "remote_port"),
        ({"deployment_config": {"port_mapings": []}}, "deployment_config.port_mapings"),
        ({"deployment_timeout_ms": None}, "deployment_timeout_ms"),
        ({"unknown": 1}, "unknown"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_started(
    rig: Rig, change: dict[str, Any], field: str
) -> None:
    """Refused before Prefect is asked; the value itself is not repeated."""
    secret = {"environment_variables": {"TOKEN": SECRET, "not a name": SECRET}}
    before = await count_runs()
    for body in (WEB | change, WEB | {"deployment_config": secret} | change):
        answer = await rig.http.post(TRIGGER, json=body)
        assert (answer.status_code, slug(answer)) == (422, "malformed-request")
        assert field in [error["field"] for error in answer.json()["errors"]]
        assert SECRET not in answer.text
    assert await count_runs() == before


async def count_runs() -> int:
    """Flow runs that Prefect knows."""
    async with get_client() as client:
        return len(await client.read_flow_runs())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "build_options.build_args",
            {"build_options": {"build_args": {"__prefect_kind": "jinja", "template": "{{ 7 * 7 }}"}}},
        ),
        ("deployment_config.labels", {"deployment_config": {"labels": {"$ref": str(uuid4())}}}),
        (
            "deployment_config.environment_variables",
            {"deployment_config": {"environment_variables": {"__prefect_kind": "workspace_variable"}}},
        ),
    ],
)
async def test_prefects_own_orders_are_refused(rig: Rig, path: str, body: dict[str, Any]) -> None:
    """Prefect would render templates, variables and blocks into the parameters."""
    answer = await rig.http.post(TRIGGER, json=WEB | body)
    assert (answer.status_code, slug(answer)) == (422, "malformed-request")
    assert answer.json()["errors"][0]["field"] == path


async def test_a_body_must_say_that_it_is_json(rig: Rig) -> None:
    """A form of a web page cannot trigger anything."""
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = await rig.http.post(TRIGGER, content=json.dumps(WEB), headers={"Content-Type": media_type})
        assert (answer.status_code, slug(answer)) == (415, "not-json")


@pytest.mark.parametrize("text", [r'"\ud800"', "NaN", "[" * 5000])
async def test_json_that_no_database_can_hold_is_refused(rig: Rig, text: str) -> None:
    """Half a character, no number, and a tower: 422, never a crash."""
    body = f'{{"container_name": "web", "remote_host": "b", "build_options": {{"labels": {{"a": {text}}}}}}}'
    answer = await rig.http.post(TRIGGER, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, slug(answer)) == (422, "malformed-request")


async def test_a_repeated_key_is_the_same_deployment(rig: Rig) -> None:
    """Also when both come at once, and however the JSON is written."""
    key = {"Idempotency-Key": f"build-{uuid4()}"}
    backwards = dict(reversed(WEB.items()))
    first = await asyncio.gather(rig.trigger(WEB, **key), rig.trigger(WEB, **key))
    assert {*first, await rig.trigger(backwards, **key)} == {first[0]}
    assert await rig.trigger(WEB) != first[0]


async def test_a_repeated_key_with_another_body_is_409(rig: Rig) -> None:
    """A parameter more is another request, though its value be the default."""
    key = {"Idempotency-Key": f"build-{uuid4()}"}
    await rig.trigger(WEB, **key)
    for change in ({"image_tag": "v9"}, {"rollback_on_failure": True}):
        answer = await rig.http.post(TRIGGER, json=WEB | change, headers=key)
        assert (answer.status_code, slug(answer)) == (409, "idempotency-conflict")


@pytest.mark.parametrize("key", ["", "two words", "x" * 129])
async def test_a_key_that_is_none_is_refused(rig: Rig, key: str) -> None:
    """Rather than ignored: the caller relies on it."""
    answer = await rig.http.post(TRIGGER, json=WEB, headers={"Idempotency-Key": key})
    assert (answer.status_code, slug(answer)) == (422, "malformed-request")


# Waiting


async def test_waiting_answers_when_the_records_hold_the_end(rig: Rig) -> None:
    """Success, with the specification's fields."""
    key = {"Idempotency-Key": f"build-{uuid4()}"}
    workflow_id = await rig.trigger(WEB, **key)
    waiting = asyncio.create_task(
        rig.http.post(f"{TRIGGER}?wait=true&wait_seconds=20", json=WEB, headers=key)
    )
    await rig.begin(workflow_id)
    await rig.complete(workflow_id)
    answer = await waiting
    told = answer.json()
    assert answer.status_code == 200
    assert isinstance(told.pop("duration_ms"), int)
    assert told == {
        "status": "success",
        "workflow_id": workflow_id,
        "deployment_id": "d-1",
        "deployed_url": "http://10.0.0.7:8080",
        "error_code": None,
        "error_message": None,
        "status_url": f"{LIST}/status/{workflow_id}",
    }


async def test_waiting_tells_a_failure_with_code_and_cause(rig: Rig) -> None:
    """200: the question was answered; the deployment failed."""
    key = {"Idempotency-Key": f"build-{uuid4()}"}
    workflow_id = await rig.trigger(WEB, **key)
    await rig.begin(workflow_id)
    cause = Facts(error_code=ErrorCode.BUILD_FAILED, error_message="no such base image")
    await rig.records.advance(workflow_id, S.PENDING, S.PACKAGING)
    await rig.records.advance(workflow_id, S.PACKAGING, S.FAILED, cause)
    answer = await rig.http.post(f"{TRIGGER}?wait=true", json=WEB, headers=key)
    told = answer.json()
    assert (answer.status_code, told["status"]) == (200, "failed")
    assert (told["error_code"], told["error_message"]) == ("BUILD_FAILED", "no such base image")


async def test_waiting_ends_at_its_bound(rig: Rig) -> None:
    """202 and 'running', and the deployment goes on."""
    began = time.monotonic()
    answer = await rig.http.post(f"{TRIGGER}?wait=true&wait_seconds=1", json=WEB)
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    assert time.monotonic() - began < 10
    assert (await run_of(answer.json()["workflow_id"])).state_name == "Scheduled"


async def test_records_that_are_down_do_not_refuse_what_was_started(tmp_path: Path) -> None:
    """A caller who is refused would trigger again: it is told the workflow's id instead."""
    tokens = TokenStore(tmp_path / "tokens.json")
    url = f"postgresql://gantry@127.0.0.1:{free_port()}/gantry"
    async with calling(Services(lambda: found(url)), tokens, tokens.create("ci", NOW)) as http:
        answer = await http.post(f"{TRIGGER}?wait=true&wait_seconds=1", json=WEB)
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    assert (await run_of(answer.json()["workflow_id"])).parameters == WEB


async def test_waiting_ends_when_the_api_stops(rig: Rig) -> None:
    """Who waits is told where the deployment stands, instead of a broken connection."""
    rig.services.stopping.set()
    answer = await rig.http.post(f"{TRIGGER}?wait=true", json=WEB)
    assert (answer.status_code, answer.json()["status"]) == (202, "running")


@pytest.mark.parametrize("query", ["wait_seconds=0", "wait_seconds=100000", "wait=perhaps", "wiat=true"])
async def test_a_wrong_option_is_refused(rig: Rig, query: str) -> None:
    """A misspelt one too."""
    answer = await rig.http.post(f"{TRIGGER}?{query}", json=WEB)
    assert (answer.status_code, slug(answer)) == (422, "malformed-request")


async def test_a_run_that_prefect_ended_before_it_began_is_failed(rig: Rig) -> None:
    """With Prefect's message, in one line, without the values that pydantic quotes."""
    key = {"Idempotency-Key": f"build-{uuid4()}"}
    workflow_id = await rig.trigger(WEB, **key)
    message = (
        "Validation of flow parameters failed:\ndeployment_config\n"
        f"  Input should be a string [type=string_type, input_value='{SECRET}', input_type=str]\nend"
    )
    await end_run(workflow_id, Failed(message=message))
    answer = await rig.http.post(f"{TRIGGER}?wait=true", json=WEB, headers=key)
    told = answer.json()
    assert (answer.status_code, told["status"]) == (200, "failed")
    assert told["error_message"].endswith(
        "Validation of flow parameters failed: deployment_config Input should be a string end"
    )
    state = (await rig.http.get(told["status_url"])).json()["workflow_state"]
    assert (state["current_state"], state["success"], state["prefect_state"]) == ("FAILED", False, "Failed")
    assert SECRET not in answer.text + json.dumps(state)


async def test_a_completed_run_without_a_record_is_no_success(rig: Rig) -> None:
    """The API looks into another database than the worker, or the record was pruned: it says so."""
    workflow_id = await rig.trigger()
    await end_run(workflow_id, Completed())
    answer = await rig.http.get(f"{LIST}/status/{workflow_id}")
    assert (answer.status_code, slug(answer)) == (404, "record-missing")


# Status and history


async def test_a_run_that_no_worker_has_taken_is_pending(rig: Rig) -> None:
    """Known to Prefect alone: with Prefect's own state beside it."""
    workflow_id = await rig.trigger()
    answer = await rig.http.get(f"{LIST}/status/{workflow_id}")
    state = answer.json()["workflow_state"]
    assert answer.status_code == 200
    assert answer.json()["stage_results"] == []
    assert (state["current_state"], state["prefect_state"], state["success"]) == (
        "PENDING",
        "Scheduled",
        None,
    )
    assert (state["container_name"], state["remote_host"], state["image_tag"]) == ("web", "host-b", "v1.2.0")
    history = (await rig.http.get(f"{LIST}/{workflow_id}/history")).json()
    assert history["workflow"]["current_state"] == "PENDING"


async def test_the_status_has_the_specifications_shape(rig: Rig) -> None:
    """Its columns of the workflow, and of the stages."""
    await rig.begin("w-1")
    await rig.complete("w-1")
    told = (await rig.http.get(f"{LIST}/status/w-1")).json()
    assert set(told) == {"workflow_state", "stage_results"}
    state, stage = told["workflow_state"], told["stage_results"][0]
    wanted = "workflow_id current_state stages_completed stages_failed total_duration_ms success"
    assert set(wanted.split()) | {"error_message", "created_at"} <= set(state)
    assert (state["current_state"], state["success"]) == ("COMPLETED", True)
    assert state["stages_completed"] == ["package_preparation"]
    assert {"stage_name", "success", "duration_ms", "operations", "error_message"} <= set(stage)
    assert stage["operations"][0]["name"] == "build_docker_image"


@pytest.mark.parametrize("workflow_id", ["no-such-id", str(UUID(int=7)), "%00", "a" * 3000, "..%2fhealth"])
async def test_an_unknown_workflow_is_404(rig: Rig, workflow_id: str) -> None:
    """For status and history alike."""
    for path in (f"{LIST}/status/{workflow_id}", f"{LIST}/{workflow_id}/history"):
        answer = await rig.http.get(path)
        assert answer.status_code == 404
        assert slug(answer) in {"workflow-unknown", "not-found"}


async def test_a_run_of_another_flow_is_no_deployment(rig: Rig) -> None:
    """Prefect knows it; the API does not tell of it."""
    async with get_client() as client:
        known = await client.read_deployment_by_name("something-else/default")
        run = await client.create_flow_run_from_deployment(known.id)
    answer = await rig.http.get(f"{LIST}/status/{run.id}")
    assert (answer.status_code, slug(answer)) == (404, "workflow-unknown")


async def test_the_history_has_transitions_stages_and_events(rig: Rig) -> None:
    """In their order; events say whether they were sent."""
    await rig.begin("w-1")
    await rig.complete("w-1")
    told = (await rig.http.get(f"{LIST}/w-1/history")).json()
    assert [row["to_state"] for row in told["transitions"]][::4] == ["PACKAGING", "COMPLETED"]
    assert [row["sequence"] for row in told["transitions"]] == [1, 2, 3, 4, 5]
    assert [event["event_type"] for event in told["events"]] == [
        "DEPLOYMENT_STARTED",
        "DEPLOYMENT_STAGE_COMPLETED",
        "DEPLOYMENT_COMPLETED",
    ]
    assert {event["sent_at"] for event in told["events"]} == {None}
    assert told["events"][0]["payload"]["container_name"] == "web"
    assert told["stages"][0]["gates"] == []


async def test_no_value_of_the_environment_is_told(rig: Rig) -> None:
    """Neither under a telling name nor under a plain one, in no answer; references stay."""
    request = {
        "deployment_config": {
            "environment_variables": {"API_KEY": SECRET, "GREETING": SECRET, "DB": "secret://db"}
        },
        "build_options": {"build_args": {"FLAVOUR": SECRET}},
    }
    await rig.begin("w-1", request=request)
    await rig.records.advance("w-1", S.PENDING, S.FAILED, Facts(error_message=f"password={SECRET}"))
    paths = (f"{LIST}/status/w-1", f"{LIST}/w-1/history", LIST)
    answers = [await rig.http.get(path) for path in paths]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert [answer.url for answer in answers if SECRET in answer.text] == []
    told = answers[1].json()["request"]["deployment_config"]["environment_variables"]
    assert told == {"API_KEY": "***", "GREETING": "***", "DB": "secret://db"}


# The list


async def ids_of(rig: Rig, **options: Any) -> list[str]:
    """Workflow ids of one page."""
    answer = await rig.http.get(LIST, params=options)
    assert answer.status_code == 200, answer.text
    return [row["workflow_id"] for row in answer.json()["deployments"]]


async def test_pages_are_stable_while_workflows_start(rig: Rig) -> None:
    """250 workflows, several of one moment: each once, newest first, whatever is added meanwhile."""
    made = [f"w-{number:03}" for number in range(250)]
    for number, workflow_id in enumerate(made):
        await rig.begin(workflow_id, at=NOW + timedelta(seconds=number // 7))
    seen: list[str] = []
    options: dict[str, Any] = {"limit": 40}
    while True:
        page = (await rig.http.get(LIST, params=options)).json()
        seen += [row["workflow_id"] for row in page["deployments"]]
        if page["next_cursor"] is None:
            break
        assert len(page["deployments"]) == 40
        await rig.begin(f"new-{len(seen)}", at=NOW + timedelta(days=1))
        options["cursor"] = page["next_cursor"]
    assert seen == made[::-1]


async def test_a_last_page_that_is_full_is_the_last(rig: Rig) -> None:
    """No cursor that leads to nothing."""
    for number in range(4):
        await rig.begin(f"w-{number}", at=NOW + timedelta(seconds=number))
    first = (await rig.http.get(LIST, params={"limit": 2})).json()
    second = (await rig.http.get(LIST, params={"limit": 2, "cursor": first["next_cursor"]})).json()
    assert [row["workflow_id"] for row in second["deployments"]] == ["w-1", "w-0"]
    assert second["next_cursor"] is None


async def test_filters_choose_and_combine(rig: Rig) -> None:
    """By container, host, state, outcome and time; `since` is in, `until` is out."""
    await rig.begin("web-b", at=NOW)
    await rig.begin("web-c", remote_host="host-c", at=NOW + timedelta(hours=1))
    await rig.begin("db-b", container_name="db", at=NOW + timedelta(hours=2))
    await rig.complete("web-b")
    await rig.records.advance("web-c", S.PENDING, S.FAILED, Facts(error_message="refused"))
    assert await ids_of(rig) == ["db-b", "web-c", "web-b"]
    assert await ids_of(rig, container_name="web") == ["web-c", "web-b"]
    assert await ids_of(rig, container_name="web", remote_host="host-b") == ["web-b"]
    assert await ids_of(rig, state="FAILED") == ["web-c"]
    assert await ids_of(rig, state=["FAILED", "PENDING"]) == ["db-b", "web-c"]
    assert await ids_of(rig, success="true") == ["web-b"]
    assert await ids_of(rig, success="false") == ["web-c"]
    later = (NOW + timedelta(hours=1)).isoformat()
    assert await ids_of(rig, since=later) == ["db-b", "web-c"]
    assert await ids_of(rig, until=later) == ["web-b"]
    elsewhere = "2026-01-31T14:00:00+01:00"  # the same moment in another zone
    assert await ids_of(rig, since=elsewhere) == ["db-b", "web-c"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("state=DONE", "state.0"),
        ("since=2026-01-31T12:00:00", "since"),
        ("cursor=nonsense", "cursor"),
        ("cursor=WyIyMDI2LTAxLTMxIiwgMV0", "cursor"),
        ("container=web", "container"),
    ],
)
async def test_a_wrong_filter_is_refused_by_name(rig: Rig, query: str, field: str) -> None:
    """A misspelt filter would otherwise list everything."""
    answer = await rig.http.get(f"{LIST}?{query}")
    assert (answer.status_code, slug(answer)) == (422, "malformed-request")
    assert [error["field"] for error in answer.json()["errors"]] == [field]


# Health, metrics, documentation, errors


async def test_health_is_open_and_tells_each_service(rig: Rig) -> None:
    """200 while records and Prefect answer, though the engine does not."""
    answer = await rig.http.get("/health", headers={"Authorization": ""})
    told = answer.json()
    assert (answer.status_code, told["status"]) == (200, "degraded")
    assert {name: found["status"] for name, found in told["services"].items()} == {
        "records": "healthy",
        "prefect": "healthy",
        "docker": "unhealthy",
        "kafka": "not_configured",
    }
    assert told["services"]["records"]["detail"] == "sqlite"
    assert isinstance(told["services"]["prefect"]["latency_ms"], int)
    assert "no-engine.sock" not in answer.text


async def test_a_service_that_hangs_does_not_hang_health(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that takes the connection and says nothing costs two seconds, however many ask."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", f"127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        answers = await asyncio.gather(*(rig.http.get("/health") for _ in range(5)))
        assert time.monotonic() - began < 5
    assert {answer.status_code for answer in answers} == {200}
    kafka = answers[0].json()["services"]["kafka"]
    assert kafka["status"] == "unhealthy"
    assert len({answer.text for answer in answers}) == 1


async def test_without_records_it_is_unhealthy_and_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """503 for health and for the list; the database's password is nowhere."""
    tokens = TokenStore(tmp_path / "tokens.json")
    url = f"postgresql://gantry:{SECRET}@127.0.0.1:{free_port()}/gantry"
    with caplog.at_level(logging.DEBUG, "deployments"):
        async with calling(Services(lambda: found(url)), tokens, tokens.create("ci", NOW)) as http:
            health, listed = await http.get("/health"), await http.get(LIST)
    assert (health.status_code, health.json()["services"]["records"]["status"]) == (503, "unhealthy")
    assert (listed.status_code, slug(listed)) == (503, "records-unavailable")
    assert listed.headers["retry-after"] == "5"
    assert SECRET not in health.text + listed.text + caplog.text


async def test_without_prefect_it_is_unhealthy_and_still_tells_what_is_recorded(rig: Rig) -> None:
    """A trigger is 503 and can be repeated; the status of a recorded workflow needs no Prefect."""
    await rig.begin("w-1")
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        triggered = await rig.http.post(TRIGGER, json=WEB)
        health, status = await rig.http.get("/health"), await rig.http.get(f"{LIST}/status/w-1")
    assert (triggered.status_code, slug(triggered)) == (503, "prefect-unreachable")
    assert (health.status_code, health.json()["services"]["prefect"]["status"]) == (503, "unhealthy")
    assert status.status_code == 200


async def test_a_prefect_without_our_deployment_is_named(rig: Rig) -> None:
    """The next step is the command that registers it."""
    async with get_client() as client:
        known = await client.read_deployment_by_name("deploy-container/default")
        await client.delete_deployment(known.id)
    try:
        answer = await rig.http.post(TRIGGER, json=WEB)
    finally:
        await register()
    assert (answer.status_code, slug(answer)) == (503, "prefect-deployment-missing")
    assert "deployments.register --control" in answer.json()["next_step"]


async def test_metrics_are_rendered_from_the_records(rig: Rig) -> None:
    """With a token; without one only when that was asked for, and then nothing else is open."""
    await rig.begin("w-1")
    answer = await rig.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'container_name="web"' in answer.text
    opened = create_app(rig.services, rig.tokens, metrics_are_open=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=opened), base_url="http://api") as http:
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get(LIST)).status_code == 401


async def test_every_call_is_documented_with_examples_that_hold(rig: Rig) -> None:
    """Open to read; each example is one that its own model takes."""
    described = (await rig.http.get("/openapi.json", headers={"Authorization": ""})).json()
    schemas = described["components"]["schemas"]
    calls = {
        (path, method): call for path, each in described["paths"].items() for method, call in each.items()
    }
    assert {path for path, _ in calls} == {
        *(TRIGGER, LIST, f"{LIST}/status/{{workflow_id}}", f"{LIST}/{{workflow_id}}/history"),
        *("/health", "/metrics"),
    }
    for (path, _), call in calls.items():
        assert call["summary"], path
        assert call["description"], path
        names = re.findall(
            r'"application/json": {"schema": {"\$ref": "#/components/schemas/(\w+)"}', json.dumps(call)
        )
        assert names or path == "/metrics"
        for name in names:
            model: type[BaseModel] = getattr(api_models, name)
            for example in schemas[name]["examples"]:
                model.model_validate_json(json.dumps(example))
    for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(described)):
        assert name in schemas


async def test_the_page_of_the_documentation_loads_nothing_from_elsewhere(rig: Rig) -> None:
    """Every call is on it; no script, no font, no style from another place."""
    page = await rig.http.get("/docs", headers={"Authorization": ""})
    assert page.headers["content-type"].startswith("text/html")
    assert TRIGGER in page.text
    assert "&quot;status&quot;: &quot;accepted&quot;" in page.text
    assert re.findall(r"<script|<link|src=|@import|url\(", page.text) == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/v1/nothing", 404),
        ("DELETE", TRIGGER, 405),
        ("POST", LIST, 405),
        ("GET", LIST + "/", 404),
    ],
)
async def test_unknown_paths_and_methods_are_problems_too(
    rig: Rig, method: str, path: str, status: int
) -> None:
    """Every error has the one form."""
    answer = await rig.http.request(method, path)
    assert answer.status_code == status
    slug(answer)


async def test_an_unexpected_error_tells_nothing_but_its_correlation_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the traceback, under the same id."""

    async def broken() -> str:
        raise RuntimeError(f"boom {SECRET}")

    tokens = TokenStore(tmp_path / "tokens.json")
    async with calling(Services(broken), tokens, tokens.create("ci", NOW)) as http:
        answer = await http.get(LIST, headers={"X-Correlation-ID": "c-500"})
    assert (answer.status_code, slug(answer)) == (500, "internal-error")
    assert SECRET not in answer.text
    assert answer.headers["x-correlation-id"] == "c-500"
    logged = [record for record in caplog.records if record.exc_info]
    assert [record.__dict__["correlation_id"] for record in logged] == ["c-500"]


@pytest.mark.parametrize("given", ["two words", "x" * 65, ""])
async def test_a_correlation_id_that_would_confuse_a_log_is_replaced(rig: Rig, given: str) -> None:
    """By a new one, told in the answer; a refusal has one as well."""
    answer = await rig.http.get(LIST, headers={"X-Correlation-ID": given, "Authorization": ""})
    assert answer.status_code == 401
    assert UUID(answer.headers["x-correlation-id"])
