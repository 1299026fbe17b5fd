"""A rollback by hand: a kept version becomes a deployment again, with nothing built and nothing sent.

From stage 3 on it is what any deployment is: proven before it stays, undone when it is not well.
"""

from __future__ import annotations

from prefect.logging import get_run_logger
from prefect.states import Failed

from blocks.receiver_client import ReceiverError
from flows import ending, reconcile
from flows.deploy import deploy_and_validate
from receiver.contract import Stage
from tasks import versions
from tasks.states import WorkflowState
from tasks.versions import RollbackParameters
from tasks.workflow import CONFIG_DIGEST, Workflow, as_failure, open_workflow


async def revert(
    container_name: str, remote_host: str, remote_port: int, to_version: str | None
) -> ending.Ending:
    """Go back to the previous version, or to a named one among those that the host keeps.

    What the host refuses, or cannot be asked, ends the run before a workflow begins.
    """
    try:
        asked = await versions.plan(container_name, remote_host, remote_port, to_version)
    except ReceiverError as exc:
        failure = as_failure(exc, Stage.DEPLOY)
        return Failed(message=f"{failure.error_code}: {failure}. {failure.next_step}", data=failure)
    get_run_logger().info(
        "%s goes back to %s (%s)", container_name, asked.image_tag, asked.kept_deployment_id
    )
    async with open_workflow(asked) as workflow:
        try:
            await reconcile.finish_earlier(workflow)
            await _find(workflow, asked)
            await _announce(workflow, asked)
            await deploy_and_validate(workflow)
        except Exception as exc:  # noqa: BLE001 - whatever failed, the host and the records are brought to rest
            return await ending.end(workflow, exc)
        return await ending.complete(workflow)


async def _find(workflow: Workflow, asked: RollbackParameters) -> None:
    """Stage 1: the version is on the host. Asked again, now that nobody else deploys the container."""
    await workflow.advance(WorkflowState.PACKAGING)
    async with workflow.stage(Stage.PACKAGE, _seconds(asked)) as stage:
        target = await stage.run(
            versions.find_kept_version,
            workflow.host,
            asked.container_name,
            asked.to_version,
            workflow.workflow_id,
        )
        versions.check_same(target, asked)
        versions.remark(stage, f"{asked.image_tag} is kept on the host: nothing was built")
        workflow.config_digest = target.image.config_digest
        stage.artifacts[CONFIG_DIGEST] = workflow.config_digest
    result = stage.result()
    await workflow.advance(
        WorkflowState.TRANSFERRING,
        stage=result,
        image_id=target.version.image_id,
        image_size_bytes=target.image.size_bytes,
        deployment_metrics=workflow.metrics(result),
    )


async def _announce(workflow: Workflow, asked: RollbackParameters) -> None:
    """Stage 2: the host takes the kept version as a new deployment."""
    async with workflow.stage(Stage.TRANSFER, _seconds(asked)) as stage:
        accepted = await stage.run(
            versions.send_rollback_request,
            workflow.host,
            asked.container_name,
            asked.kept_deployment_id,
            workflow.workflow_id,
        )
        versions.remark(stage, f"{asked.image_tag} is kept on the host: nothing was sent")
        workflow.deployment_id = accepted.deployment_id
    result = stage.result()
    await workflow.advance(
        WorkflowState.DEPLOYING,
        stage=result,
        deployment_id=accepted.deployment_id,
        deployment_metrics={**workflow.metrics(result), "transferred_bytes": 0},
    )


def _seconds(asked: RollbackParameters) -> float:
    return asked.deployment_timeout_ms / 1000
