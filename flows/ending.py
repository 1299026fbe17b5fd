"""How a workflow ends: completed, rolled back, failed, or left to `reconcile` while the host is silent.

The host's word decides. Used by `deploy-container` for its own workflow and by `reconcile` for those whose
run died.
"""

from __future__ import annotations

from typing import Any

from prefect import State, tags
from prefect.logging import get_run_logger
from prefect.states import Failed

from flows.rollback import rollback_container
from receiver.contract import DeploymentStatus, HostState
from tasks import dispatch, narration, outcome, overview, recovery, reporting
from tasks.errors import DeploymentFailed, DeploymentLost, GantryError
from tasks.records import RecordsUnreachable
from tasks.results import DeploymentResult, DeploymentUnsuccessful
from tasks.states import WorkflowState
from tasks.wording import on_host
from tasks.workflow import Workflow, as_failure, stage_of

Ending = DeploymentResult | State[Any]


async def complete(workflow: Workflow) -> DeploymentResult:
    """The host keeps the new container: write it down and show it."""
    status = workflow.require_status()
    await workflow.complete(status)
    return await _report(workflow, status)


async def end(workflow: Workflow, exc: Exception, *, is_cancelled: bool = False) -> Ending:
    """Whatever went wrong here: a host that kept the new container is right, a silent one is waited for.

    What a cancelled run had sent is deleted; that of any other is kept for the next deployment to go on with.
    """
    if isinstance(exc, RecordsUnreachable):
        raise exc  # the host goes on by itself; `reconcile` writes down what it did
    workflow.state = (await workflow.record()).current_state
    if workflow.state.terminal:
        return await _ended_elsewhere(workflow)
    failure = as_failure(exc, stage_of(workflow.state))
    try:
        status = await workflow.ask_host()
    except DeploymentLost:
        return await _fail(workflow, failure, None)
    if is_cancelled:
        await recovery.discard_upload(workflow.host, status)
    if status is None and workflow.is_with_host:
        return await _leave_open(workflow, failure, "the host cannot be reached")
    if status is None or status.state is not HostState.KEPT or workflow.state is WorkflowState.ROLLING_BACK:
        return await _fail(workflow, failure, status)
    return await _accept(workflow, failure, status)


async def _accept(workflow: Workflow, failure: GantryError, status: DeploymentStatus) -> Ending:
    """The host found the new container healthy and keeps it: that completes the workflow."""
    try:
        workflow.check_image(status)
    except DeploymentFailed as wrong:
        return await _fail(workflow, wrong, status)
    get_run_logger().warning("%s; but the host found the new container healthy and keeps it", failure)
    workflow.host_status = status
    if workflow.state is WorkflowState.DEPLOYING:
        await workflow.begin_validation(status)
    return await complete(workflow)


async def _ended_elsewhere(workflow: Workflow) -> Ending:
    """Another process has brought the workflow to its end, by what the host says."""
    get_run_logger().warning("the workflow was ended by another process as %s", workflow.state)
    result = await workflow.result()
    if result.success:
        return result
    unsuccessful = DeploymentUnsuccessful(result)
    return Failed(message=str(unsuccessful), data=unsuccessful)


async def _leave_open(workflow: Workflow, failure: GantryError, why: str) -> Ending:
    """No end is written that the host might belie: it settles by itself, and `reconcile` asks it."""
    told = (
        f"{failure.error_code}: {failure}; {why}: it ends or undoes the deployment by itself, "
        "and 'reconcile' records which as soon as it answers"
    )
    get_run_logger().error("%s", told, extra=workflow.identity)
    return Failed(message=told, data=DeploymentUnsuccessful(await workflow.result(), failure.next_step))


async def _fail(workflow: Workflow, failure: GantryError, status: DeploymentStatus | None) -> Ending:
    """Bring the host and the records to rest; the run's message is the cause in one line."""
    if workflow.must_roll_back:
        if workflow.state is not WorkflowState.ROLLING_BACK:
            await workflow.advance(WorkflowState.ROLLING_BACK, **workflow.failure_facts(failure, status))
        undone = await _roll_back(workflow)
        if not outcome.is_final(undone):
            return await _leave_open(workflow, failure, undone["error_message"])
        await _record_rollback(workflow, failure, undone)
        status = await _last_word(workflow) or status
    elif workflow.is_with_host and status is not None and not outcome.has_ended(status):
        return await _leave_open(workflow, failure, f"the host is {status.state}")
    else:
        await recovery.give_up(workflow.host, status)
        await workflow.advance(WorkflowState.FAILED, **workflow.failure_facts(failure, status))
    result = await _report(workflow, status, next_step=failure.next_step)
    unsuccessful = DeploymentUnsuccessful(result, failure.next_step)
    return Failed(message=str(unsuccessful), data=unsuccessful)


async def _last_word(workflow: Workflow) -> DeploymentStatus | None:
    try:
        return await workflow.ask_host()
    except DeploymentLost:
        return None


async def _roll_back(workflow: Workflow) -> dict[str, Any]:
    """Run the rollback subflow; returns its result, also when it broke off."""
    name = f"undo {on_host(workflow.image, workflow.parameters.remote_host)}"
    with tags(dispatch.workflow_tag(workflow.workflow_id)):
        state = await rollback_container.with_options(flow_run_name=name)(
            remote_host=workflow.parameters.remote_host,
            deployment_id=workflow.require_deployment(),
            remote_port=workflow.parameters.remote_port,
            workflow_id=workflow.workflow_id,
            flow_run_id=str(workflow.host_run) if workflow.host_run else None,
            return_state=True,
        )
    undone = await state.aresult(raise_on_failure=False)
    return undone if isinstance(undone, dict) else outcome.broke_off(undone)


async def _record_rollback(workflow: Workflow, failure: GantryError, undone: dict[str, Any]) -> None:
    """ROLLBACK_COMPLETED, or FAILED: by what the host says."""
    if undone.get("host_state") == HostState.KEPT:  # it serves: no rollback failed
        await workflow.advance(
            WorkflowState.FAILED,
            error_code=failure.error_code,
            error_message=f"{failure}; {undone['error_message']}",
            rollback_performed=False,
            rollback_result=undone,
        )
        return
    ended = WorkflowState.ROLLBACK_COMPLETED if undone["success"] else WorkflowState.FAILED
    await workflow.advance(ended, rollback_performed=True, rollback_result=undone)


async def _report(
    workflow: Workflow, status: DeploymentStatus | None, *, next_step: str = ""
) -> DeploymentResult:
    result = await workflow.result()
    stages = await workflow.records.stages(workflow.workflow_id)
    await reporting.publish(result, stages, status, next_step=next_step)
    if status is not None:
        await overview.refresh(workflow.host, workflow.records)
    get_run_logger().info("%s", narration.end_line(result), extra=workflow.identity)
    return result
