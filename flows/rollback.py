"""`rollback-container`: undo a deployment on its host, or go back by hand to a version that the host keeps.

To undo: first the host itself (its flow or its guardian), then `restore-container` by the host's worker, then
the receiver's own signed call, for when that worker is gone. To go back: `flows.revert`.
"""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.runtime import flow_run
from prefect.states import Failed

from receiver.contract import DEFAULT_PORT, ContainerName, HostState, Port
from tasks import dispatch, outcome, recovery, versions
from tasks.parameters import RemoteHostName
from tasks.results import DeploymentResult


def _run_name() -> str:
    asked = flow_run.parameters
    what = asked.get("container_name") or str(asked.get("deployment_id"))[:8]
    where = f"to {asked['to_version']} → " if asked.get("to_version") else "→ "
    return f"roll back {what} {where}{asked['remote_host']}"


@flow(name="rollback-container", flow_run_name=_run_name)
async def rollback_container(
    remote_host: RemoteHostName,
    deployment_id: str | None = None,
    remote_port: Port = DEFAULT_PORT,
    workflow_id: str | None = None,
    flow_run_id: str | None = None,
    container_name: ContainerName | None = None,
    to_version: str | None = None,
) -> dict[str, Any] | DeploymentResult | State[Any]:
    """Give `container_name` to go back to its previous version, or to `to_version` (deployment id or tag).

    Or give `deployment_id` to undo a deployment that is not settled: returns the specification's
    `rollback_result`. A run that did not reach its aim ends Failed with the cause in one line.
    """
    versions.check_choice(deployment_id, container_name, to_version)
    if container_name is not None:
        from flows.revert import revert  # here: it ends as deployments do, and they end by this flow

        return await revert(container_name, remote_host, remote_port, to_version)
    with dispatch.untagged():
        undone = await _undo(remote_host, remote_port, str(deployment_id), workflow_id, flow_run_id)
    return undone if undone["success"] else Failed(message=_cause(undone), data=undone)


async def _undo(
    remote_host: str, remote_port: int, deployment_id: str, workflow_id: str | None, flow_run_id: str | None
) -> dict[str, Any]:
    attempt = await recovery.begin(remote_host, remote_port, deployment_id, workflow_id, flow_run_id)
    status = await recovery.wait_for_host(attempt)
    if not recovery.is_settled(status):
        status = await recovery.restore_by_worker(attempt, status)
    if recovery.wants_restore(status):
        status = await recovery.restore_by_receiver(attempt)
    if status is None:
        return recovery.unreachable(attempt)
    return outcome.rollback_result(status)


def _cause(undone: dict[str, Any]) -> str:
    told = f"not rolled back: {undone['error_message']}"
    if undone.get("host_state") == HostState.KEPT:
        told += "; to go back to an earlier version, give container_name instead of deployment_id"
    return told
