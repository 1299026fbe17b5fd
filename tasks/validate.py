"""Stage 4 on the host: is the new container well; then it is kept."""

from __future__ import annotations

from receiver.contract import DeployRequest, Stage
from receiver.health import MAX_INTERVAL_SECONDS
from tasks.errors import RetryPolicy
from tasks.hosting import this_host
from tasks.policies import operation


def status_seconds(request: DeployRequest) -> float:
    """Time for the status check: the quiet period, and the policy's 3 s on top."""
    return request.health_check_config.quiet_period_ms / 1000 + 3


def health_seconds(request: DeployRequest) -> float:
    """Upper bound of all attempts of the health endpoint, for the deadline of the stage."""
    settings, check = this_host().settings, request.health_check_config
    attempts = check.max_retries or settings.health_check_max_retries
    timeout_ms = check.timeout_ms or settings.health_check_timeout_ms
    return attempts * (timeout_ms / 1000 + MAX_INTERVAL_SECONDS) + 10


@operation("check_container_status", Stage.VALIDATE, attempts=1, timeout=False)
async def check_container_status(deployment_id: str) -> None:
    """The container runs and stays the same process."""
    await this_host().operations(deployment_id).check_container_status()


@operation("validate_health_endpoint", Stage.VALIDATE, attempts=1, timeout=False)
async def validate_health_endpoint(deployment_id: str) -> None:
    """The health endpoint answers as expected; its attempts and waits are the deployment's own."""
    await this_host().operations(deployment_id).validate_health_endpoint()


@operation("verify_service_registration", Stage.VALIDATE, attempts=1)
async def verify_service_registration(deployment_id: str) -> None:
    """Consul lists the service, where that is asked for."""
    await this_host().operations(deployment_id).verify_service_registration()


@operation("keep_container", Stage.VALIDATE, attempts=1, policy=RetryPolicy(timeout_ms=60_000))
async def keep_container(deployment_id: str) -> None:
    """The new container is proven: it stays."""
    await this_host().operations(deployment_id).keep()


@operation("retire_old_versions", "after", policy=RetryPolicy(timeout_ms=120_000))
async def retire_old_versions(deployment_id: str) -> None:
    """Remove versions beyond those kept for rollback; the service does not depend on it."""
    await this_host().operations(deployment_id).retire()
