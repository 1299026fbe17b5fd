"""Each automation of `deployments/automations/` fires on a real Prefect server, by events of real code."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Crashed

from deployments import setup
from receiver.contract import Stage
from tasks.errors import BuildFailed, HealthCheckFailed
from tasks.parameters import DeploymentParameters
from tasks.records import NewWorkflow, Records, WorkflowState
from tasks.workflow import Workflow, reopen_workflow
from tests.integration.prefect_server import running_server
from tests.webhook import HOOK, Webhook, listening

S = WorkflowState
PROJECT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 30
Fact = TypeVar("Fact")


@pytest.fixture(scope="module")
def webhook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webhook]:
    """A server that set-up has been at, with host-b and host-c, and the listener that is notified."""
    with (
        pytest.MonkeyPatch.context() as patch,
        running_server(tmp_path_factory.mktemp("prefect")),
        listening() as hook,
    ):
        for name in ("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS"):
            patch.delenv(name, raising=False)
        patch.setenv("HMAC_SECRET_KEY", "k" * 64)
        patch.setenv("GANTRY_HOSTS", "host-b=127.0.0.1:9,host-c=127.0.0.1:9")
        assert asyncio.run(setup.main(["--notify", HOOK])) == 0
        yield hook


async def until(look: Callable[[], Awaitable[Fact | None]], what: str) -> Fact:
    """The first thing that `look` gives; fails the test at the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if found := await look():
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"{what}: not within {DEADLINE_SECONDS} s")


async def message(hook: Webhook, *words: str) -> str:
    """Subject and body of the first message that holds all of the words."""

    async def look() -> str | None:
        texts = [f"{got['subject']}\n{got['body']}" for got in list(hook.received)]
        return next((text for text in texts if all(word in text for word in words)), None)

    return await until(look, f"a message with {words}")


@flow
async def deploying(url: str, name: str, host: str, end: str) -> str:
    """A workflow's way to a failure, by `Workflow.advance` as the flows call it; returns its id."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    asked = DeploymentParameters(container_name=name, remote_host=host, image_tag="v2")
    workflow_id, request = f"w-{uuid4().hex[:8]}", asked.model_dump(mode="json")
    new = NewWorkflow(
        workflow_id=workflow_id,
        flow_run_id=str(context.flow_run.id),
        container_name=name,
        image_tag="v2",
        remote_host=host,
        request=request,
    )
    async with await Records.open(url) as records:
        await records.create(new)
        async with reopen_workflow(records, await records.get(workflow_id)) as workflow:
            await (_fail_early if end == "early" else _fail_rollback)(workflow)
    return workflow_id


async def _fail_early(workflow: Workflow) -> None:
    await workflow.advance(S.PACKAGING)
    failure = BuildFailed("exit code 1 with TOKEN=hunter2", next_step="Mend the Dockerfile.")
    await workflow.advance(S.FAILED, **workflow.failure_facts(failure, None))


async def _fail_rollback(workflow: Workflow) -> None:
    for state in (S.PACKAGING, S.TRANSFERRING, S.DEPLOYING, S.VALIDATING):
        await workflow.advance(state)
    failure = HealthCheckFailed("HTTP 500")
    await workflow.advance(S.ROLLING_BACK, **workflow.failure_facts(failure, None))
    undone = {"success": False, "error_message": "the old container is gone"}
    await workflow.advance(S.FAILED, rollback_performed=True, rollback_result=undone)


async def run_of(workflow_flow: str) -> FlowRun:
    """The newest flow run of a flow."""
    async with get_client() as client:
        runs = await client.read_flow_runs()
        named = [run for run in runs if (await client.read_flow(run.flow_id)).name == workflow_flow]
    return max(named, key=lambda run: run.start_time or run.created)  # type: ignore[arg-type,return-value]


async def test_a_failed_deployment_is_told_with_cause_next_step_and_link(
    webhook: Webhook, sqlite_url: str
) -> None:
    """Container, version, host, cause without its secret, next step, link to the run."""
    workflow_id = await deploying(sqlite_url, "shop", "host-b", "early")
    told = await message(webhook, "Deployment failed", workflow_id)
    run = await run_of("deploying")
    assert told.startswith("Deployment failed: shop:v2 on host-b\n")
    assert "Cause: BUILD_FAILED: exit code 1 with TOKEN=***" in told
    assert f"Stage: {Stage.PACKAGE}; the workflow ended as FAILED" in told
    assert "Next step: Mend the Dockerfile." in told
    assert f"/runs/flow-run/{run.id}" in told
    assert "hunter2" not in str(webhook.received)


async def test_a_dead_letter_is_told_with_how_to_deploy_it_again(webhook: Webhook, sqlite_url: str) -> None:
    """One message for several of the same host at once."""
    first = await deploying(sqlite_url, "letters", "host-dead", "early")
    second = await deploying(sqlite_url, "letters", "host-dead", "early")
    told = await message(webhook, "Dead letter: letters on host-dead")
    assert f"--param redeploy={first}" in told
    await message(webhook, "Deployment failed", second)
    assert len([subject for subject in webhook.subjects() if subject.endswith("letters on host-dead")]) == 1


async def test_a_failed_rollback_is_told_as_critical_and_pauses_the_host_s_pool(
    webhook: Webhook, sqlite_url: str
) -> None:
    """That host's alone; nobody is told the same twice."""
    workflow_id = await deploying(sqlite_url, "web", "host-b", "rollback")
    told = await message(webhook, "CRITICAL", workflow_id)
    assert told.startswith("CRITICAL: web may not serve on host-b: ROLLBACK_FAILED\n")
    assert "Cause: the old container is gone" in told
    assert "Next step: Log in to the host" in told
    assert "prefect work-pool resume host-b" in told
    async with get_client() as client:

        async def paused() -> list[str]:
            return [pool.name for pool in await client.read_work_pools() if pool.is_paused]

        assert await until(paused, "a paused pool") == ["host-b"]
    assert not any("Deployment failed: web:" in subject for subject in webhook.subjects())


@pytest.mark.parametrize("ended", [Crashed(), Cancelled()], ids=["crashed", "cancelled"])
async def test_a_run_that_died_is_looked_after_by_reconcile(webhook: Webhook, ended: State[Any]) -> None:
    """A new run of `reconcile/default`, started by the automation."""
    async with get_client() as client:
        known = {run.id for run in await _reconcile_runs()}
        deployment = await client.read_deployment_by_name("deploy-container/default")
        parameters = {"container_name": "web", "remote_host": "host-c"}
        run = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        await client.set_flow_run_state(run.id, ended, force=True)

        async def started() -> list[FlowRun]:
            return [run for run in await _reconcile_runs() if run.id not in known]

        assert len(await until(started, "a run of reconcile")) == 1


async def _reconcile_runs() -> list[FlowRun]:
    """Runs of `reconcile/default` that an automation started."""
    async with get_client() as client:
        deployment = await client.read_deployment_by_name("reconcile/default")
        runs = await client.read_flow_runs()
    return [
        run
        for run in runs
        if run.deployment_id == deployment.id and run.created_by and run.created_by.type == "AUTOMATION"
    ]


async def test_a_host_whose_worker_falls_silent_is_told(webhook: Webhook) -> None:
    """Heard once, then no more."""
    async with get_client() as client:
        await client.send_worker_heartbeat("host-c", "worker", heartbeat_interval_seconds=1)
    told = await message(webhook, "Not heard from: host-c")
    assert "prefect worker start --pool host-c --type process" in told


async def test_events_of_a_run_that_ends_at_once_are_sent_before_its_process_ends(
    webhook: Webhook, sqlite_url: str
) -> None:
    """The process ends with its last change of state, and the message comes."""
    code = (
        "import asyncio, sys; from tests.integration.test_automations import deploying; "
        "print(asyncio.run(deploying(*sys.argv[1:])))"
    )
    arguments = [sys.executable, "-c", code, sqlite_url, "quick", "host-quick", "early"]
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    done = await asyncio.to_thread(
        subprocess.run, arguments, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Cause: BUILD_FAILED" in await message(webhook, "Deployment failed: quick:v2 on host-quick")


async def test_prefect_events_carry_what_an_automation_can_ask_for(webhook: Webhook, sqlite_url: str) -> None:
    """Every change of state, in order, with container, workflow, host, host's pool and flow run."""
    workflow_id = await deploying(sqlite_url, "feed", "host-c", "rollback")
    async with get_client() as client:
        pool = await client.read_work_pool("host-c")

        async def heard() -> list[dict[str, Any]] | None:
            wanted = {"event": {"prefix": ["gantry."]}, "related": {"id": [f"gantry.workflow.{workflow_id}"]}}
            body = {"filter": {**wanted, "order": "ASC"}, "limit": 50}
            events: list[dict[str, Any]] = (await client._client.post("/events/filter", json=body)).json()[
                "events"
            ]
            return events if len(events) == 5 else None

        events = await until(heard, "all events")
    assert [event["event"].removeprefix("gantry.") for event in events] == [
        *("deployment.started", "deployment.rollback-initiated", "deployment.failed"),
        *("deployment.rollback-failed", "dead-letter"),
    ]
    last = events[-1]
    assert last["resource"]["prefect.resource.id"] == "gantry.container.host-c.feed"
    assert last["resource"]["gantry.error_code"] == "ROLLBACK_FAILED"
    related = {one["prefect.resource.role"]: one["prefect.resource.id"] for one in reversed(last["related"])}
    assert related["host"] == "gantry.host.host-c"
    assert related["work-pool"] == f"prefect.work-pool.{pool.id}"
    assert UUID(related["flow-run"].removeprefix("prefect.flow-run."))
