"""`deploy-container`: package, transfer, deploy, validate; and the way back when it fails.

Holds the order of work alone: SQL, HTTP and Docker live in `tasks`.
"""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.logging import get_run_logger

from flows import ending, reconcile
from flows.naming import deployment_name
from receiver.contract import (
    DEFAULT_PORT,
    ContainerName,
    DeploymentConfig,
    DeploymentStatus,
    DeployRequest,
    HealthCheckConfig,
    HostState,
    ImageTag,
    Port,
    Stage,
    Transport,
)
from tasks import delivery, dispatch, learning, outcome, package, precheck, reporting, store, transfer
from tasks.package import ImageMetadata
from tasks.parameters import (
    BuildOptions,
    DeploymentParameters,
    RemoteHostName,
    StageTimeoutMs,
    WaitSeconds,
    check_paths,
    default_timeout_ms,
    drain_seconds,
    health_check_seconds,
    load_seconds,
)
from tasks.results import DeploymentResult
from tasks.states import WorkflowState
from tasks.workflow import CONFIG_DIGEST, Workflow, open_workflow

_SLOWEST_UPLOAD_BYTES_PER_SECOND = 1_000_000


@flow(name="deploy-container", flow_run_name=deployment_name, persist_result=True)
async def deploy_container(
    container_name: ContainerName,
    remote_host: RemoteHostName,
    image_tag: ImageTag = "latest",
    remote_port: Port = DEFAULT_PORT,
    deployment_config: DeploymentConfig = DeploymentConfig(),  # noqa: B008 - frozen
    build_options: BuildOptions = BuildOptions(),  # noqa: B008 - frozen
    health_check_config: HealthCheckConfig = HealthCheckConfig(),  # noqa: B008 - frozen
    rollback_on_failure: bool = True,
    deployment_timeout_ms: StageTimeoutMs | None = None,
    wait_seconds: WaitSeconds = 0,
    transport: Transport = Transport.HTTP,
) -> DeploymentResult | State[Any]:
    """Build an image, carry it to a host, run it there, prove it healthy, or bring the old one back.

    Ends Completed with a `DeploymentResult`, or Failed with the cause in one line; then
    `DeploymentUnsuccessful.result` holds the same fields. Refuses wrong parameters before any work, and,
    after `wait_seconds`, a container that another run is deploying to this host.
    """
    parameters = DeploymentParameters(
        container_name=container_name,
        remote_host=remote_host,
        image_tag=image_tag,
        remote_port=remote_port,
        deployment_config=deployment_config,
        build_options=build_options,
        health_check_config=health_check_config,
        rollback_on_failure=rollback_on_failure,
        deployment_timeout_ms=deployment_timeout_ms or default_timeout_ms(),
        wait_seconds=wait_seconds,
        transport=transport,
    )
    return await deploy(parameters)


async def deploy(parameters: DeploymentParameters) -> DeploymentResult | State[Any]:
    """All of a deployment, as a workflow of the flow run that calls this."""
    check_paths(parameters.build_options)
    async with open_workflow(parameters) as workflow:
        try:
            await reconcile.finish_earlier(workflow)
            metadata = await _package(workflow)
            await _transfer(workflow, metadata)
            await deploy_and_validate(workflow)
        except Exception as exc:  # noqa: BLE001 - whatever failed, the host and the records are brought to rest
            return await ending.end(workflow, exc)
        result = await ending.complete(workflow)
    if await learning.wanted(metadata):
        await learning.request(metadata)
    return result


async def _package(workflow: Workflow) -> ImageMetadata:
    """Stage 1. An unchanged image is not built again, unless it is gone.

    Nothing is built for a host that is out of reach or refuses our key.
    """
    asked = workflow.parameters
    reference = workflow.image
    await workflow.advance(WorkflowState.PACKAGING)
    say = get_run_logger().info
    async with workflow.stage(Stage.PACKAGE, _seconds(workflow)) as stage:
        health = await stage.run(precheck.check_host, workflow.host, workflow.workflow_id)
        await precheck.warn_of_pool(workflow.host)
        async with store.alone(reference, say):
            image_id = await package.build_or_reuse(stage, asked)
            metadata = await stage.run(package.gather_metadata, image_id, reference)
            metadata = await package.identified(stage, metadata)
        await package.check_image(stage, metadata, asked.build_options, health.architecture)
        stage.artifacts |= await reporting.shown(
            reporting.write_package_artifacts(workflow.workflow_id, metadata)
        )
        workflow.config_digest = package.announce_image(metadata).config_digest
        stage.artifacts[CONFIG_DIGEST] = workflow.config_digest
    result = stage.result()
    await workflow.advance(
        WorkflowState.TRANSFERRING,
        stage=result,
        image_id=metadata.image_id,
        image_size_bytes=metadata.image_size_bytes,
        deployment_metrics=workflow.metrics(result),
    )
    return metadata


async def _transfer(workflow: Workflow, metadata: ImageMetadata) -> None:
    """Stage 2. A host that has the image is sent no bytes of it; one that has layers of it, the rest."""
    host, correlation_id = workflow.host, workflow.workflow_id
    request = _request(workflow, metadata)
    limit = _seconds(workflow) + metadata.image_size_bytes / _SLOWEST_UPLOAD_BYTES_PER_SECOND
    async with workflow.stage(Stage.TRANSFER, limit) as stage:
        with transfer.gated(stage):
            await stage.run(transfer.establish_connection, host, correlation_id)
            accepted = await stage.run(
                transfer.send_deployment_request, host, request, f"{correlation_id}-deploy"
            )
            workflow.deployment_id = accepted.deployment_id
            workflow.load_seconds = load_seconds(metadata.image_size_bytes)
            done = delivery.already_there(metadata.layers)
            if accepted.state is HostState.RECEIVING:
                done = await stage.run(
                    transfer.upload_package,
                    host,
                    accepted,
                    metadata,
                    workflow.parameters.build_options.compression.package_format,
                    correlation_id,
                )
            stage.gates.append(transfer.package_gate(done))
            status = await stage.run(transfer.verify_transfer, host, accepted.deployment_id, correlation_id)
        stage.artifacts |= await reporting.shown(reporting.write_receipt(correlation_id, status, done))
    result = stage.result()
    await workflow.advance(
        WorkflowState.DEPLOYING,
        stage=result,
        deployment_id=accepted.deployment_id,
        deployment_metrics={**workflow.metrics(result), **done.metrics()},
    )


async def deploy_and_validate(workflow: Workflow) -> None:
    """Stages 3 and 4, run by the host's own worker; the host says how they went."""
    deployment_id = workflow.require_deployment()
    limit = _seconds(workflow) + workflow.load_seconds
    async with workflow.stage(Stage.DEPLOY, limit):
        workflow.host_run = await dispatch.start_run_on_host(
            "receive-container", workflow.host, deployment_id, workflow.workflow_id, workflow.image
        )
        status = await _follow(workflow, outcome.started_or_ended, limit)
    if not outcome.has_started(status):
        workflow.failed_stage = outcome.stage_result(status, Stage.DEPLOY, outcome.failure_of(status))
        raise outcome.failure_of(status)
    await workflow.begin_validation(status)
    asked = workflow.parameters
    limit = _seconds(workflow) + health_check_seconds(asked.health_check_config)
    limit += drain_seconds(asked.deployment_config)
    async with workflow.stage(Stage.VALIDATE, limit):
        status = await _follow(workflow, outcome.has_ended, limit, workflow.tell_attempts)
    workflow.host_status = status
    if status.state is HostState.KEPT:
        workflow.check_image(status)
    else:
        workflow.failed_stage = outcome.stage_result(status, Stage.VALIDATE, outcome.failure_of(status))
        raise outcome.failure_of(status)


async def _follow(
    workflow: Workflow, reached: dispatch.Reached, seconds: float, heard: dispatch.Heard | None = None
) -> DeploymentStatus:
    return await dispatch.follow(
        workflow.host,
        workflow.require_deployment(),
        workflow.require_run(),
        reached,
        seconds,
        correlation_id=workflow.workflow_id,
        heard=heard,
    )


def _request(workflow: Workflow, metadata: ImageMetadata) -> DeployRequest:
    asked = workflow.parameters
    return DeployRequest(
        container_name=asked.container_name,
        image_tag=asked.image_tag,
        deployment_config=asked.deployment_config,
        health_check_config=asked.health_check_config,
        rollback_on_failure=asked.rollback_on_failure,
        workflow_id=workflow.workflow_id,
        image=package.announce_image(metadata),
        transport=asked.transport,
    )


def _seconds(workflow: Workflow) -> float:
    return workflow.parameters.deployment_timeout_ms / 1000
