"""`rolling-update`: a new version takes the old one's place without a lost request.

The specification's example 3. The work is that of `deploy-container` with strategy `rolling`.
"""

from __future__ import annotations

from typing import Any

from prefect import State, flow

from flows.deploy import deploy
from flows.naming import deployment_name
from receiver.contract import (
    DEFAULT_PORT,
    ContainerName,
    DeploymentConfig,
    HealthCheckConfig,
    ImageTag,
    Port,
    Transport,
)
from tasks import versions
from tasks.parameters import (
    BuildOptions,
    DeploymentParameters,
    RemoteHostName,
    StageTimeoutMs,
    WaitSeconds,
    default_timeout_ms,
    rolling,
)


def _run_name() -> str:
    return f"roll {deployment_name()}"


@flow(name="rolling-update", flow_run_name=_run_name, persist_result=True)
async def rolling_update(
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
) -> dict[str, Any] | State[Any]:
    """Start the new version beside the old one, prove it, move the traffic, and stop the old one when idle.

    Returns `success`, `old_version` and `new_version` (image tags), and the `deployment`. A run that did not
    reach its aim ends Failed as `deploy-container` does; then the old version serves. Refuses a service that
    cannot run twice side by side before any work.
    """
    parameters = DeploymentParameters(
        container_name=container_name,
        remote_host=remote_host,
        image_tag=image_tag,
        remote_port=remote_port,
        deployment_config=rolling(deployment_config),
        build_options=build_options,
        health_check_config=health_check_config,
        rollback_on_failure=rollback_on_failure,
        deployment_timeout_ms=deployment_timeout_ms or default_timeout_ms(),
        wait_seconds=wait_seconds,
        transport=transport,
    )
    old_version = await versions.running_version(remote_host, remote_port, container_name)
    ended = await deploy(parameters)
    if isinstance(ended, State):
        return ended
    return {
        "success": ended.success,
        "old_version": old_version,
        "new_version": image_tag,
        "deployment": ended.model_dump(mode="json"),
    }
