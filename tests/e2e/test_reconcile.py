"""Runs that die or are cancelled, and runs that meet: records and host agree afterwards."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.e2e.deploying import Service, events_of, in_control, prefect_api, query, wait_for
from tests.e2e.deploying import outcome as outcome_of

SLOW_BUILD = 'FROM gantry-test-base:latest\nRUN ["/bin/busybox", "sleep", "{seconds}"]\n'


def processes_of(run_id: str) -> list[int]:
    """Processes that work on a flow run, by the variable that its worker gave them."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"PREFECT__FLOW_RUN_ID={run_id}".encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:  # gone meanwhile
            continue
    return found


def record_of(service: Service, run_id: str) -> Mapping[str, Any]:
    """The workflow's row; empty before there is one."""
    rows = query(service.lab, "SELECT * FROM workflow_executions WHERE workflow_id = ?", run_id)
    return rows[0] if rows else {}


def wait_for_state(service: Service, run_id: str, *states: str) -> Mapping[str, Any]:
    """The workflow's row once it is in one of `states`."""

    def look() -> Mapping[str, Any] | None:
        row = record_of(service, run_id)
        return row if row.get("current_state") in states else None

    return wait_for(look, f"workflow {run_id} in {states}")


def kill(run_id: str) -> None:
    """SIGKILL all processes of a flow run."""
    pids = wait_for(lambda: processes_of(run_id), f"a process of run {run_id}")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def slow_context(service: Service, seconds: int) -> str:
    """A build context whose build takes `seconds`."""
    context = service.lab.state_dir / f"slow-{service.name}"
    context.mkdir()
    (context / "Dockerfile").write_text(SLOW_BUILD.format(seconds=seconds))
    return str(context)


def test_a_deployment_whose_run_is_killed_is_ended_by_what_the_host_did(service: Service) -> None:
    """The host goes on by itself; the records say COMPLETED without anybody's help."""
    assert service.deploy("v1").state == "COMPLETED"
    run_id = service.start(service.parameters("v2"))
    wait_for_state(service, run_id, "DEPLOYING")
    kill(run_id)
    ended = wait_for_state(service, run_id, "COMPLETED", "ROLLBACK_COMPLETED", "FAILED")
    serving = service.answer() or ""
    assert serving.endswith("version v2" if ended["current_state"] == "COMPLETED" else "version v1")
    assert events_of(service.lab, run_id)[-1] in {"DEPLOYMENT_COMPLETED", "DEPLOYMENT_DLQ"}


def test_the_next_deployment_ends_the_one_before_it(service: Service) -> None:
    """A workflow that died in its build is FAILED before the next one begins to build."""
    context = slow_context(service, 60)
    run_id = service.start({**service.parameters("v1"), "build_options": {"build_context": context}})
    wait_for_state(service, run_id, "PACKAGING")
    kill(run_id)
    after = service.deploy("v1")
    assert after.state == "COMPLETED", after.message
    ended = record_of(service, run_id)
    assert ended["current_state"] == "FAILED"
    assert "process is gone" in ended["error_message"]


def test_cancelling_stops_the_build_and_ends_the_workflow(service: Service) -> None:
    """Cancelled in Prefect: no process goes on, and the records say FAILED, because it was cancelled."""
    context = slow_context(service, 300)
    run_id = service.start({**service.parameters("v1"), "build_options": {"build_context": context}})
    wait_for_state(service, run_id, "PACKAGING")
    engine = service.lab.control.docker()
    wait_for(lambda: engine.containers.list(), "the build runs")
    body = {"state": {"type": "CANCELLING"}}
    prefect_api(service.lab, "POST", f"/flow_runs/{run_id}/set_state", body)
    ended = wait_for_state(service, run_id, "FAILED")
    assert "cancelled" in ended["error_message"]
    wait_for(lambda: not processes_of(run_id), "the run's processes to end")
    wait_for(lambda: not engine.containers.list(), "the build has stopped")
    assert events_of(service.lab, run_id)[-1] == "DEPLOYMENT_DLQ"


def test_cancelling_takes_an_unproven_container_back(service: Service) -> None:
    """Cancelled while the new version is being validated: the old one serves again."""
    assert service.deploy("v1").state == "COMPLETED"
    check = {"health_check_config": {"max_retries": 100, "retry_interval_ms": 1000}}
    run_id = service.start({**service.parameters("v2", HEALTH="broken"), **check})
    wait_for_state(service, run_id, "VALIDATING")
    prefect_api(service.lab, "POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
    ended = wait_for_state(service, run_id, "ROLLBACK_COMPLETED", "FAILED")
    assert ended["current_state"] == "ROLLBACK_COMPLETED", ended["error_message"]
    assert service.answer() == "Hello from Gantry, version v1"
    assert len(service.containers()) == 1


def test_a_second_deployment_is_refused_and_told_who_deploys(service: Service) -> None:
    """At once, with workflow, version and time; one that may wait deploys afterwards."""
    context = slow_context(service, 8)
    slow = {"build_options": {"build_context": context}, "health_check_config": {"health_endpoint": None}}
    sleeper = {"command": ["/bin/busybox", "sleep", "1000"], "stop_timeout_seconds": 0}
    first = service.start({**service.parameters("v1"), **slow, "deployment_config": sleeper})
    wait_for_state(service, first, "PACKAGING")
    refused = service.deploy("v2")
    assert refused.state == "FAILED"
    assert first in refused.message
    assert "(v1, PACKAGING) since 20" in refused.message
    assert refused.record == {}
    waited = service.deploy("v2", {"wait_seconds": 120})
    assert waited.state == "COMPLETED", waited.message
    assert outcome_of(service.lab, first).state == "COMPLETED"
    assert service.answer() == "Hello from Gantry, version v2"


def test_reconcile_is_scheduled(service: Service) -> None:
    """Prefect's server makes runs of it by itself; nobody starts them."""
    wanted = {"flows": {"name": {"any_": ["reconcile"]}}}

    def made_by_the_schedule() -> bool:
        found = prefect_api(service.lab, "POST", "/flow_runs/filter", wanted)
        return any(run["auto_scheduled"] for run in found)

    wait_for(made_by_the_schedule, "a scheduled run of reconcile")


_FAILED_WITH_A_PACKAGE = """
import asyncio, sys
from blake3 import blake3
from blocks.records_database import find_records_url
from blocks.remote_host import find_remote_host
from receiver.contract import DeployRequest, ErrorCode, ImageAnnouncement, PackageAnnouncement
from tasks.records import Facts, NewWorkflow, Records
from tasks.states import WorkflowState as S

async def main(workflow_id, name, host_name):
    package = b"never to be deployed"
    digest = "sha256:" + "0" * 64
    image = ImageAnnouncement(config_digest=digest, layers=[], architecture="amd64", size_bytes=1)
    request = DeployRequest(
        container_name=name, workflow_id=workflow_id, image=image,
        package=PackageAnnouncement(size_bytes=len(package), blake3=blake3(package).hexdigest()),
    )
    host = await find_remote_host(host_name)
    async with host.receiver() as receiver:
        accepted = await receiver.announce(request, workflow_id)
        await receiver.send_chunk(accepted.deployment_id, 0, package)
        print((await receiver.status(accepted.deployment_id)).state)
    async with await Records.open(await find_records_url()) as records:
        new = NewWorkflow(workflow_id=workflow_id, container_name=name, remote_host=host_name)
        await records.create(new)
        why = Facts(error_code=ErrorCode.REMOTE_ENDPOINT_UNREACHABLE, error_message="cut off")
        await records.advance(workflow_id, S.PENDING, S.FAILED, why)

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_host_drops_what_it_holds_for_a_workflow_that_failed(service: Service) -> None:
    """It was cut off when the deployment failed, so that nobody could tell it then."""
    workflow_id = f"cut-off-{service.name}"
    told = in_control(service.lab, "-c", _FAILED_WITH_A_PACKAGE, workflow_id, service.name, service.host.name)
    assert told.strip() == "ready_for_deployment"
    ledger = Path(service.host.environment["HOOK_RECEIVER_STATE_DIR"]) / "ledger.sqlite3"
    sql = "SELECT state FROM deployments WHERE workflow_id = ?"

    def dropped() -> bool:
        with sqlite3.connect(ledger) as connection:
            return bool(connection.execute(sql, (workflow_id,)).fetchone() == ("aborted",))

    in_control(
        service.lab, "-c", "from flows.reconcile import reconcile; import asyncio; asyncio.run(reconcile())"
    )
    wait_for(dropped, "the host drops the package")
